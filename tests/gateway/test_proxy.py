"""The gateway with real sockets: it forwards bytes unchanged and without delay."""

from __future__ import annotations

import socket
import socketserver
import threading
from collections.abc import Iterator
from typing import ClassVar

import httpx
import pytest
from starlette.types import Receive, Send

from tests.gateway.servers import (
    CHAT,
    COMPLETION,
    PATIENCE,
    Asked,
    Upstream,
    answering,
    gateway,
    piece,
    serving,
    start_stream,
    unused_url,
    wait_for,
)

BODY = {"model": "m", "messages": [{"role": "user", "content": "Hi"}]}


def test_a_request_arrives_as_it_was_sent() -> None:
    upstream = Upstream()
    with serving(upstream) as url, gateway(f"{url}/base/") as served:
        content = b'{"model": "ai/x",\n "messages": []}'
        reply = served.client.post(
            "/v1/models/ai%2Fx:latest?a=%20b&a=c",
            content=content,
            headers={
                "Authorization": "Bearer theirs",
                "X-Own": "kept",
                "Connection": "keep-alive, x-hop",
                "X-Hop": "dropped",
                "X-Request-Origin": "ollama/completion",
                "X-Request-ID": "mine-1",
                "Accept-Encoding": "gzip",
            },
        )
    assert (reply.status_code, reply.json()) == (200, COMPLETION)
    assert reply.headers.get_list("x-request-id") == ["mine-1"]
    [asked] = upstream.asked
    assert (asked.method, asked.body) == ("POST", content)
    assert asked.target == b"/base/v1/models/ai%2Fx:latest?a=%20b&a=c"
    assert asked.header("authorization") == "Bearer theirs"
    assert asked.header("x-own") == "kept"
    assert asked.header("x-request-id") == "mine-1"
    assert asked.header("accept-encoding") == "identity"
    assert asked.header("x-forwarded-for") == "127.0.0.1"
    assert asked.header("host") == url.removeprefix("http://")
    assert asked.header("content-length") == str(len(content))
    assert asked.header("x-hop") is None
    assert asked.header("x-request-origin") is None


def test_a_reply_arrives_as_it_was_sent() -> None:
    headers = [
        (b"x-own", b"1"), (b"x-own", b"2"), (b"x-hop", b"3"), (b"connection", b"x-hop"),
        (b"access-control-allow-origin", b"*"), (b"x-request-id", b"theirs"),
    ]  # fmt: skip
    upstream = Upstream(answering({"error": {"message": "no"}}, 418, headers))
    with serving(upstream) as url, gateway(url) as served:
        reply = served.client.get("/v1/anything")
        head = served.client.head("/v1/anything")
    assert (reply.status_code, reply.json()) == (418, {"error": {"message": "no"}})
    assert reply.headers.get_list("x-own") == ["1", "2"]
    assert "x-hop" not in reply.headers
    assert "access-control-allow-origin" not in reply.headers
    assert reply.headers.get_list("date") == [reply.headers["date"]]
    assert reply.headers["x-request-id"].startswith("req_")
    assert reply.headers["request-id"] == reply.headers["x-request-id"]
    assert (head.status_code, head.content) == (418, b"")
    assert [asked.method for asked in upstream.asked] == ["GET", "HEAD"]


def test_the_first_piece_arrives_before_the_second_is_sent() -> None:
    seen = threading.Event()

    async def reply(_: Asked, __: Receive, send: Send) -> None:
        await start_stream(send)
        await send(piece(b'data: {"choices":[{"delta":{"content":"A"}}]}\n\n'))
        await wait_for(seen)
        await send(piece(b'data: {"choices":[{"delta":{"content":"B"},"finish_reason":"stop"}]}'))
        await send(piece(b"\n\ndata: [DONE]\n\n", more=False))

    with (
        serving(Upstream(reply)) as url,
        gateway(url) as served,
        served.client.stream("POST", CHAT, json=BODY) as response,
    ):
        pieces = response.iter_raw()
        first = next(pieces)
        assert b'"A"' in first
        assert b'"B"' not in first
        seen.set()
        assert b"".join(pieces).endswith(b"data: [DONE]\n\n")
        [trace] = served.traces.wait()
    assert (trace.status, trace.finish, trace.model) == (200, "stop", "m")
    assert trace.to_json()["counted_tokens"] == 2
    assert trace.ttft is not None
    assert trace.tpot is not None
    assert trace.queue_s is not None
    assert trace.queue_s <= trace.ttft


