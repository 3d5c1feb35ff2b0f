"""Upstream applications and gateways, on free local ports."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar

import httpx
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from modelpack.http.listener import AppServer
from modelpack_server.gateway import Protection, Trace, protect
from modelpack_server.gateway.app import GatewayServer, GatewaySettings

PATIENCE = 20.0  # seconds; only failures take this long
CHAT = "/v1/chat/completions"
COMPLETION = {
    "id": "chatcmpl-1", "object": "chat.completion", "created": 1, "model": "m",
    "choices": [{"index": 0, "finish_reason": "stop", "logprobs": None,
                 "message": {"role": "assistant", "content": "Hi", "refusal": None}}],
    "usage": {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10},
}  # fmt: skip


@dataclass
class Asked:
    """A request as received by the application."""

    method: str
    target: bytes
    headers: list[tuple[str, str]]
    body: bytes

    def header(self, name: str) -> str | None:
        """Return the value of a header that occurs once."""
        values = [value for other, value in self.headers if other == name]
        assert len(values) < 2, values
        return values[0] if values else None


Reply = Callable[[Asked, Receive, Send], Awaitable[None]]


@dataclass
class Upstream:
    """An application that records requests and responds with `reply`."""

    reply: Reply = field(default_factory=lambda: answering(COMPLETION))
    asked: list[Asked] = field(default_factory=list)
    reads_body: bool = True
    healthy: bool = True

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        if scope["path"].endswith("/health"):
            await respond(send, 200 if self.healthy else 503, {})
            return
        body = b""
        more = self.reads_body
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            body += message.get("body", b"")
            more = message.get("more_body", False)
        query = scope["query_string"]
        asked = Asked(
            scope["method"],
            scope["raw_path"] + (b"?" + query if query else b""),
            [(name.decode(), value.decode()) for name, value in scope["headers"]],
            body,
        )
        self.asked.append(asked)
        await self.reply(asked, receive, send)


async def respond(
    send: Send, status: int, body: Any, headers: list[tuple[bytes, bytes]] | None = None
) -> None:
    """Send a reply of JSON."""
    content = json.dumps(body).encode()
    told = [(b"content-type", b"application/json"), *(headers or [])]
    await send({"type": "http.response.start", "status": status, "headers": told})
    await send({"type": "http.response.body", "body": content})


def answering(
    body: Any, status: int = 200, headers: list[tuple[bytes, bytes]] | None = None
) -> Reply:
    """Return an application that responds to every request with `body`."""

    async def reply(_: Asked, __: Receive, send: Send) -> None:
        await respond(send, status, body, headers)

    return reply


async def wait_for(event: threading.Event) -> None:
    """Wait for an event of another thread without blocking this one's loop."""
    assert await asyncio.to_thread(event.wait, PATIENCE), "nothing happened"


async def start_stream(send: Send, media_type: bytes = b"text/event-stream") -> None:
    """Begin a streamed reply."""
    headers = [(b"content-type", media_type)]
    await send({"type": "http.response.start", "status": 200, "headers": headers})


def piece(body: bytes, more: bool = True) -> Message:
    """A part of a streamed reply."""
    return {"type": "http.response.body", "body": body, "more_body": more}


class Place:
    """A server that is reused for several applications, because starting one is slow."""

    free: ClassVar[list[Place]] = []
    all: ClassVar[list[Place]] = []

    def __init__(self) -> None:
        self.app: ASGIApp | None = None
        self.server = AppServer(lambda: self, "127.0.0.1:0", name="test server", grace=1)
        self.server.start()
        Place.all.append(self)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        assert self.app is not None, "nothing is served here now"
        await self.app(scope, receive, send)

    @classmethod
    def close_all(cls) -> None:
        """Stop the servers."""
        while cls.all:
            cls.all.pop().server.stop()
        cls.free.clear()


@contextmanager
def serving(app: ASGIApp) -> Iterator[str]:
    """Serve an application and yield its address."""
    place = Place.free.pop() if Place.free else Place()
    place.app = app
    try:
        yield place.server.url
    finally:
        place.app = None
        Place.free.append(place)


@dataclass
class Traces:
    """The traces of finished requests, with a method that waits for them."""

    ended: list[Trace] = field(default_factory=list)
    _change: threading.Condition = field(default_factory=threading.Condition)

    def __call__(self, trace: Trace) -> None:
        with self._change:
            self.ended.append(trace)
            self._change.notify_all()

    def wait(self, count: int = 1) -> list[Trace]:
        """Return the traces once there are `count`."""
        with self._change:
            assert self._change.wait_for(lambda: len(self.ended) >= count, PATIENCE)
            return list(self.ended)


@dataclass
class Served:
    """A server under test: its address, a client for it, and its traces."""

    url: str
    client: httpx.Client
    traces: Traces


@contextmanager
def protected(app: ASGIApp, **protection: Any) -> Iterator[Served]:
    """Serve an application behind `protect`."""
    traces = Traces()
    clock = protection.pop("clock", None)
    more = {"clock": clock} if clock else {}
    app = protect(app, Protection(report=traces, **protection), **more)
    with serving(app) as url, new_client(url) as client:
        yield Served(url, client, traces)


@contextmanager
def gateway(*urls: str, protection: dict[str, Any] | None = None, **more: Any) -> Iterator[Served]:
    """Serve a gateway to the upstreams at `urls`."""
    traces = Traces()
    protected_by = Protection(report=traces, **(protection or {}))
    settings = GatewaySettings(urls, protected_by, **({"probe_interval": 3600.0} | more))
    with GatewayServer(settings, grace=1) as server, new_client(server.url) as client:
        yield Served(server.url, client, traces)


def unused_url() -> str:
    """Return an address without a listener."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{taken.getsockname()[1]}"


def new_client(url: str) -> httpx.Client:
    """Return a client that ignores the environment."""
    return httpx.Client(base_url=url, trust_env=False, timeout=PATIENCE)
