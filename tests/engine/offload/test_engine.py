"""An engine with an offload generates the same tokens as one without, and computes less."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from modelpack_engine.async_engine import AsyncEngine
from modelpack_engine.config import EngineConfig
from modelpack_engine.engine import Engine
from modelpack_engine.offload.tiers import OffloadTiers
from modelpack_engine.outputs import EngineStats
from modelpack_engine.request import EngineRequest, SamplingParams
from tests.engine.launching import WAYS, launch
from tests.engine.serving.tiny import reference_tokens, tiny_loaded

pytestmark = pytest.mark.long

GREEDY = SamplingParams(max_tokens=6, temperature=0, ignore_eos=True)
#: Room for 23 blocks of 16 tokens: three prompts of 100.
CACHE_BYTES = 200_000

_rng = random.Random(3)
PROMPTS = [[_rng.randrange(256) for _ in range(100)] for _ in range(6)]
EXPECTED = [reference_tokens(prompt, 6) for prompt in PROMPTS]

Open = Callable[..., Engine]


@pytest.fixture(autouse=True, params=WAYS)
def launches(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    launch(request.param, monkeypatch)


@pytest.fixture
def open_engine(tmp_path: Path) -> Iterator[Open]:
    """Opens engines with the same directory, and closes them at the end."""
    engines: list[Engine] = []

    def opened(model_id: str = "tiny", **settings: object) -> Engine:
        given: dict[str, object] = {
            "device": "cpu", "max_num_seqs": 4, "max_num_batched_tokens": 32, "self_test": False,
            "kv_cache_bytes": CACHE_BYTES, "kv_offload_memory": 0,
            "kv_offload_dir": str(tmp_path / "kv"),
        }  # fmt: skip
        config = EngineConfig(**given | settings)  # type: ignore[arg-type]
        engines.append(Engine(tiny_loaded(), config, model_id=model_id))
        return engines[-1]

    yield opened
    for engine in engines:
        engine.close()


def answers(engine: Engine, prompts: list[list[int]]) -> list[list[int]]:
    events = engine.generate(prompts, GREEDY)
    return [[token for event in each for token in event.token_ids] for each in events]


@pytest.mark.parametrize("where", ["memory", "disk", "both", "little memory"])
def test_tokens_are_the_same_and_prefixes_come_back(open_engine: Open, where: str) -> None:
    memory = {"memory": 10**7, "disk": 0, "both": 10**7, "little memory": 50_000}[where]
    settings: dict[str, object] = {"kv_offload_memory": memory}
    if where == "memory":
        settings["kv_offload_dir"] = None
    engine = open_engine(**settings)
    assert answers(engine, PROMPTS) == EXPECTED
    assert engine.stats().offload.restores == 0
    for _ in range(2):
        for prompt, expected in zip(PROMPTS, EXPECTED, strict=True):
            assert answers(engine, [prompt]) == [expected]
    assert answers(engine, PROMPTS) == EXPECTED
    stats = engine.stats().offload
    assert stats.restores > 6
    assert stats.restored_tokens == 16 * (stats.memory_hits + stats.disk_hits) > 6 * 80
    assert (stats.memory_hits > 0) == (memory > 0)
    assert (stats.disk_hits > 0) == (where in {"disk", "little memory"})
    assert stats.memory_bytes <= memory
    assert stats.dropped_files == 0
    assert engine.stats().blocks_used == 0


def test_a_restart_finds_what_there_was(open_engine: Open) -> None:
    first = open_engine(kv_offload_memory=10**7)
    assert answers(first, PROMPTS) == EXPECTED
    assert first.stats().offload.disk_bytes < 36 * 8192, "some are still on the device"
    first.close()
    again = open_engine()
    assert answers(again, PROMPTS) == EXPECTED
    assert again.stats().cached_tokens == 6 * 96
    assert again.stats().offload.disk_hits == 36


@pytest.mark.parametrize("change", ["model", "dtype", "block size"])
def test_what_is_not_the_same_is_not_found(open_engine: Open, change: str) -> None:
    first = open_engine()
    answers(first, PROMPTS[:3])
    first.close()
    settings: dict[str, object] = {"kv_cache_bytes": 4 * CACHE_BYTES}
    if change == "model":
        settings["model_id"] = "another"
    elif change == "block size":
        settings["block_size"] = 8
    else:
        settings["kv_cache_dtype"] = "fp16"
    engine = open_engine(**settings)
    answers(engine, PROMPTS[:3])
    assert engine.stats().cached_tokens == engine.stats().offload.disk_hits == 0


def test_damaged_files_are_computed_again(
    open_engine: Open, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = open_engine()
    answers(first, PROMPTS)
    first.close()
    files = sorted((tmp_path / "kv").rglob("*.kv"))
    rng = random.Random(5)
    damaged = rng.sample(files, 9)
    for path in damaged:
        data = bytearray(path.read_bytes())
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        path.write_bytes(data if rng.random() < 0.7 else data[: rng.randrange(len(data))])
    engine = open_engine()
    assert answers(engine, PROMPTS) == EXPECTED
    assert answers(engine, PROMPTS) == EXPECTED
    dropped = engine.stats().offload.dropped_files
    assert 1 <= dropped <= 9
    assert sum("dropped the KV block" in message for message in caplog.messages) == dropped
    engine.close()
    assert answers(open_engine(), PROMPTS) == EXPECTED


def test_preempted_requests_come_back(open_engine: Open) -> None:
    """Four requests that need more blocks than there are."""
    long = SamplingParams(max_tokens=80, temperature=0, ignore_eos=True)
    expected = [reference_tokens(prompt, 80) for prompt in PROMPTS[:4]]
    engine = open_engine(kv_offload_memory=10**7)
    events = engine.generate(PROMPTS[:4], long)
    found = [[token for event in each for token in event.token_ids] for each in events]
    assert found == expected
    assert engine.stats().num_preemptions > 0
    assert engine.stats().offload.restores > 0


def test_a_salt_keeps_requests_apart(open_engine: Open) -> None:
    engine = open_engine(kv_offload_memory=10**7)
    cached = []
    for number, salt in enumerate([b"", b"one", b"two", b"", b"one"]):
        engine.add_request(str(number), EngineRequest(PROMPTS[0], GREEDY, cache_salt=salt))
        events = [event for _ in range(99) if engine.has_work for event in engine.step()]
        assert [token for event in events for token in event.token_ids] == EXPECTED[0]
        cached.append(events[-1].usage.cached_tokens if events[-1].usage else None)
        answers(engine, PROMPTS[1:4])  # evicts all other blocks
    assert cached == [0, 0, 0, 96, 96]


def test_others_go_on_while_files_are_slow(
    open_engine: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = open_engine()
    answers(first, PROMPTS)
    first.close()
    engine = open_engine()
    held = []
    real = OffloadTiers.load

    def hold(self: OffloadTiers, hashes: list[bytes]) -> object:
        load = real(self, hashes)
        self.wait(load, 30)
        load.done = False
        held.append(load)
        return load

    monkeypatch.setattr(OffloadTiers, "load", hold)
    stream = SamplingParams(max_tokens=40, temperature=0, ignore_eos=True)
    engine.add_request("stream", EngineRequest(PROMPTS[1][:10], stream))
    engine.add_request("restored", EngineRequest(PROMPTS[0], GREEDY))
    got: dict[str, list[int]] = {"stream": [], "restored": []}

    def step() -> None:
        for event in engine.step():
            got[event.request_id] += event.token_ids

    while len(got["stream"]) < 20:
        step()
    assert held, "the prompt is in files"
    assert not got["restored"]
    while engine.has_work:
        for load in held:
            load.done = True
        step()
    assert got["restored"] == EXPECTED[0]
    assert got["stream"] == reference_tokens(PROMPTS[1][:10], 40)


def test_a_failed_restore_is_never_found(
    open_engine: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = open_engine(kv_offload_memory=10**7)
    answers(engine, PROMPTS)
    (contents,) = engine._mover._contents
    real, failed = contents.write, []

    def fail(*args: object) -> None:
        failed.append(args)
        raise RuntimeError("no memory")

    engine.add_request("fails", EngineRequest(PROMPTS[0], GREEDY))
    monkeypatch.setattr(contents, "write", fail)

    def run() -> None:
        while engine.has_work:
            engine.step()

    with pytest.raises(RuntimeError, match="no memory"):
        run()
    engine.fail_all("it failed")
    assert failed
    monkeypatch.setattr(contents, "write", real)
    assert answers(engine, PROMPTS) == EXPECTED


def test_an_engine_in_its_thread_leaves_its_prefixes(open_engine: Open) -> None:
    """A stopped server writes its blocks, and the next server finds them."""

    async def ask(prompt: list[int]) -> tuple[list[int], EngineStats]:
        engine = AsyncEngine(lambda: open_engine(kv_offload_memory=10**7))
        engine.wait_until_ready(60)
        stream = await engine.submit(EngineRequest(prompt, GREEDY))
        tokens = [token async for event in stream for token in event.token_ids]
        stats = engine.stats()
        await asyncio.to_thread(engine.close)
        return tokens, stats

    tokens, stats = asyncio.run(ask(PROMPTS[0]))
    assert (tokens, stats.cached_tokens) == (EXPECTED[0], 0)
    tokens, stats = asyncio.run(ask(PROMPTS[0]))
    assert (tokens, stats.cached_tokens) == (EXPECTED[0], 96)
    assert stats.offload.restores == 1