def test_an_upload_is_passed_on_before_it_is_complete() -> None:
    begun = threading.Event()

    async def reply(_: Asked, receive: Receive, send: Send) -> None:
        size = 0
        more = True
        while more:
            message = await receive()
            size += len(message.get("body", b""))
            more = message.get("more_body", False)
            begun.set()
        await answering({"size": size})(_, receive, send)

    def content() -> Iterator[bytes]:
        yield b"a" * 1000
        assert begun.wait(PATIENCE)
        yield b"b" * 1000

    with (
        serving(Upstream(reply, reads_body=False)) as url,
        gateway(url, protection={"max_body": 100}) as served,
    ):
        assert served.client.post("/models/load", content=content()).json() == {"size": 2000}


@pytest.mark.parametrize("streaming", [True, False])
def test_a_client_that_goes_away_is_noticed_upstream(streaming: bool) -> None:
    arrived, gone = threading.Event(), threading.Event()

    async def reply(_: Asked, receive: Receive, send: Send) -> None:
        if streaming:
            await start_stream(send)
            await send(piece(b"data: 1\n\n"))
        arrived.set()
        assert (await receive())["type"] == "http.disconnect"
        gone.set()

    with serving(Upstream(reply)) as url, gateway(url) as served:
        host, port = served.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(
                f"POST {CHAT} HTTP/1.1\r\nHost: {host}\r\nContent-Length: 2\r\n\r\n{{}}".encode()
            )
            assert arrived.wait(PATIENCE)
        assert gone.wait(PATIENCE)
        [trace] = served.traces.wait()
        running = f'modelpack_gateway_upstream_running{{upstream="{url}"}} 0.0'
        assert running in served.client.get("/metrics").text
    assert trace.finish == "abort"
    assert trace.status == (200 if streaming else 499)


def test_a_dead_upstream_is_passed_over() -> None:
    alive = Upstream()
    dead = unused_url()
    with serving(alive) as url, gateway(dead, url, policy="round-robin") as served:
        for _ in range(4):
            assert served.client.post(CHAT, json=BODY).status_code == 200
        health = served.client.get("/health")
        assert health.json()["upstreams"] == {"healthy": 1, "total": 2}
        text = served.client.get("/metrics").text
    assert len(alive.asked) == 4
    assert f'modelpack_gateway_upstream_healthy{{upstream="{dead}"}} 0.0' in text
    assert f'modelpack_gateway_upstream_healthy{{upstream="{url}"}} 1.0' in text


def test_a_busy_upstream_is_passed_over_and_spared() -> None:
    busy = Upstream(answering({"error": "full"}, 503, [(b"retry-after", b"9")]))
    free = Upstream()
    with (
        serving(busy) as one,
        serving(free) as two,
        gateway(one, two, policy="round-robin") as served,
    ):
        for _ in range(4):
            assert served.client.post(CHAT, json=BODY).status_code == 200
    assert len(busy.asked) == 1
    assert [asked.body for asked in busy.asked] == [free.asked[0].body]
    assert len(free.asked) == 4


def test_when_all_are_busy_the_last_one_says_so() -> None:
    upstream = Upstream(answering({"error": "full"}, 503, [(b"retry-after", b"9")]))
    with serving(upstream) as one, serving(upstream) as two, gateway(one, two) as served:
        reply = served.client.post(CHAT, json=BODY)
    assert (reply.status_code, reply.headers["retry-after"]) == (503, "9")
    assert len(upstream.asked) == 2


