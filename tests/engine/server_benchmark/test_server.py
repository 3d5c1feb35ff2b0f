"""The benchmark client with correct and incorrect servers."""

from __future__ import annotations

import asyncio
import itertools
import socket
from typing import Any

import pytest

from modelpack.errors import (
    AuthError,
    ModelpackError,
    NotFoundError,
    RemoteUnavailableError,
    UsageError,
)
from modelpack_server.bench.benchmark import run_load
from modelpack_server.bench.server import (
    Answer,
    AnswerError,
    OpenAIServer,
    Served,
    api_root,
    text_of,
)
from modelpack_server.bench.workloads import Session, Turn, Workload, single_turns
from tests.engine.server_benchmark.misbehaving import DONE, GOOD, Misbehaving, chunk, running

HELLO = [{"role": "user", "content": "hello"}]


def ask(server: Misbehaving, **settings: Any) -> Answer:
    async def talk(url: str) -> Answer:
        ticks = itertools.count()
        async with OpenAIServer(url, model="m", clock=lambda: float(next(ticks)), **settings) as it:
            return await it.ask(HELLO, 4)

    server.models = ("m",)
    with running(server) as url:
        # `ask` without `open`: the model is given, so no request is needed to find it.
        return asyncio.run(talk(url))


def open_server(server: Misbehaving, **settings: Any) -> Served:
    async def talk(url: str) -> Served:
        async with OpenAIServer(url, **settings) as it:
            return await it.open()

    with running(server) as url:
        return asyncio.run(talk(url))


def test_an_answer() -> None:
    answer = ask(Misbehaving())
    assert answer.times == [0.0, 1.0, 2.0]
    assert "".join(answer.text) == "a b c"
    assert (answer.prompt_tokens, answer.completion_tokens, answer.cached_tokens) == (17, 5, 3)


@pytest.mark.parametrize("delta", ["reasoning_content", "reasoning", "tool_calls"])
def test_what_is_no_text_counts(delta: str) -> None:
    event = b'data: {"choices": [{"delta": {"%s": "x"}}]}\r\n\r\n' % delta.encode()
    answer = ask(Misbehaving((event, b": a comment\n\n", event, chunk(finish="stop"))))
    assert len(answer.times) == 2
    assert answer.completion_tokens is None


@pytest.mark.parametrize(
    ("stream", "says"),
    [
        ((chunk("a"),), "incomplete stream"),
        ((), "incomplete stream"),
        ((chunk(finish="stop"), DONE), "empty response"),
        ((b"data: {oops\n\n",), "not a chunk"),
        ((b"data: [1]\n\n",), "not a chunk"),
        ((b'data: {"choices": [7]}\n\n',), "not a chunk"),
        ((chunk("a"), b'data: {"usage": {"prompt_tokens": null}}\n\n'), "not a chunk"),
        ((chunk("a"), b'data: {"error": {"message": "out of memory"}}\n\n'), "out of memory"),
    ],
)
def test_streams_that_go_wrong(stream: tuple[bytes, ...], says: str) -> None:
    with pytest.raises(AnswerError, match=says):
        ask(Misbehaving(stream))


def test_a_server_that_falls_silent() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"

        async def talk() -> None:
            async with OpenAIServer(url, model="m", read_seconds=0.05) as server:
                await server.ask(HELLO, 4)

        with pytest.raises(AnswerError, match="timed out"):
            asyncio.run(talk())


def test_opening() -> None:
    served = open_server(Misbehaving())
    assert served == Served("m", {"server": "9.8"}, exact_lengths=True)


def test_a_server_without_ignore_eos() -> None:
    server = Misbehaving()
    server.refuses = {"ignore_eos"}
    assert not open_server(server).exact_lengths
    assert "ignore_eos" not in server.asked[0]


@pytest.mark.parametrize(
    ("models", "settings", "error", "says"),
    [
        (("a", "b"), {}, UsageError, "serves 2 models: a, b"),
        ((), {}, UsageError, "serves 0 models"),
        ({"models": []}, {}, ModelpackError, "did not return a list of models"),
        (("a",), {"model": "b"}, NotFoundError, "no model 'b': never heard of it"),
    ],
)
def test_models_that_cannot_be_chosen(
    models: object, settings: dict[str, Any], error: type[ModelpackError], says: str
) -> None:
    with pytest.raises(error, match=says) as raised:
        open_server(Misbehaving(models=models), **settings)
    assert raised.value.hint


