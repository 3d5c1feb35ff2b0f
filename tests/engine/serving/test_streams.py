"""Between engines and clients: streams, meters, traces, logs, disconnects."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack
from typing import Any

import pytest
from starlette.testclient import TestClient
from starlette.types import Message

from modelpack_engine.async_engine import Abort, RequestStream
from modelpack_engine.core.metrics import Meter
from modelpack_engine.errors import EngineError
from modelpack_engine.outputs import FinishReason, RequestEvent, Timing, TokenLogprob, Usage
from modelpack_server.api.app import create_app
from modelpack_server.api.sse import LiveStream
from modelpack_server.api.system import LogBuffer
from modelpack_server.gateway.protection import Protection, protect
from modelpack_server.gateway.traces import Trace
from modelpack_server.pool.pool import ModelPool
from tests.engine.scripted import ScriptedEngine
from tests.engine.serving.conftest import Scripted, ScriptedCatalogue

CHAT = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}


def event(index: int, token: int, text: str, **more: Any) -> RequestEvent:
    logprobs = (TokenLogprob(token, -1.0),)
    return RequestEvent("r", index, (token,), text, logprobs=logprobs, **more)


def test_what_waits_comes_together() -> None:
    async def run() -> None:
        stream = RequestStream("r", 3, 2, lambda abort: None)
        for item in (
            event(0, 1, "a", prompt_logprobs=(None,)),
            event(1, 5, "x"),
            event(0, 2, "b"),
            event(0, 3, "c", finish_reason=FinishReason.STOP, stop_reason="c"),
        ):
            stream.put(item)
        stream.put(event(1, 6, "y", finish_reason=FinishReason.LENGTH))
        zero, one = [item async for item in stream]
        assert (zero.text, zero.token_ids, zero.stop_reason) == ("abc", (1, 2, 3), "c")
        assert [item.token_id for item in zero.logprobs or ()] == [1, 2, 3]
        assert zero.prompt_logprobs == (None,)
        assert (one.text, one.token_ids, one.finish_reason) == ("xy", (5, 6), FinishReason.LENGTH)
        assert stream.num_tokens == 5
        assert len(stream.finals) == 2

    asyncio.run(run())


def test_one_failure_ends_a_stream_and_the_request() -> None:
    async def run() -> None:
        aborts: list[Abort] = []
        stream = RequestStream("r", 3, 2, aborts.append)
        stream.put(event(0, 1, "a", finish_reason=FinishReason.ERROR, error="broken"))
        with pytest.raises(EngineError, match="broken"):
            [item async for item in stream]
        assert aborts == [Abort("r")]

    asyncio.run(run())


def test_a_meter_counts_what_requests_took() -> None:
    meter = Meter()
    meter.accepted(100, 2)
    meter.stepped([event(0, 1, "a")])
    end = event(
        0, 2, "b", finish_reason=FinishReason.STOP, usage=Usage(7, 2, 3),
        timing=Timing(10.0, 11.0, 13.0, 14.0),
    )  # fmt: skip
    meter.stepped([end])
    found = {name: (sum(h.counts), h.total) for name, h in meter.histograms.items()}
    assert found["request_queue_time_seconds"] == (1, 1)
    assert found["time_to_first_token_seconds"] == (1, 3)
    assert found["request_prefill_time_seconds"] == (1, 2)
    assert found["request_decode_time_seconds"] == (1, 1)
    assert found["request_time_per_output_token_seconds"] == (1, 1)
    assert found["e2e_request_latency_seconds"] == (1, 4)
    assert found["request_prompt_tokens"] == (1, 7)
    assert found["inter_token_latency_seconds"][0] == 1
    assert meter.finished["stop"] == 1
    assert meter._last_token == {}


def test_traces_tell_what_the_engine_knows() -> None:
    traces: list[Trace] = []
    engine = ScriptedEngine(["a", "b"])
    app = create_app(ModelPool(ScriptedCatalogue(engine)))
    protected = protect(app, Protection(report=traces.append))
    with TestClient(app) as http:
        inner = TestClient(protected, base_url="http://127.0.0.1", raise_server_exceptions=False)
        inner.portal = http.portal
        for body in (CHAT, CHAT | {"stream": True}, {"model": "m", "prompt": ["x", "y"]}):
            path = "/v1/completions" if "prompt" in body else "/v1/chat/completions"
            response = inner.post(path, json=body, headers={"X-Request-ID": "me-1"})
            assert response.headers["x-request-id"] == "me-1"
    assert len(traces) == 3
    for trace, tokens in zip(traces, (2, 2, 4), strict=True):
        assert (trace.id, trace.model) == ("me-1", "m")
        assert trace.completion_tokens == tokens
        assert trace.queue_s == 1.0
        assert trace.finish == "stop"
        assert (trace.first_token_at, trace.last_token_at) == (2.0, 3.0)


@pytest.mark.parametrize(
    ("path", "body", "finish"),
    [
        ("/v1/chat/completions", CHAT, "length"),
        ("/v1/messages", CHAT | {"max_tokens": 2}, "max_tokens"),
        ("/api/chat", CHAT, "length"),
    ],
)
def test_traces_of_streams_have_the_finish_reason_of_the_reply(
    path: str, body: dict[str, Any], finish: str
) -> None:
    traces: list[Trace] = []
    engine = ScriptedEngine(["a", "b"], ends=FinishReason.LENGTH)
    app = create_app(ModelPool(ScriptedCatalogue(engine)))
    protected = protect(app, Protection(report=traces.append))
    with TestClient(app) as http:
        inner = TestClient(protected, base_url="http://127.0.0.1", raise_server_exceptions=False)
        inner.portal = http.portal
        assert inner.post(path, json=body | {"stream": True}).status_code == 200
    (trace,) = traces
    assert (trace.finish, trace.completion_tokens) == (finish, 2)


def test_following_a_log() -> None:
    async def run() -> None:
        buffer = LogBuffer(lines=2)
        logger = logging.getLogger("modelpack_engine.follow_test")
        logger.addHandler(buffer)
        try:
            for word in ("one", "two", "three"):
                logger.error(word)
            lines = buffer.follow()
            first = await anext(lines)
            assert "one" not in first
            assert "three" in first
            logger.error("four")
            assert "four" in await anext(lines)
            await lines.aclose()
            assert buffer._followers == {}
        finally:
            logger.removeHandler(buffer)

    asyncio.run(run())


class _Client:
    """A client of an ASGI application that disconnects on demand."""

    def __init__(self, body: bytes) -> None:
        self.left = asyncio.Event()
        self.sent: list[Message] = []
        self.heard = asyncio.Event()
        self._body = body
        self._asked = False

    async def receive(self) -> Message:
        if not self._asked:
            self._asked = True
            return {"type": "http.request", "body": self._body, "more_body": False}
        await self.left.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Message) -> None:
        self.sent.append(message)
        if message["type"] == "http.response.body" and message.get("body"):
            self.heard.set()


def scope() -> dict[str, Any]:
    return {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST",
        "scheme": "http", "path": "/v1/chat/completions", "raw_path": b"", "query_string": b"",
        "root_path": "", "headers": [(b"content-type", b"application/json")],
        "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 2),
    }  # fmt: skip


@pytest.mark.parametrize("streamed", [b"true", b"false"])
def test_a_client_that_leaves_ends_its_work(streamed: bytes) -> None:
    async def run() -> None:
        engine = ScriptedEngine(["a", "b"])
        engine.wait = asyncio.Event()
        pool = ModelPool(ScriptedCatalogue(engine))
        app = create_app(pool)
        body = b'{"model":"m","messages":[{"role":"user","content":"x"}],"stream":%s}' % streamed
        client = _Client(body)
        serving = asyncio.create_task(app(scope(), client.receive, client.send))
        if streamed == b"true":
            await client.heard.wait()
        while not engine.submitted:
            await asyncio.sleep(0)
        assert pool.running()[0].users == 1
        client.left.set()
        await serving
        assert engine.aborted == [Abort("request-0")]
        assert pool.running()[0].users == 0

    asyncio.run(asyncio.wait_for(run(), 20))


def test_a_client_that_leaves_while_a_model_loads() -> None:
    async def run() -> None:
        pool = ModelPool(ScriptedCatalogue(ScriptedEngine()))
        gate = asyncio.Event()
        ready = pool._ready

        async def slowly(*arguments: Any) -> Any:
            await gate.wait()
            return await ready(*arguments)

        pool._ready = slowly  # type: ignore[method-assign]
        app = create_app(pool)
        client = _Client(b'{"model":"m","messages":[{"role":"user","content":"x"}]}')
        serving = asyncio.create_task(app(scope(), client.receive, client.send))
        while not pool.entries():
            await asyncio.sleep(0)
        client.left.set()
        await serving
        assert client.sent[0]["status"] == 499
        assert [entry.waiting for entry in pool.entries()] == [0]

    asyncio.run(asyncio.wait_for(run(), 20))


def test_a_served_request_is_in_the_metrics(api: Scripted) -> None:
    api.chat("a")
    assert (
        'modelpack:engine_steps_total{engine="0",model_name="m"}' in api.http.get("/metrics").text
    )


def test_a_slow_stream_is_kept_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    async def run() -> None:
        monkeypatch.setattr("modelpack_server.api.sse._PATIENCE", 0.001)
        engine = ScriptedEngine(["a", "b"])
        engine.wait = asyncio.Event()
        app = create_app(ModelPool(ScriptedCatalogue(engine)))
        client = _Client(b'{"model":"m","messages":[{"role":"user","content":"x"}],"stream":true}')
        serving = asyncio.create_task(app(scope(), client.receive, client.send))
        beat = {"type": "http.response.body", "body": b": keepalive\n\n", "more_body": True}
        while beat not in client.sent:
            await asyncio.sleep(0.001)
        engine.wait.set()
        await serving
        assert client.sent[0]["type"] == "http.response.start"
        assert client.sent[-1] == {"type": "http.response.body", "body": b"", "more_body": False}

    asyncio.run(asyncio.wait_for(run(), 20))


def test_a_stream_is_kept_alive_before_its_first_event(monkeypatch: pytest.MonkeyPatch) -> None:
    async def run() -> None:
        monkeypatch.setattr("modelpack_server.api.sse._PATIENCE", 0.001)
        client, beaten = _Client(b""), asyncio.Event()

        async def pieces() -> AsyncGenerator[str, None]:
            await beaten.wait()
            yield "data: 1\n\n"

        async def send(message: Message) -> None:
            await client.send(message)
            if message.get("body") == b": keepalive\n\n":
                beaten.set()

        await LiveStream(pieces(), AsyncExitStack())(scope(), client.receive, send)
        assert client.sent[0]["type"] == "http.response.start"
        assert b"data: 1\n\n" in [message.get("body") for message in client.sent]

    asyncio.run(asyncio.wait_for(run(), 20))