@pytest.mark.parametrize(
    ("status", "headers"), [(503, []), (500, [(b"retry-after", b"1")]), (429, [])]
)
def test_what_may_have_begun_is_not_tried_again(
    status: int, headers: list[tuple[bytes, bytes]]
) -> None:
    upstream = Upstream(answering({"error": "x"}, status, headers))
    with serving(upstream) as one, serving(upstream) as two, gateway(one, two) as served:
        assert served.client.post(CHAT, json=BODY).status_code == status
    assert len(upstream.asked) == 1


def test_an_upstream_that_breaks_off_before_its_answer_is_not_tried_again() -> None:
    class HangingUp(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            self.rfile.readline()  # and no response

    other = Upstream(healthy=False)
    with (
        socketserver.TCPServer(("127.0.0.1", 0), HangingUp) as broken,
        serving(other) as url,
    ):
        thread = threading.Thread(target=broken.serve_forever, args=(0.01,))
        thread.start()
        first = f"http://127.0.0.1:{broken.server_address[1]}"
        with gateway(first, url, policy="round-robin") as served:
            statuses = [served.client.post(CHAT, json=BODY).status_code for _ in range(2)]
            traces = served.traces.wait(2)
        broken.shutdown()
        thread.join()
    assert sorted(statuses) == [200, 502]
    assert [trace.attempts for trace in traces] == [1, 1]
    assert len(other.asked) == 1


class Simple(socketserver.StreamRequestHandler):
    """A server that expects no body in requests, and sends a body for any method."""

    heads: ClassVar[list[bytes]] = []

    def handle(self) -> None:
        while request := self.rfile.readline():
            if b" /health " not in request:
                self.heads.append(request)
            while self.rfile.readline() not in (b"\r\n", b""):
                pass
            self.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")


@pytest.mark.parametrize("method", ["GET", "HEAD", "TRACE", "CONNECT", "OTHER"])
def test_no_client_decides_what_the_next_one_is_answered(method: str) -> None:
    """The proxy sends no unexpected body, and does not reuse such a connection."""
    Simple.heads.clear()
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Simple) as server:
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        with gateway(f"http://127.0.0.1:{server.server_address[1]}") as served:
            hidden = b"GET /hidden HTTP/1.1\r\nHost: a\r\n\r\n"
            served.client.request(method, "/v1/first", content=hidden)
            second = served.client.get("/v1/second")
        server.shutdown()
        thread.join()
    assert (second.status_code, second.text) == (200, "ok")
    asked = [head.split()[1] for head in Simple.heads]
    assert asked == [b"/v1/first", b"/v1/second"]


@pytest.mark.parametrize(
    ("path", "status", "kind"),
    [
        (CHAT, 503, "service_unavailable"),
        ("/anthropic/v1/messages", 529, "overloaded_error"),
        ("/api/chat", 503, None),
    ],
)
def test_no_upstream_at_all(path: str, status: int, kind: str | None) -> None:
    with gateway(unused_url(), unused_url()) as served:
        reply = served.client.post(path, json=BODY)
        health = served.client.get("/health")
    assert (reply.status_code, reply.headers["retry-after"]) == (status, "1")
    error = reply.json()["error"]
    assert (error["type"] if kind else None) == kind
    assert "127.0.0.1" not in reply.text
    assert health.status_code == 503
    [trace] = [trace for trace in served.traces.wait(2) if trace.path == path]
    assert (trace.attempts, trace.refused) == (2, "upstream")