def test_keys() -> None:
    server = Misbehaving()
    server.key = "secret"
    assert open_server(server, api_key="secret").model == "m"
    with pytest.raises(AuthError, match="401, no key"):
        open_server(server, model="m")


def test_a_server_that_fails() -> None:
    server = Misbehaving()
    server.statuses = [(500, {"detail": "no weights"})]
    with pytest.raises(ModelpackError, match="HTTP 500, no weights"):
        open_server(server)


@pytest.mark.parametrize("model", [None, "m"])
def test_no_server(model: str | None) -> None:
    async def talk() -> None:
        async with OpenAIServer("http://127.0.0.1:9", model=model) as server:
            await server.open()

    with pytest.raises(RemoteUnavailableError, match="no response from"):
        asyncio.run(talk())


@pytest.mark.parametrize(
    ("url", "root"),
    [
        ("http://h:1", "http://h:1/v1"),
        ("http://h:1/", "http://h:1/v1"),
        ("http://h/v1", "http://h/v1"),
        ("https://h/api/v1/chat/completions", "https://h/api/v1"),
        ("http://h/engines", "http://h/engines/v1"),
    ],
)
def test_addresses(url: str, root: str) -> None:
    assert api_root(url) == root


@pytest.mark.parametrize("url", ["ftp://h", "http://", "h:80", "http://user:word@h"])
def test_what_is_no_address(url: str) -> None:
    with pytest.raises(UsageError) as raised:
        api_root(url)
    assert "word" not in str(raised.value).replace("password", "")


def load(server: Misbehaving, workload: Workload, **settings: Any) -> Any:
    async def talk(url: str) -> Any:
        async with OpenAIServer(url, model="m") as it:
            return await run_load(it, workload, **settings)

    with running(server) as url:
        return asyncio.run(talk(url))


def test_errors_are_counted_and_the_rest_measured() -> None:
    server = Misbehaving(GOOD, (chunk("a"),), GOOD, (b"data: 1\n\n",), (chunk("x"),))
    server.statuses = [(503, {})]
    report = load(server, single_turns("w", [(4, 3)] * 6).limited(1))
    assert (report.requests, report.failed) == (6, 4)
    assert report.errors == {
        "incomplete stream": 2,
        "HTTP 503": 1,
        "invalid event: not a chunk of a chat completion": 1,
    }
    assert (report.prompt_tokens, report.output_tokens, report.cached_tokens) == (34, 10, 6)
    assert set(report.ttft) == {"mean", "p50", "p90", "p99"}


def test_nothing_but_errors() -> None:
    report = load(Misbehaving(()), single_turns("w", [(4, 3)] * 2))
    assert (report.failed, report.output_rate, report.ttft) == (2, 0.0, {})


def test_turns_hold_what_was_said() -> None:
    server = Misbehaving()
    turns = (Turn((1, 2, 3), 5), Turn((4,), 6))
    report = load(server, Workload("w", (Session(turns, label="talk"),)))
    first, second = server.asked
    assert [m["content"] for m in first["messages"]] == [text_of((1, 2, 3))]
    assert [m["content"] for m in second["messages"]] == [
        text_of((1, 2, 3)),
        "a b c",
        text_of((4,)),
    ]
    assert (first["max_tokens"], second["max_tokens"]) == (5, 6)
    assert (report.requests, report.extra["labels"]["talk"]["ttft_s"] != {}) == (2, True)


def test_arrivals_are_waited_for() -> None:
    sessions = tuple(Session((Turn((1,), 2),), arrival) for arrival in (0.0, 0.05))
    assert load(Misbehaving(), Workload("w", sessions)).duration >= 0.05


def test_nothing_begins_after_the_seconds() -> None:
    """Measure with a clock that advances one second at each reading."""
    ticks = itertools.count()
    workload = single_turns("w", [(1, 1)] * 20).limited(1)
    report = load(Misbehaving(), workload, seconds=10, clock=lambda: float(next(ticks)))
    assert 1 < report.requests < 10
    assert report.failed == 0


def test_words_keep_lengths_and_prefixes() -> None:
    assert len(text_of(range(100)).split()) == 100
    assert text_of((1, 2, 9)).split()[:2] == text_of((1, 2, 4)).split()[:2]
