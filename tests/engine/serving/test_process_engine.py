"""An engine in a process of its own: its messages, and the ends of both processes."""

from __future__ import annotations

import asyncio
import logging
import os
import pickle
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import suppress
from functools import partial
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import openai
import pytest
import requests

import modelpack
from modelpack import errors as toolkit_errors
from modelpack.errors import ModelpackError
from modelpack.operations.package import PackageRequest
from modelpack.store.layout import LayoutStore
from modelpack_engine import errors as engine_errors
from modelpack_engine import process_engine
from modelpack_engine.async_engine import (
    Add,
    AddAdapter,
    AsyncEngine,
    Change,
    EngineClient,
    EngineState,
    RemoveAdapter,
)
from modelpack_engine.config import EngineConfig
from modelpack_engine.engine import Engine
from modelpack_engine.errors import (
    ContextLengthError,
    EngineError,
    LoadCancelledError,
    ModelLoadError,
    OutOfMemoryError,
    QueueFullError,
    RequestError,
    RetryLaterError,
)
from modelpack_engine.models.load_budget import LoadBudget, applied
from modelpack_engine.models.load_progress import LoadProgress, watched
from modelpack_engine.outputs import (
    EngineStats,
    FinishReason,
    RequestEvent,
    Timing,
    TokenLogprob,
    Usage,
)
from modelpack_engine.process_engine import ProcessEngine, _EngineProcess
from modelpack_engine.request import EngineRequest, SamplingParams
from modelpack_server.api.app import ModelServer
from modelpack_server.conversation.masks import make_masks, text_mask
from modelpack_server.conversation.served_model import ServedModel
from modelpack_server.conversation.spec import ChatSpec
from modelpack_server.pool.pool import ModelPool
from modelpack_server.pool.store_catalogue import StoreCatalogue
from modelpack_server.structured_output import Constraint
from modelpack_server.tool_parsers.families import find_format
from tests.engine.scripted import ScriptedEngine
from tests.engine.serving import process_engines
from tests.engine.serving.process_engines import breaks, dies, hangs, logs, refuses
from tests.engine.serving.test_api import pinned, wait_until_ready
from tests.engine.serving.tiny import (
    TEMPLATE,
    TinyCatalogue,
    chat_engine,
    tiny_engine,
    tiny_tokenizer,
    write_tiny,
)

PATIENCE = 300.0
LONG = SamplingParams(max_tokens=200, temperature=0, ignore_eos=True)


# What crosses the connection


def subclasses(kind: type[ModelpackError]) -> Iterator[type[ModelpackError]]:
    yield kind
    for each in kind.__subclasses__():
        yield from subclasses(each)


PACKAGES = (toolkit_errors.__name__, engine_errors.__name__)
KINDS = sorted(
    {kind for kind in subclasses(ModelpackError) if kind.__module__ in PACKAGES},
    key=lambda kind: kind.__name__,
)


@pytest.mark.parametrize("kind", KINDS)
def test_errors_keep_their_class_and_attributes(kind: type[ModelpackError]) -> None:
    needed = {"retry_after": 3.0} if issubclass(kind, RetryLaterError) else {}
    error = kind("it failed", hint="do this", **needed)  # type: ignore[call-arg, arg-type]
    found = pickle.loads(process_engine._dumped(error))
    assert type(found) is kind
    assert (str(found), vars(found)) == (str(error), vars(error))
    assert vars(found)["hint"] == "do this"


def test_there_are_errors() -> None:
    assert {EngineError, QueueFullError, ContextLengthError} < set(KINDS)


ENTRY = TokenLogprob(7, -0.5, ((7, -0.5), (8, -1.5)), b"a")
EVENTS = [
    RequestEvent("request-1", 0, (5,), "a"),
    RequestEvent("request-1", 3, (5, 6), ""),
    RequestEvent("request-1", 0, (5,), "a", cached_tokens=0),
    RequestEvent("request-1", 0, (7,), "a", (ENTRY,)),
    RequestEvent("request-1", 0, (), "", None, (None, ENTRY)),
    RequestEvent("request-1", 0, (), "", finish_reason=FinishReason.STOP, stop_reason="end",
                 usage=Usage(3, 4, 1), timing=Timing(1.0, 2.0, None, 4.0)),
    RequestEvent("request-1", 0, (), "", finish_reason=FinishReason.ERROR, error="it failed",
                 error_param="stop"),
]  # fmt: skip


@pytest.mark.parametrize("event", EVENTS)
def test_events_are_equal(event: RequestEvent) -> None:
    fields = pickle.loads(pickle.dumps(process_engine._fields(event)))
    assert RequestEvent(*fields) == event


