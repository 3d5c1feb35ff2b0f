"""Prefixes of every kind of model are restored after a restart, and little is computed again."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx_lm.generate import generate_step
from mlx_lm.models.cache import make_prompt_cache

from modelpack_engine.engine import Engine
from modelpack_engine.request import EngineRequest
from modelpack_engine.runner import model_layout
from tests.engine.offload.turns import (
    BLOCK,
    FIRST,
    GREEDY,
    MODELS,
    NEXT,
    answer,
    open_turn_engine,
)
from tests.engine.zoo.configuration import VOCABULARY

pytestmark = pytest.mark.long

#: Sliding windows in some layers and in all, latents, and every kind of recurrent layer.
NAMES = (
    "gemma3_text", "gpt_oss", "deepseek_v3", "deepseek_v32", "recurrent_gemma", "qwen3_next",
    "nemotron_h", "kimi_linear", "bailing_hybrid", "lfm2", "baichuan_m1", "gear", "mamba", "mamba2",
    "rwkv7", "jamba",
)  # fmt: skip
#: Those whose sliding layers have blocks of their own.
MIXED = ("gemma3_text", "gpt_oss", "baichuan_m1", "gear")

_rng = random.Random(4)
OTHERS = [[_rng.randrange(1, VOCABULARY) for _ in range(100)] for _ in range(4)]

Open = Callable[..., Engine]


@pytest.fixture(scope="module", params=NAMES)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def model(name: str) -> nn.Module:
    return MODELS[name].build()


@pytest.fixture
def open_engine(model: nn.Module, tmp_path: Path) -> Iterator[Open]:
    """Opens engines of one model with the same directory, one after the other."""
    engines: list[Engine] = []

    def opened(**settings: object) -> Engine:
        for engine in engines:
            engine.close()
        engines.clear()
        given = {"kv_offload_dir": str(tmp_path / "kv")} | settings
        engines.append(open_turn_engine(model, **given))
        return engines[-1]

    yield opened
    for engine in engines:
        engine.close()


def expected(model: nn.Module, prompt: list[int], max_tokens: int = 6) -> list[int]:
    """Return mlx-lm's tokens for a prompt."""
    cache = make_prompt_cache(model)
    steps = generate_step(mx.array(prompt), model, max_tokens=max_tokens, prompt_cache=cache)
    return [int(token) for token, _ in steps]


