"""`modelpack run --host` uses a running server and loads no model."""

from __future__ import annotations

import asyncio
import io
import json
import time
from collections.abc import Iterator
from contextlib import aclosing

import pytest
import requests
from starlette.types import Receive, Scope, Send

from modelpack.errors import ModelpackError, NotFoundError
from modelpack.http.listener import AppServer
from modelpack_engine.outputs import FinishReason
from modelpack_server.api.app import ModelServer
from modelpack_server.cli.client import find_target
from modelpack_server.conversation.spec import ChatDelta
from modelpack_server.pool.pool import ModelPool
from modelpack_server.repl.chat import RemoteChat, RemoteModel
from modelpack_server.tool_parsers.parts import Reasoning
from tests.cli.running import Result
from tests.cli.running import modelpack as run
from tests.engine.scripted import THINKING, ScriptedEngine
from tests.engine.serving.conftest import ScriptedCatalogue

pytestmark = pytest.mark.long


@pytest.fixture
def engine() -> ScriptedEngine:
    return ScriptedEngine(["hm", "</think>", "Pa", "ris"], template=THINKING)


@pytest.fixture
def url(engine: ScriptedEngine) -> Iterator[str]:
    catalogue = ScriptedCatalogue(engine)
    with ModelServer(
        lambda: ModelPool(catalogue, memory=100, grace=0.0), address="127.0.0.1:0"
    ) as server:
        yield server.url


@pytest.fixture(autouse=True)
def nothing_piped_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(""))


def ask(url: str, *arguments: str) -> Result:
    return run("run", "m", "France?", "--url", url, *arguments)


def test_an_answer(url: str, engine: ScriptedEngine) -> None:
    result = ask(url, "--temperature", "0.2", "--system", "Be brief.", "--max-tokens", "9")
    assert result.out == "Paris"
    assert engine.params.temperature == 0.2
    assert engine.params.max_tokens == 9
    assert engine.prompt == "system: Be brief.\nuser: France?\nassistant:<think>\n"
    assert ask(url, "--no-think").out.endswith("Paris")
    assert engine.prompt == "user: France?\nassistant:"


def test_json(url: str) -> None:
    answer = ask(url, "--json").json
    assert (answer["text"], answer["reasoning"], answer["finish_reason"]) == ("Paris", "hm", "stop")
    assert answer["completion_tokens"] == 4
    assert answer["prompt_tokens"] > 4
    assert answer["cached_tokens"] == 1


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["missing", "x"], 3),
        (["m", "x" * 5000], 2),
        (["m", "x", "--preset", "loud"], 2),
        (["m", "x", "--temperature", "9"], 2),
        (["m", "x", "--max-model-len", "64"], 2),
        (["m", "x", "--no-prefix-caching"], 2),
    ],
)
def test_what_is_refused(url: str, arguments: list[str], code: int) -> None:
    assert run("run", *arguments, "--url", url).code == code


def test_no_server() -> None:
    assert ask("http://127.0.0.1:9").code == 6


def chat(url: str) -> RemoteChat:
    return RemoteChat(RemoteModel(url, "m"))


async def read(chat: RemoteChat, question: str, *, until: int | None = None) -> list[ChatDelta]:
    deltas = []
    async with aclosing(chat.ask(question)) as answer:
        async for delta in answer:
            deltas.append(delta)
            if until is not None and sum(len(delta.parts) for delta in deltas) == until:
                break
    return deltas


def test_what_was_said_is_sent_again(url: str, engine: ScriptedEngine) -> None:
    talk = chat(url)
    deltas = asyncio.run(read(talk, "France?"))
    assert next(part for delta in deltas for part in delta.parts) == Reasoning("hm")
    assert talk.turns[1]["reasoning_content"] == "hm"
    asyncio.run(read(talk, "Italy?"))
    assert "user: France?\nassistant: Paris\nuser: Italy?\n" in engine.prompt


def test_an_answer_that_is_left_ends_on_the_server(url: str, engine: ScriptedEngine) -> None:
    engine.wait = asyncio.Event()  # no code sets the event
    engine.pieces = ["</think>begun", "never"]
    talk = chat(url)
    asyncio.run(read(talk, "Go on.", until=1))
    assert talk.turns[1]["content"] == "begun"
    deadline = time.monotonic() + 20
    while not engine.aborted:
        requests.get(f"{url}/version", timeout=20)
        assert time.monotonic() < deadline


def test_an_answer_that_fails(url: str, engine: ScriptedEngine) -> None:
    engine.ends = FinishReason.ERROR
    talk = chat(url)
    with pytest.raises(ModelpackError):
        asyncio.run(read(talk, "France?"))


@pytest.mark.parametrize(
    "event",
    ["no JSON", "5", '{"error": "x"}', '{"choices": [5]}', '{"choices": null}', '{"usage": {}}',
     '{"choices": [{"delta": {"content": 5}}]}', "[" * 100_000],
)  # fmt: skip
def test_a_server_that_sends_something_else(event: str) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": f"data: {event}\n\n".encode()})

    with (
        AppServer(lambda: app, "127.0.0.1:0", name="other server") as server,
        pytest.raises(ModelpackError, match="cannot read the response"),
    ):
        asyncio.run(read(chat(server.url), "France?"))


@pytest.fixture
def like_vllm() -> Iterator[str]:
    """A server that lists its models, and has no route for one of them and none of ours."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        found = scope["path"] == "/v1/models"
        listed = {"object": "list", "data": [{"id": "m", "root": "/m", "max_model_len": 256}]}
        body = json.dumps(listed if found else {"detail": "Not Found"}).encode()
        headers = [(b"content-type", b"application/json")]
        status = 200 if found else 404
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    with AppServer(lambda: app, "127.0.0.1:0", name="vllm") as server:
        yield server.url


def test_models_of_another_server(like_vllm: str) -> None:
    found = find_target(like_vllm, "m")
    assert (found.model, found.context) == ("m", 256)
    assert find_target(like_vllm, None) == found
    with pytest.raises(NotFoundError, match=r"no such model at .*: 'other'") as caught:
        find_target(like_vllm, "other")
    assert caught.value.hint == "choose one of m, or run modelpack pull other"


def test_ps_of_another_server(like_vllm: str) -> None:
    header, row = run("ps", "--url", like_vllm).out.splitlines()
    assert header.split()[:2] == ["MODEL", "NAME"]
    assert row.split() == ["m", "loaded", "256"]
    assert run("ps", "-q", "--url", like_vllm).out == "m"
    listed = json.loads(run("ps", "--json", "--url", like_vllm).out)
    assert listed["models"] == [{"name": "m", "context_size": 256}]