def test_a_tokenizer_is_equal() -> None:
    made = chat_engine().tokenizer
    made.strips_leading_space = True
    found = pickle.loads(process_engine._dumped(made, to_server=True))
    assert found is not made
    assert found.encode("über <eos>") == made.encode("über <eos>")
    assert found.eos_token_ids == made.eos_token_ids
    assert found.strips_leading_space
    assert found.chat_template == TEMPLATE
    assert [found.token_bytes(at) for at in range(257)] == [
        made.token_bytes(at) for at in range(257)
    ]


def walked(make: Callable[[], Any], text: bytes) -> list[bytes | None]:
    """Return what a mask allows before each byte of a text, and after it."""
    mask, tokens = make(), tiny_tokenizer()
    found = [mask.allowed()]
    for token_id in tokens.encode(text.decode()):
        mask.accept(token_id)
        found.append(mask.allowed())
    return found


@pytest.mark.parametrize("budget", [None, 2])
def test_masks_are_made_again_of_the_engines_tokenizer(
    monkeypatch: pytest.MonkeyPatch, budget: int | None
) -> None:
    engine = ScriptedEngine()
    model = ServedModel("m", engine)
    constraint = Constraint("regex", "ab*c")
    if budget is None:
        make = text_mask(model, constraint)
        text = b"abb"
    else:
        spec = ChatSpec([], SamplingParams(), constraint=constraint, reasoning_budget=budget)
        made = make_masks(model, spec, find_format("<think></think>"), (), starts_reasoning=True)
        assert made is not None
        make, text = made, b"xy</think>ab"
    data = process_engine._dumped(EngineRequest([1], SamplingParams(mask=make)))
    theirs = tiny_tokenizer()
    monkeypatch.setattr(process_engine, "_tokenizer", theirs)
    found = pickle.loads(data).params.mask
    assert found is not None
    expected = walked(make, text)
    assert len(set(expected)) > 1
    assert walked(found, text) == expected


def test_the_bytes_of_a_request_are_pickled_once() -> None:
    pixels = b"\0" * (1 << 20)
    mask: Any = partial(walked, pixels)
    request = EngineRequest([1], SamplingParams(mask=mask))
    head, body = process_engine._messages(Add("request-1", request, print), 0)
    assert pickle.loads(head) == ("add", "request-1", True)
    assert pixels in body
    assert len(head) < 100


# The process's end, in this process


@pytest.fixture
def ends() -> Iterator[tuple[Connection, _EngineProcess]]:
    """The server's end of a connection, and the process's."""
    ours, theirs = Pipe()
    with ours, theirs:
        process = _EngineProcess(theirs)
        process._has_ended.set()
        yield ours, process


class _Calls:
    """Calls a function when it is unpickled."""

    def __init__(self, function: Callable[..., object], *arguments: object) -> None:
        self._reduced = function, arguments

    def __reduce__(self) -> Any:
        return self._reduced


