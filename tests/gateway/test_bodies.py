"""Memory limits of bodies, and the cost of refused requests."""

from __future__ import annotations

import asyncio
import gc
import json
import socket
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from fastapi import APIRouter, FastAPI
from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from modelpack_server.api.bodies import Body, BodyRoute
from modelpack_server.gateway.bodies import (
    FREE_BYTES,
    SLOW_START,
    BodyBudget,
    BodyShare,
    NoRoomError,
    TooSlowError,
    read_body,
    release_body,
)
from modelpack_server.gateway.checks import Checks
from modelpack_server.gateway.json_bodies import drop_document
from tests.gateway.houses import BODY, House
from tests.gateway.servers import CHAT, answering, protected

LONG = {"model": "ai/smollm2", "prompt": "word " * 800}  # about 1000 tokens


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"{" * 3000, 400),
        (b"x" * 20_000, 413),
        (b"[" * 9000, 400),
        (json.dumps(LONG | {"model": ""}).encode(), 400),
    ],
)
def test_refused_requests_are_charged(house: House, body: bytes, status: int) -> None:
    house.app.reply = answering({"error": {"message": "too long"}}, 400)
    headers = {"x-api-key": house.secrets["terse"]}
    reply = house.served.client.post(CHAT, content=body, headers=headers)
    assert reply.status_code == status
    house.served.traces.wait()
    # The bucket of 600 tokens is empty, but not negative.
    assert house.post("terse").status_code == 429
    house.clock.now += 30
    assert house.post("terse", body=BODY | {"max_tokens": 400}).status_code == 429
    house.clock.now += 15
    assert house.post("terse", body=BODY | {"max_tokens": 400}).status_code == 400


def test_a_client_that_leaves_before_the_answer_is_charged(house: House) -> None:
    house.app.reply = answering({"error": {"message": "the client has left"}}, 499)
    assert house.post("terse", body=BODY | {"max_tokens": 400}).status_code == 499
    house.served.traces.wait()
    assert house.post("terse", body=BODY | {"max_tokens": 400}).status_code == 429


def test_a_response_of_unknown_length_reserves_tokens(house: House) -> None:
    house.app.reply = answering({"object": "response", "usage": None})
    body = {"model": "ai/smollm2", "input": "Hi"}
    statuses = []
    for count in range(1, 4):
        statuses.append(house.post("terse", "/v1/responses", body).status_code)
        house.served.traces.wait(count)
    assert statuses == [200, 200, 429]


@pytest.mark.parametrize("usage", [None, {"input_tokens": 1, "output_tokens": 1}])
def test_a_background_response_costs_at_least_its_reservation(house: House, usage: Any) -> None:
    """The response may be the beginning of a stream that the client leaves."""
    house.app.reply = answering({"object": "response", "usage": usage})
    body = {"model": "ai/smollm2", "input": "Hi", "max_output_tokens": 400}
    statuses = []
    for count in range(1, 3):
        reply = house.post("terse", "/v1/responses", body | {"background": True})
        statuses.append(reply.status_code)
        house.served.traces.wait(count)
    assert statuses == [200, 429]


def test_reading_a_stored_response_costs_no_tokens(house: House) -> None:
    usage = {"input_tokens": 900, "output_tokens": 900}
    house.app.reply = answering({"object": "response", "usage": usage})
    headers = {"authorization": f"Bearer {house.secrets['terse']}"}
    for count in range(1, 4):
        path = "/v1/responses/resp_1"
        assert house.served.client.get(path, headers=headers).status_code == 200
        assert house.post("terse", f"{path}/cancel", {}).status_code == 200
        house.served.traces.wait(2 * count)
    assert house.post("terse").status_code == 200


def test_a_refused_request_counts_as_one(house: House) -> None:
    house.app.reply = answering({"error": {"message": "no"}}, 400)
    for _ in range(2):
        assert house.post("slow", body=[]).status_code == 400
    assert house.post("slow").status_code == 429


def test_what_a_limit_refuses_costs_nothing(house: House) -> None:
    assert house.post("terse", body=LONG).status_code == 200
    for _ in range(50):
        assert house.post("terse", body=LONG).status_code == 429
    house.clock.now += 60
    assert house.post("terse", body=BODY).status_code == 200


def test_bodies_in_flight_share_a_budget() -> None:
    budget = BodyBudget(1_000_000)
    with BodyShare(budget) as first, BodyShare(budget) as second, BodyShare(budget) as third:
        first.add(900_000)
        second.add(FREE_BYTES)  # small bodies always pass
        with pytest.raises(NoRoomError):
            third.add(900_000)
        second.add(100_000)
    assert budget.taken == 0


@pytest.mark.parametrize("path", ["/", "/health", "/v1/health", "/ping", "/version"])
def test_nobody_without_a_key_sends_a_body(house: House, path: str) -> None:
    for content in (b"{}", iter([b"{", b"}"])):
        reply = house.served.client.request("GET", path, content=content)
        assert (reply.status_code, "must not have a body" in reply.text) == (413, True)
    assert house.app.asked == []
    assert house.served.client.request("GET", path, content=iter([])).status_code == 200