@pytest.mark.parametrize(
    ("path", "media_type", "ending"),
    [
        (
            CHAT,
            b"text/event-stream",
            b'\n\ndata: {"error": {"message": "the upstream closed the connection"',
        ),
        ("/v1/messages", b"text/event-stream", b'\n\nevent: error\ndata: {"type": "error"'),
        (
            "/api/chat",
            b"application/x-ndjson",
            b'\n{"error": "the upstream closed the connection"}\n',
        ),
    ],
)
def test_a_stream_that_breaks_off_ends_with_an_error(
    path: str, media_type: bytes, ending: bytes
) -> None:
    async def reply(_: Asked, __: Receive, send: Send) -> None:
        await start_stream(send, media_type)
        await send(piece(b"data: half"))  # returning now closes the connection

    with serving(Upstream(reply)) as url, gateway(url) as served:
        content = served.client.post(path, json=BODY).content
        [trace] = served.traces.wait()
    assert content.startswith(b"data: half" + ending)
    assert trace.finish == "error"


def test_a_reply_that_breaks_off_is_seen_to() -> None:
    async def reply(_: Asked, __: Receive, send: Send) -> None:
        headers = [(b"content-type", b"application/json"), (b"content-length", b"100")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send(piece(b"{"))

    with serving(Upstream(reply)) as url, gateway(url) as served:
        with pytest.raises(httpx.RemoteProtocolError):
            served.client.post(CHAT, json=BODY)
        [trace] = served.traces.wait()
    assert trace.finish == "error"


def test_an_upstream_that_takes_too_long() -> None:
    async def reply(_: Asked, receive: Receive, __: Send) -> None:
        assert (await receive())["type"] == "http.disconnect"

    with serving(Upstream(reply)) as url, gateway(url, timeout=0.05) as served:
        answer = served.client.post(CHAT, json=BODY)
    assert answer.status_code == 504
    assert answer.json()["error"]["type"] == "server_error"


def test_the_one_with_the_fewest_requests_is_asked() -> None:
    held, arrived = threading.Event(), threading.Event()

    async def slow(asked: Asked, receive: Receive, send: Send) -> None:
        arrived.set()
        await wait_for(held)
        await answering({"from": "slow"})(asked, receive, send)

    first = Upstream(slow)
    second = Upstream(answering({"from": "second"}))
    with serving(first) as one, serving(second) as two, gateway(one, two) as served:
        thread = threading.Thread(target=lambda: httpx.post(served.url + CHAT, json=BODY))
        thread.start()
        assert arrived.wait(PATIENCE)
        for _ in range(3):
            assert served.client.post(CHAT, json=BODY).json() == {"from": "second"}
        held.set()
        thread.join()
    assert len(first.asked) == 1


def test_an_upload_goes_to_another_upstream_while_nothing_of_it_was_sent() -> None:
    upstream = Upstream(healthy=False)
    pieces = (b"x" * 1000 for _ in range(3))
    with serving(upstream) as url, gateway(unused_url(), url, policy="round-robin") as served:
        # After both were probed, neither is preferred, so the dead one is first.
        while served.client.get("/health").status_code == 200:
            pass
        assert served.client.post("/models/load", content=pieces).status_code == 200
        [trace] = [t for t in served.traces.wait(2) if t.path == "/models/load"]
    assert (trace.attempts, trace.upstream) == (2, url)
    assert [asked.body for asked in upstream.asked] == [b"x" * 3000]


def test_a_target_that_is_none() -> None:
    upstream = Upstream()
    with serving(upstream) as url, gateway(url) as served:
        host, port = served.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(f"GET /a#b HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())
            assert connection.recv(100).startswith(b"HTTP/1.1 400 ")
    assert upstream.asked == []


def test_own_credentials_for_upstreams() -> None:
    upstream = Upstream()
    with serving(upstream) as url, gateway(url, upstream_key="mp_theirs") as served:
        served.client.post(CHAT, json=BODY, headers={"x-api-key": "dummy"})
    assert upstream.asked[0].header("authorization") == "Bearer mp_theirs"
    assert upstream.asked[0].header("x-api-key") is None