def test_a_second_turn_after_a_restart(open_engine: Open, model: nn.Module) -> None:
    answers = [expected(model, FIRST)]
    second = FIRST + answers[0] + NEXT
    answers.append(expected(model, second))
    assert answer(open_engine(), FIRST) == (answers[0], 150)
    tokens, computed = answer(again := open_engine(), second)
    assert (tokens, computed) == (answers[1], len(second) - 150 // BLOCK * BLOCK)
    assert again.stats().offload.disk_hits > 0
    assert again.stats().blocks_used == 0
    assert answer(again, second) == (answers[1], (len(second) - 1) % BLOCK + 1)


def test_a_second_turn_after_a_long_reply(
    open_engine: Open, name: str, model: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At most one interval between two snapshots is computed again; by turns after a restart."""
    restart = NAMES.index(name) % 2 == 0
    monkeypatch.setattr(model_layout, "_SHORTEST_INTERVAL", 48)
    monkeypatch.setattr(model_layout, "_LONGEST_INTERVAL", 48)
    reply = expected(model, FIRST, 100)
    second = FIRST + reply + NEXT
    engine = open_engine()
    assert answer(engine, FIRST, 100) == (reply, 150)
    tokens, computed = answer(open_engine() if restart else engine, second)
    assert tokens == expected(model, second)
    recurrent = engine._blocks.snapshots is not None
    known = (150 + 100 - 1) // (48 if recurrent else BLOCK) * (48 if recurrent else BLOCK)
    assert computed == len(second) - known


def test_a_second_turn_after_others(open_engine: Open, model: nn.Module) -> None:
    """The prefix was evicted to memory by other prompts."""
    engine = open_engine(kv_offload_dir=None, kv_offload_memory=10**8)
    small = 14 * BLOCK * max(engine.kv_cache_bytes // engine.stats().blocks_total // BLOCK, 1)
    engine = open_engine(
        kv_offload_dir=None, kv_offload_memory=10**8, kv_cache_bytes=small, max_model_len=200
    )
    answers = [expected(model, FIRST)]
    second = FIRST + answers[0] + NEXT
    answers.append(expected(model, second))
    assert answer(engine, FIRST) == (answers[0], 150)
    for prompt in OTHERS:
        answer(engine, prompt)
    tokens, computed = answer(engine, second)
    assert (tokens, computed) == (answers[1], len(second) - 150 // BLOCK * BLOCK)


@pytest.mark.parametrize("name", ["gemma3_text", "deepseek_v3"], indirect=True)
def test_blocks_of_an_aborted_prompt_are_saved_before_they_are_scrubbed(
    open_engine: Open, model: nn.Module
) -> None:
    """They may hold NaN, or a prefix that others know."""
    engine = open_engine(kv_offload_dir=None, kv_offload_memory=10**8)
    small = 20 * BLOCK * max(engine.kv_cache_bytes // engine.stats().blocks_total // BLOCK, 1)
    engine = open_engine(
        kv_offload_dir=None, kv_offload_memory=10**8, kv_cache_bytes=small, max_model_len=300
    )
    answers = expected(model, FIRST)
    assert answer(engine, FIRST) == (answers, 150)
    engine.add_request("aborted", EngineRequest(FIRST + OTHERS[0], GREEDY))
    engine.step()
    engine.abort("aborted")
    for prompt in OTHERS * 2:
        answer(engine, prompt[::-1] + prompt)
    assert answer(engine, FIRST)[0] == answers
    assert engine.stats().offload.restored_tokens > 0


def test_files_that_are_damaged_cost_time_only(
    open_engine: Open, model: nn.Module, tmp_path: Path
) -> None:
    tokens = expected(model, FIRST)
    answer(open_engine(), FIRST)
    for seed in range(3):
        open_engine(kv_offload_dir=None)  # closes the last one
        files = sorted((tmp_path / "kv").rglob("*.kv"))
        for path in random.Random(seed).sample(files, len(files) // 4 + 1):
            path.write_bytes(path.read_bytes()[:-1])
        again = open_engine()
        assert answer(again, FIRST)[0] == tokens
        assert again.stats().blocks_used == 0


@pytest.mark.parametrize("name", MIXED, indirect=True)
def test_sliding_layers_release_their_blocks(open_engine: Open, model: nn.Module) -> None:
    """With an offload too, a request holds only those of the window."""
    engine = open_engine(kv_offload_dir=None, kv_offload_memory=10**8, max_num_batched_tokens=32)
    (pool,) = engine._blocks.window_pools
    assert pool.window is not None
    most = engine._blocks.most_held(32, pool)
    assert most is not None
    tokens = expected(model, FIRST)
    engine.add_request("r", EngineRequest(FIRST, GREEDY))
    held = []
    while engine.has_work:
        engine.step()
        held.append(pool.num_used)
    assert 0 < max(held) <= most < len(FIRST) // BLOCK
    assert answer(engine, FIRST) == (tokens, len(FIRST) % BLOCK)


@pytest.mark.parametrize("name", MIXED, indirect=True)
def test_files_of_other_layers_are_dropped(
    open_engine: Open, model: nn.Module, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Blocks of sliding and full layers may have the same length."""
    tokens = expected(model, FIRST)
    answer(open_engine(), FIRST)
    open_engine(kv_offload_dir=None)
    files = sorted((tmp_path / "kv").rglob("*.kv"))
    contents = [path.read_bytes() for path in files]
    for path, content in zip(files, [*contents[1:], contents[0]], strict=True):
        path.write_bytes(content)
    again = open_engine()
    assert answer(again, FIRST) == (tokens, len(FIRST))
    assert again.stats().offload.dropped_files > 0
    assert "the header is that of another block" in caplog.text


@pytest.mark.parametrize("name", MIXED[:1], indirect=True)
def test_a_size_is_named_once(
    open_engine: Open, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The blocks of both groups of layers have the same size in this model."""
    answer(open_engine(), FIRST)
    open_engine(kv_offload_dir=None)
    for path in (tmp_path / "kv").rglob("*.kv"):
        path.write_bytes(b"torn")
    answer(open_engine(), FIRST)
    assert re.search(r": 4 bytes, expected \d+$", caplog.text, re.MULTILINE)


@pytest.mark.parametrize("name", MIXED, indirect=True)
def test_files_within_a_small_limit(open_engine: Open, model: nn.Module, tmp_path: Path) -> None:
    """At shutdown, sliding layers leave room for the blocks of full layers."""
    answer(open_engine(), FIRST)
    open_engine(kv_offload_dir=None)
    total = sum(path.stat().st_size for path in (tmp_path / "kv").rglob("*.kv"))
    for path in (tmp_path / "kv").rglob("*.kv"):
        path.unlink()
    answer(open_engine(kv_offload_disk=2 * total), FIRST)
    for prompt in OTHERS:
        answer(open_engine(kv_offload_disk=2 * total), prompt)
    open_engine(kv_offload_dir=None)
    sizes = [path.stat().st_size for path in (tmp_path / "kv").rglob("*.kv")]
    assert total < sum(sizes) <= 2 * total
    assert answer(open_engine(), OTHERS[-1]) == (
        expected(model, OTHERS[-1]),
        (len(OTHERS[-1]) - 1) % BLOCK + 1,
    )