def test_a_body_beyond_the_budget_is_503_and_can_be_sent_again(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("modelpack_server.gateway.bodies.FREE_BYTES", -(10**9))
    reply = house.post("free")
    assert (reply.status_code, reply.headers["retry-after"]) == (503, "1")
    assert house.app.asked == []
    monkeypatch.undo()
    assert house.post("free").status_code == 200


def test_pieces_of_a_body_are_joined_without_the_interpreter() -> None:
    """`bytes.join` lets other threads run only where all pieces are bytes."""
    messages: list[Message] = [
        {"type": "http.request", "body": bytearray(b"a" * 10), "more_body": True},
        {"type": "http.request", "body": b"b" * 10, "more_body": False},
    ]

    async def receive() -> Message:
        return messages.pop(0)

    async def read() -> list[bytes]:
        with BodyShare(BodyBudget()) as share:
            return await read_body(receive, Headers({}), 1000, share)

    pieces = asyncio.run(read())
    assert pieces == [b"a" * 10, b"b" * 10]
    assert [type(piece) for piece in pieces] == [bytes, bytes]


def test_a_body_that_comes_a_byte_at_a_time_is_refused() -> None:
    now = 0.0

    async def receive() -> Message:
        nonlocal now
        now += 1
        return {"type": "http.request", "body": b"x", "more_body": True}

    async def read() -> None:
        with BodyShare(BodyBudget()) as share:
            await read_body(receive, Headers({}), 1000, share, lambda: now)

    with pytest.raises(TooSlowError) as caught:
        asyncio.run(read())
    assert caught.value.size == pytest.approx(SLOW_START, abs=2)


def test_a_body_that_never_comes_is_408(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("modelpack_server.gateway.bodies.SLOW_START", 0.2)
    host, port = house.served.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=20) as connection:
        connection.sendall(
            f"POST {CHAT} HTTP/1.1\r\nHost: {host}\r\nx-api-key: {house.secrets['free']}\r\n"
            "Content-Length: 100\r\n\r\n{".encode()
        )
        assert connection.recv(100).startswith(b"HTTP/1.1 408 ")


@pytest.mark.sample(1)
@pytest.mark.parametrize("announced", [1, 2])
def test_a_finished_body_is_freed_at_once(announced: int) -> None:
    """Connections are in cycles of references: a collection comes after hundreds of requests."""
    size, requests = 2 * 1024 * 1024, 10  # the last request may still have three copies
    body = b'{"prompt": "' + b"a" * size + b'"}'
    with protected(_empty) as served, _without_collections():
        url = served.client.base_url
        for count in range(1, requests + 1):
            with socket.create_connection((url.host, url.port), timeout=10) as client:
                client.sendall(
                    f"POST {CHAT} HTTP/1.1\r\nHost: {url.host}\r\n"
                    f"Content-Length: {len(body) * announced}\r\n\r\n".encode()
                )
                client.sendall(body)
                if announced == 1:
                    assert client.recv(1024).startswith(b"HTTP/1.1 204")
            served.traces.wait(count)
        assert tracemalloc.get_traced_memory()[0] < size * requests / 2


def test_an_application_releases_a_body_that_it_no_longer_holds() -> None:
    """Then nothing holds the body, and others may take its share while the request goes on."""
    body = b'{"prompt": "' + b"a" * 1024 * 1024 + b'"}'
    left: list[int] = []

    async def application(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        drop_document(scope)
        release_body(scope)
        if depth := int(scope["query_string"]):
            await ask(depth - 1)
        else:
            left.append(tracemalloc.get_traced_memory()[0])
        await Response(status_code=204)(scope, receive, send)

    checks = Checks(application, max_body=len(body))
    checks._budget.limit = 2 * len(body)  # room for one, and its value

    async def ask(depth: int) -> None:
        messages: list[Message] = [{"type": "http.request", "body": bytearray(body)}]
        statuses: list[int] = []

        async def receive() -> Message:
            return messages.pop()

        async def send(message: Message) -> None:
            statuses.append(message.get("status", 204))

        scope = {"type": "http", "method": "POST", "path": CHAT, "raw_path": CHAT.encode(),
                 "query_string": b"%d" % depth, "headers": [(b"content-length", b"9")],
                 "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 2)}  # fmt: skip
        await checks(scope, receive, send)
        assert statuses == [204, 204]

    with _without_collections():
        asyncio.run(ask(9))
    assert checks._budget.taken == 0
    assert left[0] < 5 * len(body)  # of ten requests; the last one may still have three copies


@pytest.mark.long
def test_an_invalid_body_is_freed_at_once() -> None:
    size, requests = 2 * 1024 * 1024, 10
    app = FastAPI()
    routes = APIRouter(route_class=BodyRoute)

    @routes.post("/")
    async def take(body: _Numbers) -> None: ...

    app.include_router(routes)

    async def ask(body: bytes) -> int:
        statuses: list[int] = []

        async def receive() -> Message:
            return {"type": "http.request", "body": body}

        async def send(message: Message) -> None:
            statuses.append(message.get("status", 0))

        headers = [(b"content-type", b"application/json")]
        scope = {"type": "http", "method": "POST", "path": "/", "query_string": b"",
                 "headers": headers}  # fmt: skip
        await app(scope, receive, send)
        return statuses[0]

    for end in (b'"}', b'",}'):  # a wrong type, and no JSON
        with _without_collections():
            for _ in range(requests):
                assert asyncio.run(ask(b'{"number": "' + b"a" * size + end)) == 422
            assert tracemalloc.get_traced_memory()[0] < size * requests / 2


class _Numbers(Body):
    number: int


async def _empty(scope: Scope, receive: Receive, send: Send) -> None:
    await Response(status_code=204)(scope, receive, send)


@contextmanager
def _without_collections() -> Iterator[None]:
    gc.collect()
    gc.disable()
    tracemalloc.start()
    try:
        yield
    finally:
        tracemalloc.stop()
        gc.enable()
