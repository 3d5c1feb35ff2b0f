"""Limits and large bodies, through a server."""

from __future__ import annotations

import socket
import threading
from typing import Any

import pytest
from starlette.types import Receive, Send

from modelpack_server.gateway import add_key
from tests.gateway.houses import BODY, MESSAGES, OLLAMA, House, told
from tests.gateway.servers import (
    CHAT,
    COMPLETION,
    PATIENCE,
    Asked,
    answering,
    new_client,
    piece,
    start_stream,
    wait_for,
)


@pytest.mark.parametrize(
    ("path", "kind"),
    [(CHAT, "rate_limit_error"), (MESSAGES, "rate_limit_error"), (OLLAMA, None)],
)
def test_too_many_requests(house: House, path: str, kind: str | None) -> None:
    assert [house.post("slow").status_code for _ in range(2)] == [200, 200]
    reply = house.post("slow", path)
    assert (reply.status_code, told(reply)[0]) == (429, kind)
    assert "'slow' may make 2 requests a minute" in told(reply)[1]
    assert (reply.headers["retry-after"], reply.headers["retry-after-ms"]) == ("30", "30000")
    assert house.post("free").status_code == 200
    house.clock.now += 30
    assert house.post("slow").status_code == 200
    assert house.served.traces.wait(5)[2].refused == "requests_per_minute_exceeded"


def test_tokens_are_charged_by_what_the_reply_tells(house: House) -> None:
    body = BODY | {"max_tokens": 500}
    usage = {"usage": {"prompt_tokens": 400, "completion_tokens": 200}}
    house.app.reply = answering(usage)
    assert house.post("terse", body=body).status_code == 200
    reply = house.post("terse", body=body)
    assert reply.status_code == 429
    assert "600 tokens a minute" in told(reply)[1]
    house.clock.now += 60
    house.app.reply = answering({"error": "no"}, 400)  # costs nothing
    assert [house.post("terse", body=body).status_code for _ in range(3)] == [400, 400, 400]


def test_tokens_of_a_stream_without_counts_are_counted(house: House) -> None:
    async def reply(_: Asked, __: Receive, send: Send) -> None:
        await start_stream(send)
        for _unused in range(580):
            await send(piece(b'data: {"choices":[{"delta":{"content":"a"}}]}\n\n'))
        await send(piece(b"data: [DONE]\n\n", more=False))

    house.app.reply = reply
    assert house.post("terse", body=BODY | {"max_tokens": 1, "stream": True}).status_code == 200
    assert house.post("terse", body=BODY | {"max_tokens": 100}).status_code == 429
    assert house.served.traces.wait(2)[0].counted_tokens == 580


def test_one_at_a_time(house: House) -> None:
    arrived, held = threading.Event(), threading.Event()

    async def reply(asked: Asked, receive: Receive, send: Send) -> None:
        arrived.set()
        await wait_for(held)
        await answering(COMPLETION)(asked, receive, send)

    house.app.reply = reply
    statuses: list[int] = []
    thread = threading.Thread(target=lambda: statuses.append(house.post("single").status_code))
    thread.start()
    assert arrived.wait(PATIENCE)
    with new_client(house.served.url) as other:
        refused = other.post(CHAT, json=BODY, headers={"x-api-key": house.secrets["single"]})
    assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")
    held.set()
    thread.join()
    assert statuses == [200]
    house.served.traces.wait(2)
    assert house.post("single").status_code == 200


def test_a_place_is_free_again_when_the_application_fails(house: House) -> None:
    async def reply(_: Asked, __: Receive, ___: Send) -> None:
        raise RuntimeError

    house.app.reply = reply
    assert house.post("single").status_code == 500
    house.app.reply = answering(COMPLETION)
    house.served.traces.wait(1)
    assert house.post("single").status_code == 200
    assert [trace.status for trace in house.served.traces.wait(2)] == [500, 200]


def test_callers_within_a_key(house: House) -> None:
    with house.file.open("a") as more:
        more.write("[keys.free.per_caller]\nrequests_per_minute = 1\n")
    asks = [("a", 200), ("b", 200), ("a", 429), (None, 200), ("b", 429)]
    for caller, status in asks:
        headers = {"x-modelpack-caller": caller} if caller else {}
        assert house.post("free", **headers).status_code == status


def test_keys_are_read_again(house: House) -> None:
    house.secrets["new"] = add_key(house.file, "new")
    assert house.post("new").status_code == 200
    house.file.write_text("")
    assert house.post("new").status_code == 401


@pytest.mark.parametrize(
    ("path", "kind"),
    [(CHAT, "invalid_request_error"), (MESSAGES, "request_too_large"), (OLLAMA, None)],
)
@pytest.mark.parametrize("chunked", [True, False])
def test_a_body_over_the_cap(house: House, path: str, kind: str | None, chunked: bool) -> None:
    headers = {"x-api-key": house.secrets["free"]}
    content: Any = (b"x" * 5000 for _ in range(4)) if chunked else b"x" * 20_000
    reply = house.served.client.post(path, content=content, headers=headers)
    assert (reply.status_code, told(reply)[0]) == (413, kind)
    assert "10000 bytes" in told(reply)[1]
    assert house.app.asked == []
    assert house.post("free").status_code == 200


def test_a_body_at_the_cap(house: House) -> None:
    headers = {"x-api-key": house.secrets["free"]}
    content = b"{" + b" " * 9998 + b"}"
    assert house.served.client.post(CHAT, content=content, headers=headers).status_code == 200
    assert house.app.asked[0].body == content


def test_a_body_too_large_is_refused_before_it_is_asked_for(house: House) -> None:
    host, port = house.served.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(
            f"POST {CHAT} HTTP/1.1\r\nHost: {host}\r\nContent-Length: 99999999\r\n"
            f"x-api-key: {house.secrets['free']}\r\nExpect: 100-continue\r\n\r\n".encode()
        )
        assert connection.recv(100).startswith(b"HTTP/1.1 413 ")


def test_a_body_nobody_may_send_is_not_read(house: House) -> None:
    host, port = house.served.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(
            f"POST {CHAT} HTTP/1.1\r\nHost: {host}\r\nContent-Length: 9999\r\n\r\n".encode()
        )
        assert connection.recv(100).startswith(b"HTTP/1.1 401 ")


def test_a_client_that_leaves_in_its_body(house: House) -> None:
    host, port = house.served.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(
            f"POST {CHAT} HTTP/1.1\r\nHost: {host}\r\nContent-Length: 9999\r\n"
            f"x-api-key: {house.secrets['single']}\r\n\r\nhalf".encode()
        )
    [trace] = house.served.traces.wait()
    assert (trace.status, trace.finish) == (499, "abort")
    assert house.post("single").status_code == 200