def test_a_message_that_cannot_be_read_ends_the_process(
    ends: tuple[Connection, _EngineProcess], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise the engine would go on, and no request would get an answer."""
    codes: list[int] = []
    ours, process = ends
    monkeypatch.setattr(os, "_exit", codes.append)
    ours.send_bytes(pickle.dumps(("abort", _Calls(bytearray, 1 << 62))))
    process._read()
    kind, error = pickle.loads(ours.recv_bytes())
    assert (kind, str(error)) == ("failed", "the engine failed: MemoryError")
    assert codes == [1]
    assert process._calls.get() is None


_COMPILED = threading.Event()


def _compile() -> bool:
    return _COMPILED.wait(PATIENCE)


def test_a_change_of_adapters_waits_for_the_grammars_before_it(
    ends: tuple[Connection, _EngineProcess],
) -> None:
    """Other requests do not."""
    ours, process = ends
    reader = threading.Thread(target=process._read)
    reader.start()
    _COMPILED.clear()
    for data in (
        pickle.dumps(("add", "masked", True)), pickle.dumps(_Calls(_compile)),
        pickle.dumps(("change", 0, RemoveAdapter("x"))),
        pickle.dumps(("add", "plain", False)), pickle.dumps(0),
    ):  # fmt: skip
        ours.send_bytes(data)
    try:
        plain = process._calls.get(timeout=PATIENCE)
    finally:
        _COMPILED.set()
    masked, change = (process._calls.get(timeout=PATIENCE) for _ in range(2))
    ours.send_bytes(pickle.dumps(None))
    reader.join()
    assert isinstance(plain, Add)
    assert isinstance(masked, Add)
    assert isinstance(change, Change)
    assert (plain.request_id, masked.request_id) == ("plain", "masked")
    assert change.change == RemoveAdapter("x")


# The server's end, without a process


def test_unanswered_requests_wait_in_the_queue() -> None:
    engine = ProcessEngine.__new__(ProcessEngine)
    engine._stats = EngineStats(num_waiting=1)
    engine._facts = cast("Any", SimpleNamespace(max_waiting=3))
    engine._adds = {"request-1": print}
    engine.check_queue()
    engine._adds["request-2"] = print
    with pytest.raises(QueueFullError, match="3 sequences wait, the limit is 3"):
        engine.check_queue()


def test_an_adapter_whose_caller_was_cancelled_is_removed() -> None:
    """The engine may have added it already, or be about to."""
    changes: list[object] = []

    def change(one: object) -> Future[None]:
        changes.append(one)
        return Future()

    adapter: Any = object()
    client: Any = SimpleNamespace(change=change)

    async def cancel() -> None:
        adding = asyncio.create_task(EngineClient.add_adapter(client, "x", adapter, "id"))
        await asyncio.sleep(0)
        adding.cancel()
        with pytest.raises(asyncio.CancelledError):
            await adding

    asyncio.run(cancel())
    assert changes == [AddAdapter("x", adapter, "id"), RemoveAdapter("x")]


# The ends of the processes


def is_gone(pid: int) -> bool:
    """Wait until a process has ended, which need not be a child."""
    try:
        watched = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        return bool(select.select([watched], [], [], PATIENCE)[0])
    finally:
        os.close(watched)


async def tokens_of(engine: AsyncEngine | ProcessEngine, count: int) -> list[object]:
    """Return the tokens of concurrent requests, or their errors."""

    async def one(i: int) -> list[int]:
        prompt, params = [i, 2 * i, 3], SamplingParams(max_tokens=20, seed=i, ignore_eos=True)
        async with await engine.submit(EngineRequest(prompt, params, n=1 + i % 2)) as stream:
            tokens: dict[int, list[int]] = {}
            async for event in stream:
                tokens.setdefault(event.index, []).extend(event.token_ids)
        return [token for _, each in sorted(tokens.items()) for token in each]

    return list(await asyncio.gather(*map(one, range(count)), return_exceptions=True))


@pytest.mark.long
def test_streams_have_the_tokens_of_an_engine_in_this_process() -> None:
    found = []
    for kind in (AsyncEngine, ProcessEngine):
        engine = kind(tiny_engine)
        engine.wait_until_ready(PATIENCE)
        try:
            found.append(asyncio.run(tokens_of(engine, 40)))
            assert engine.stats().num_finished == 60
            assert engine.meter.finished["length"] == 60
        finally:
            engine.close()
        assert not engine._streams
        assert not engine._running_choices
        assert engine.stats().generated_tokens == 60 * 20
    assert found[0] == found[1]
    assert all(isinstance(tokens, list) and len(tokens) >= 20 for tokens in found[0])
    assert isinstance(engine, ProcessEngine)
    assert is_gone(engine.pid)


@pytest.mark.long
def test_all_streams_fail_if_the_process_is_killed() -> None:
    engine = ProcessEngine(tiny_engine)
    engine.wait_until_ready(PATIENCE)
    reason = "the engine's process was killed by the signal SIGKILL"

    async def read(i: int) -> str:
        async with await engine.submit(EngineRequest([i], LONG)) as stream:
            async for _ in stream:
                kill_if_there(engine.pid)
        return "ended"

    async def run() -> list[object]:
        found = await asyncio.gather(*map(read, range(64)), return_exceptions=True)
        with pytest.raises(EngineError, match="the engine is failed"):
            await engine.submit(EngineRequest([1], LONG))
        with pytest.raises(EngineError, match="the engine is failed"):
            await engine.remove_adapter("x")
        return list(found)

    found = asyncio.run(run())
    failed = [error for error in found if isinstance(error, EngineError)]
    assert len(failed) > 32  # at most eight run at a time, so they cannot have ended before
    assert {str(error) for error in failed} == {reason}
    assert engine.state is EngineState.FAILED
    assert engine.failure == reason
    engine.close()
    assert engine.stats().num_running == 0
    assert not engine._streams


def kill_if_there(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return


@pytest.mark.long
@pytest.mark.parametrize(
    ("make_engine", "kind", "reason", "hint"),
    [
        (refuses, OutOfMemoryError, "the weights do not fit", "free memory"),
        (breaks, EngineError, "no such weights", None),
        (dies, ModelLoadError, "the engine's process ended with the exit status 3", None),
    ],
)
def test_a_load_that_fails(
    make_engine: Callable[[], Engine],
    kind: type[EngineError],
    reason: str,
    hint: str | None,
) -> None:
    engine = ProcessEngine(make_engine)
    with pytest.raises(EngineError, match=reason):
        engine.wait_until_ready(PATIENCE)
    assert engine.state is EngineState.FAILED
    assert type(engine.error) is kind
    assert (str(engine.error), engine.error.hint) == (reason, hint)  # type: ignore[union-attr]
    engine.close()
    assert is_gone(engine.pid)


def test_a_process_that_cannot_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    with pytest.raises(ModelLoadError, match=r"the engine.s process cannot start: .*/nowhere/"):
        ProcessEngine(hangs)


@pytest.mark.long
def test_a_load_for_which_nobody_waits_ends_the_process() -> None:
    budget = LoadBudget()
    engine = ProcessEngine(hangs)
    budget.cancel()
    with applied(budget), pytest.raises(LoadCancelledError):
        engine.wait_until_ready(PATIENCE)
    engine.close()
    assert engine.state is EngineState.STOPPED
    assert is_gone(engine.pid)


class _Fails:
    """Cannot be pickled; records the threads that try."""

    def __init__(self, threads: list[int]) -> None:
        self._threads = threads

    def __reduce__(self) -> Any:
        self._threads.append(threading.get_ident())
        raise ValueError("it has no bytes")


@pytest.mark.long
def test_logs_and_progress_reach_the_server(caplog: pytest.LogCaptureFixture) -> None:
    progress: list[LoadProgress] = []
    with watched(progress.append), caplog.at_level(logging.INFO, "modelpack_engine"):
        engine = ProcessEngine(logs)
        engine.wait_until_ready(PATIENCE)
        pickled_by: list[int] = []
        mask: Any = partial(int, _Fails(pickled_by))
        with pytest.raises(EngineError, match="cannot be sent to the engine: it has no bytes"):
            asyncio.run(engine.submit(EngineRequest([1], SamplingParams(mask=mask))))
        assert pickled_by
        assert threading.get_ident() not in pickled_by  # it has an event loop
        with pytest.raises(RequestError, match="the model is loaded without LoRA adapters"):
            asyncio.run(engine.remove_adapter("x"))
        engine.close()
    assert progress == [LoadProgress(0, Path(process_engines.__file__).stat().st_size)]
    records = [each for each in caplog.records if each.name == "modelpack_engine.test"]
    assert [(each.levelname, each.getMessage()) for each in records] == [
        ("WARNING", "loading slowly")
    ]


SERVER = """
import sys
from modelpack_engine.process_engine import ProcessEngine
from tests.engine.serving.process_engines import hangs, logs
engine = ProcessEngine(globals()[sys.argv[1]])
if sys.argv[1] == "logs":
    engine.wait_until_ready()
print(engine.pid, flush=True)
sys.stdin.read()
"""


@pytest.mark.long
@pytest.mark.parametrize("make_engine", ["logs", "hangs"])
def test_the_process_ends_when_the_server_is_killed(make_engine: str) -> None:
    root = Path(__file__).parents[3]
    with subprocess.Popen(
        [sys.executable, "-c", SERVER, make_engine],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=root,
        env=os.environ | {"PYTHONPATH": str(root)},
    ) as server:  # fmt: skip
        assert server.stdout is not None
        pid = int(server.stdout.readline())
        os.kill(pid, signal.SIGTERM)  # a service manager signals both; only the server decides
        os.kill(pid, signal.SIGINT)
        os.kill(pid, 0)
        server.kill()
    assert is_gone(pid)


@pytest.mark.long
def test_only_the_process_has_its_connection() -> None:
    """A second engine inherits no descriptor of the first, whose end the first then detects."""
    engines = [ProcessEngine(hangs), ProcessEngine(hangs)]
    ours = engines[0]._connection.fileno()
    assert not os.get_inheritable(ours)
    names = [socket_names(engine.pid) for engine in engines]
    assert not names[0] & names[1]
    assert os.readlink(f"/proc/self/fd/{ours}") not in names[0] | names[1]
    for engine in engines:
        engine.close()
        assert is_gone(engine.pid)


def socket_names(pid: int) -> set[str]:
    """Return the sockets that a process holds, by their inodes."""
    links = set()
    for path in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(FileNotFoundError):  # a process that starts opens and closes files
            links.add(os.readlink(path))
    return {link for link in links if link.startswith("socket:")}


# Behind the server


@pytest.mark.long
def test_a_killed_engine_is_told_and_loaded_again() -> None:
    catalogue = TinyCatalogue(client=ProcessEngine)
    body = {"model": "tiny", "prompt": "a", "max_tokens": 4, "ignore_eos": True}
    with ModelServer(lambda: pinned(catalogue), address="127.0.0.1:0") as server:
        wait_until_ready(server.url)
        first = catalogue.engines[0]
        assert isinstance(first, ProcessEngine)
        os.kill(first.pid, signal.SIGKILL)
        first._reader.join(PATIENCE)
        health = requests.get(f"{server.url}/health", timeout=60)
        assert health.status_code == 503
        assert health.json()["error"]["message"] == (
            "the model tiny is loaded again: the engine's process was killed by the signal SIGKILL"
        )
        wait_until_ready(server.url)
        assert len(catalogue.engines) == 2
        answer = requests.post(f"{server.url}/v1/completions", json=body, timeout=60)
        assert answer.json()["usage"]["completion_tokens"] == 4
        metrics = requests.get(f"{server.url}/metrics", timeout=60).text
        assert 'vllm:num_requests_running{engine="0",model_name="tiny"} 0.0' in metrics
    second = catalogue.engines[1]
    assert isinstance(second, ProcessEngine)
    assert is_gone(second.pid)


def test_counters_outlive_the_engine() -> None:
    """Those of `/metrics` are the sums of all engines of a model."""

    async def use() -> list[int]:
        pool = ModelPool(TinyCatalogue(), grace=0)
        found = []
        for _ in range(2):
            async with pool.lease("tiny") as model:
                request = EngineRequest([1, 2], SamplingParams(max_tokens=4, ignore_eos=True))
                async with await model.submit(request) as stream:
                    [*_] = [event async for event in stream]
            await pool.unload()
            found.append(pool.entries()[0].stats().generated_tokens)
        await pool.close()
        return found

    assert asyncio.run(use()) == [4, 8]


CONFIG = EngineConfig(device="cpu", max_num_seqs=2, max_num_batched_tokens=32, kv_cache_bytes=2**20)
SCHEMA = {
    "type": "object",
    "properties": {"a": {"enum": [1, 2]}, "b": {"type": "boolean"}},
    "required": ["a", "b"],
    "additionalProperties": False,
}


def add_pool(pools: list[ModelPool], catalogue: StoreCatalogue) -> ModelPool:
    pools.append(ModelPool(catalogue, memory=2**30))
    return pools[-1]


@pytest.mark.long
def test_stored_models_answer_alike(tmp_path: Path) -> None:
    """Chats, a grammar, log-probabilities and a stop string; then the model is unloaded."""
    store = LayoutStore(tmp_path / "store")
    files = write_tiny(tmp_path / "files", temperature=0.0)
    modelpack.package("ai/tiny", PackageRequest(safetensors_dir=files), store=store)
    messages: Any = [{"role": "user", "content": "hello"}]
    structured: Any = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}
    found = []
    for engine_process in (False, True):
        catalogue = StoreCatalogue(store, CONFIG, engine_process=engine_process)
        pools: list[ModelPool] = []
        with ModelServer(partial(add_pool, pools, catalogue), address="127.0.0.1:0") as server:
            with openai.OpenAI(base_url=f"{server.url}/v1", api_key="x", timeout=300) as client:
                chat = client.chat.completions.create
                answers = [
                    chat(model="tiny", messages=messages, max_tokens=12),
                    chat(model="tiny", messages=messages, max_tokens=40,
                         response_format=structured),
                    chat(model="tiny", messages=messages, max_tokens=4, logprobs=True,
                         top_logprobs=3),
                ]  # fmt: skip
                first = answers[0].choices[0].message.content or ""
                answers.append(
                    chat(model="tiny", messages=messages, max_tokens=12, stop=first[3:5])
                )
                found.append([each.choices[0].model_dump() for each in answers])
                with pytest.raises(openai.BadRequestError, match="cannot be compiled"):
                    chat(
                        model="tiny", messages=messages,
                        response_format={"type": "json_schema", "json_schema": {
                            "name": "x", "schema": {"type": "nothing"}}},  # type: ignore[typeddict-item]
                    )  # fmt: skip
            [entry] = pools[0].entries()
            assert isinstance(entry.engine, ProcessEngine if engine_process else AsyncEngine)
            pid = entry.engine.pid if isinstance(entry.engine, ProcessEngine) else 0
            asked = {"model": "tiny", "keep_alive": 0}
            requests.post(f"{server.url}/api/generate", json=asked, timeout=60).raise_for_status()
            assert not pid or is_gone(pid)
    assert found[0] == found[1]
    assert found[0][3]["finish_reason"] == "stop"
    assert '"a"' in found[0][1]["message"]["content"]
