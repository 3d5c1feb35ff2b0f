"""HttpConnection under any ASGI application: bodies in pieces, parts of files, disconnects."""

from __future__ import annotations

import asyncio
import gc
import hashlib
import http.client
import queue
import random
import socket
import ssl
import threading
import tracemalloc
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, cast

import pytest

from modelpack.http import REUSE
from modelpack.http import connection as http_connection
from modelpack.http.connection import PIECE, ZERO_COPY_SEND, HttpConnection
from modelpack.http.listener import AppServer
from tests.registry.auth_servers import make_pair

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

KIB = 1024
CONTENT = random.Random(5).randbytes(4 * PIECE + 12_345)


@contextmanager
def connected(app: ASGIApp) -> Iterator[socket.socket]:
    """Serve `app`, and connect to it."""
    with AppServer(lambda: app, "127.0.0.1:0", name="test", grace=1) as server:
        name, _, port = server.host.rpartition(":")
        with socket.create_connection((name, int(port)), timeout=20) as connection:
            yield connection


def head(method: str, length: int | None, *fields: str) -> bytes:
    framing = "Transfer-Encoding: chunked" if length is None else f"Content-Length: {length}"
    return "\r\n".join((f"{method} / HTTP/1.1", "Host: x", framing, *fields, "", "")).encode()


def answer(connection: socket.socket, method: str = "POST") -> tuple[int, bytes]:
    """Return the status of a response, and its body."""
    response = http.client.HTTPResponse(connection, method=method)
    response.begin()
    return response.status, response.read()


async def reply(send: Send, body: bytes, status: int = 200) -> None:
    headers = [(b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


async def sizes_and_digest(scope: Scope, receive: Receive, send: Send) -> None:
    """Respond with the digest of the body and the size of the largest message."""
    hasher, largest, more = hashlib.sha256(), 0, True
    while more:
        message = await receive()
        assert message["type"] == "http.request"
        hasher.update(message["body"])
        largest = max(largest, len(message["body"]))
        more = message["more_body"]
    await reply(send, f"{hasher.hexdigest()} {largest}".encode())


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wait for whole pieces, however busy this machine is."""
    monkeypatch.setattr(http_connection, "_PATIENCE", 20.0)


SIZES = [0, 1, 64 * KIB, 300 * KIB, PIECE - 1, PIECE, PIECE + 1, 3 * PIECE + 7]


@pytest.mark.parametrize("with_head", [0, 1, 100 * KIB, 10 * PIECE])
@pytest.mark.usefixtures("patient")
def test_bodies_arrive_whole_and_one_after_the_other(with_head: int) -> None:
    """`with_head` bytes of each body arrive with its head; all bodies use one connection."""
    with connected(sizes_and_digest) as connection:
        for size in SIZES:
            body = CONTENT[:size]
            connection.sendall(head("POST", size) + body[:with_head])
            connection.sendall(body[with_head:])
            status, text = answer(connection)
            digest, largest = text.decode().split()
            assert (status, digest) == (200, hashlib.sha256(body).hexdigest())
            assert int(largest) == PIECE or size < 2 * PIECE


@pytest.mark.usefixtures("patient")
def test_large_bodies_come_in_whole_pieces() -> None:
    sizes: list[int] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        while (message := await receive())["more_body"]:
            sizes.append(len(message["body"]))
        sizes.append(len(message["body"]))
        await reply(send, b"")

    with connected(app) as connection:
        connection.sendall(head("POST", 3 * PIECE + 5) + CONTENT[: 3 * PIECE + 5])
        assert answer(connection) == (200, b"")
    assert [size for size in sizes if size] == [PIECE, PIECE, PIECE, 5]


@pytest.mark.usefixtures("patient")
def test_pieces_that_are_given_back_are_filled_again() -> None:
    buffers: list[bytearray] = []  # keeps them, so that no address is reused by chance
    count = 12

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        give_back = scope["extensions"][REUSE]["give_back"]
        body, more = b"", True
        while more:
            message = await receive()
            body += message["body"]
            more = message["more_body"]
            if isinstance(message["body"], bytearray):
                buffers.append(message["body"])
            give_back(message["body"])
        await reply(send, hashlib.sha256(body).hexdigest().encode())

    content = b"".join(bytes([number]) * PIECE for number in range(count))
    with connected(app) as connection:
        connection.sendall(head("POST", len(content)) + content)
        assert answer(connection)[1].decode() == hashlib.sha256(content).hexdigest()
    assert len({id(buffer) for buffer in buffers if len(buffer) == PIECE}) <= 4 < len(buffers)


def test_many_large_bodies_arrive_whole_though_some_are_cut() -> None:
    digest = hashlib.sha256(CONTENT).hexdigest()
    with AppServer(lambda: sizes_and_digest, "127.0.0.1:0", name="test", grace=1) as server:
        name, _, port = server.host.rpartition(":")

        def send(number: int) -> bool:
            with socket.create_connection((name, int(port)), timeout=20) as connection:
                connection.sendall(head("POST", len(CONTENT)))
                if number % 3 == 0:
                    connection.sendall(CONTENT[: PIECE + 7])
                    return True
                connection.sendall(CONTENT)
                return digest in answer(connection)[1].decode()

        with ThreadPoolExecutor(24) as senders:
            assert all(senders.map(send, range(48)))


def test_with_many_large_bodies_one_piece_begins_per_iteration() -> None:
    class Connection:
        def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
            self.loop, self.flow = loop, self
            self.resumed = False

        def resume_reading(self) -> None:
            self.resumed = True

    async def resumed_after_each_iteration(count: int) -> list[int]:
        shared = http_connection._Shared()
        loop = asyncio.get_running_loop()
        connections = [cast("HttpConnection", Connection(loop)) for _ in range(count)]
        for connection in connections:
            shared.begin(connection)
        for connection in connections:
            shared.read_on(connection)
        found = []
        for _ in connections:
            found.append(sum(c.resumed for c in cast("list[Connection]", connections)))
            await asyncio.sleep(0)
        return found

    assert asyncio.run(resumed_after_each_iteration(4)) == [4] * 4
    assert asyncio.run(resumed_after_each_iteration(6)) == [0, 1, 2, 3, 4, 5]


def test_requests_right_behind_a_large_body() -> None:
    with connected(sizes_and_digest) as connection:
        request = head("POST", 2 * PIECE) + CONTENT[: 2 * PIECE]
        sender = threading.Thread(target=connection.sendall, args=(request * 3,))
        sender.start()
        texts = []
        with connection.makefile("rb") as stream:  # one buffer: responses may arrive together
            for _ in range(3):
                fields = iter(stream.readline, b"\r\n")
                [length] = [int(line.split()[1]) for line in fields if b"length" in line]
                texts.append(stream.read(length).decode().split()[0])
        sender.join()
    assert texts == [hashlib.sha256(CONTENT[: 2 * PIECE]).hexdigest()] * 3


def test_chunked_bodies() -> None:
    with connected(sizes_and_digest) as connection:
        connection.sendall(head("POST", None))
        for at in range(0, len(CONTENT), 100_000):
            chunk = CONTENT[at : at + 100_000]
            connection.sendall(f"{len(chunk):x}\r\n".encode() + chunk + b"\r\n")
        connection.sendall(b"0\r\n\r\n")
        assert answer(connection)[1].split()[0].decode() == hashlib.sha256(CONTENT).hexdigest()


def test_a_client_that_waits_for_100_is_told_once() -> None:
    with connected(sizes_and_digest) as connection:
        connection.sendall(head("POST", len(CONTENT), "Expect: 100-continue"))
        assert connection.recv(KIB) == b"HTTP/1.1 100 Continue\r\n\r\n"
        connection.sendall(CONTENT)
        assert answer(connection)[1].split()[0].decode() == hashlib.sha256(CONTENT).hexdigest()


def test_what_came_before_a_cut_is_delivered() -> None:
    received: queue.Queue[bytes] = queue.Queue()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        body = b""
        while (message := await receive())["type"] == "http.request":
            assert message["more_body"]
            body += message["body"]
        received.put(body)

    came = PIECE + 234_567
    with connected(app) as connection:
        connection.sendall(head("POST", len(CONTENT)) + CONTENT[:came])
        connection.shutdown(socket.SHUT_WR)
        assert received.get(timeout=20) == CONTENT[:came]


def test_closed_connections_hold_no_memory() -> None:
    """Ended connections are cycles of references, which may not be collected for a long time."""
    over: queue.Queue[None] = queue.Queue()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        while (await receive())["type"] == "http.request":
            pass
        over.put(None)

    gc.collect()
    gc.disable()
    tracemalloc.start()
    try:
        with AppServer(lambda: app, "127.0.0.1:0", name="test", grace=1) as server:
            name, _, port = server.host.rpartition(":")
            for _ in range(10):
                with socket.create_connection((name, int(port)), timeout=20) as connection:
                    connection.sendall(head("POST", len(CONTENT)) + CONTENT[:PIECE])
                over.get(timeout=20)
        assert tracemalloc.get_traced_memory()[0] < 4 * PIECE
    finally:
        tracemalloc.stop()
        gc.enable()


def test_closed_connections_hold_no_unread_piece() -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        connection = scope["extensions"][REUSE]["give_back"].__self__
        while not connection._pieces:
            await asyncio.sleep(0)
        await reply(send, b"no", 413)

    gc.collect()
    gc.disable()
    tracemalloc.start()
    try:
        with AppServer(lambda: app, "127.0.0.1:0", name="test", grace=1) as server:
            name, _, port = server.host.rpartition(":")
            for _ in range(10):
                with socket.create_connection((name, int(port)), timeout=20) as connection:
                    connection.sendall(head("POST", len(CONTENT)) + CONTENT[:PIECE])
                    assert b" 413 " in connection.recv(100)
        assert tracemalloc.get_traced_memory()[0] < 5 * PIECE
    finally:
        tracemalloc.stop()
        gc.enable()


@pytest.mark.parametrize("read", [0, 1, PIECE, 2 * PIECE + 1])
def test_an_early_answer_leaves_the_connection_usable(read: int) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        left = read if scope["method"] == "PUT" else 0
        while left > 0:
            left -= len((await receive())["body"])
        await (reply(send, b"no", 413) if scope["method"] == "PUT" else reply(send, b"yes"))

    with connected(app) as connection:
        begun = min(len(CONTENT), 2 * read)
        connection.sendall(head("PUT", len(CONTENT)) + CONTENT[:begun])
        assert answer(connection) == (413, b"no")
        connection.sendall(CONTENT[begun:] + head("POST", 0))
        assert answer(connection) == (200, b"yes")


def test_a_client_waits_for_an_application_that_does_not_read() -> None:
    released = threading.Event()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await asyncio.to_thread(released.wait, 20)

    with connected(app) as connection:
        connection.settimeout(0.5)
        size = 128 * PIECE  # more than all socket buffers hold
        try:
            with pytest.raises(TimeoutError):
                connection.sendall(head("POST", size) + bytes(size))
        finally:
            released.set()


@pytest.mark.usefixtures("patient")
def test_pieces_over_tls(tmp_path: Path) -> None:
    authority = make_pair(tmp_path, "authority")
    pair = make_pair(tmp_path, "server", authority)
    seen: list[Scope] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        seen.append(scope)
        await sizes_and_digest(scope, receive, send)

    context = ssl.create_default_context(cafile=str(authority.certificate))
    tls = (pair.certificate, pair.key)
    with AppServer(lambda: app, "127.0.0.1:0", name="test", grace=1, tls=tls) as server:
        connection = http.client.HTTPSConnection(server.host, context=context, timeout=20)
        for _ in range(2):
            connection.request("POST", "/", body=CONTENT)
            digest, largest = connection.getresponse().read().decode().split()
            assert (digest, largest) == (hashlib.sha256(CONTENT).hexdigest(), str(PIECE))
        connection.close()
    assert ZERO_COPY_SEND not in seen[0].get("extensions", {})  # the kernel cannot encrypt


class Sender:
    """An application that sends parts of a file: (offset, count), with or without a length."""

    def __init__(self, path: Path, *parts: tuple[int, int], length: int | None = None) -> None:
        self._path = path
        self._parts = parts
        self._length = length
        self.ended: queue.Queue[BaseException | None] = queue.Queue()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        assert ZERO_COPY_SEND in scope["extensions"]
        headers = []
        if self._length is not None:
            headers = [(b"content-length", str(self._length).encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        try:
            with self._path.open("rb") as stream:
                for at, (offset, count) in enumerate(self._parts, 1):
                    part: Message = {"file": stream.fileno(), "offset": offset, "count": count}
                    more = at < len(self._parts)
                    await send({"type": ZERO_COPY_SEND, **part, "more_body": more})
            self.ended.put(None)
        except OSError as error:
            self.ended.put(error)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("files") / "content"
    path.write_bytes(CONTENT)
    return path


@pytest.mark.parametrize("is_long", [True, False], ids=["length", "chunked"])
@pytest.mark.parametrize(
    "parts",
    [
        [(0, len(CONTENT))],
        [(0, 1)],
        [(PIECE - 1, 2), (0, PIECE), (len(CONTENT) - 3, 3)],
    ],
)
def test_parts_of_a_file(file: Path, parts: list[tuple[int, int]], is_long: bool) -> None:
    expected = b"".join(CONTENT[offset : offset + count] for offset, count in parts)
    app = Sender(file, *parts, length=len(expected) if is_long else None)
    with connected(app) as connection:
        for _ in range(2):  # the connection goes on
            connection.sendall(head("GET", 0))
            assert answer(connection, "GET") == (200, expected)


@pytest.mark.parametrize("is_read", [True, False])
def test_a_worker_waits_briefly_for_a_full_socket(
    is_read: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(8 * 1024 * KIB))  # more than sockets of this kind hold
    monkeypatch.setattr(http_connection, "_FULL_MILLISECONDS", 20_000 if is_read else 1)
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    with ThreadPoolExecutor(1) as executor, ours, theirs, path.open("rb") as stream:
        size = path.stat().st_size
        if is_read:
            received = executor.submit(lambda: theirs.recv(size, socket.MSG_WAITALL))
        sent = http_connection._send_what_fits(ours, stream.fileno(), 0, size)
        assert (sent == size) is is_read
        if is_read:
            assert len(received.result()) == size


def test_head_sends_no_file(file: Path) -> None:
    with connected(Sender(file, (0, PIECE), length=PIECE)) as connection:
        for _ in range(2):
            connection.sendall(head("HEAD", 0))
            assert answer(connection, "HEAD") == (200, b"")


def test_a_file_that_ends_early_ends_the_connection(file: Path) -> None:
    app = Sender(file, (PIECE, len(CONTENT)), length=len(CONTENT))
    with connected(app) as connection:
        connection.sendall(head("GET", 0))
        with pytest.raises((http.client.IncompleteRead, ConnectionError)):
            answer(connection, "GET")
        assert isinstance(app.ended.get(timeout=20), ConnectionError)


@pytest.mark.parametrize("half", [True, False], ids=["half closed", "closed"])
def test_a_client_that_goes_ends_a_file(tmp_path: Path, half: bool) -> None:
    path = tmp_path / "large"
    with path.open("wb") as stream:
        stream.truncate(256 * PIECE)  # more than all socket buffers hold
    app = Sender(path, (0, 256 * PIECE), length=256 * PIECE)
    with connected(app) as connection:
        connection.sendall(head("GET", 0))
        assert connection.recv(KIB).startswith(b"HTTP/1.1 200 ")
        if half:
            connection.shutdown(socket.SHUT_WR)
        else:
            connection.close()
        assert isinstance(app.ended.get(timeout=20), OSError)


def test_stopping_cuts_who_does_not_read(tmp_path: Path) -> None:
    path = tmp_path / "large"
    with path.open("wb") as stream:
        stream.truncate(256 * PIECE)
    app = Sender(path, (0, 256 * PIECE), length=256 * PIECE)
    with AppServer(lambda: app, "127.0.0.1:0", name="test", grace=0) as server:
        name, _, port = server.host.rpartition(":")
        connection = socket.create_connection((name, int(port)), timeout=20)
        connection.sendall(head("GET", 0))
        assert connection.recv(KIB).startswith(b"HTTP/1.1 200 ")
    with connection:
        received = 0
        with suppress(ConnectionError):
            while chunk := connection.recv(PIECE):
                received += len(chunk)
    assert received < 256 * PIECE


@pytest.mark.parametrize("sent", [b"", b"GET / HTTP/1.1\r\nHost"])
@pytest.mark.parametrize("earlier", [False, True])
def test_a_connection_without_a_whole_head_is_closed(
    monkeypatch: pytest.MonkeyPatch, sent: bytes, earlier: bool
) -> None:
    monkeypatch.setattr(http_connection, "HEAD_SECONDS", 0.2)
    with connected(sizes_and_digest) as connection:
        if earlier:
            connection.sendall(head("POST", 0))
            assert answer(connection)[0] == 200
        connection.sendall(sent)
        assert connection.recv(100) == b""  # closed, before the 20 s of the test's patience


def test_a_body_may_take_longer_than_a_head(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_connection, "HEAD_SECONDS", 0.05)
    over = threading.Event()

    async def waits(scope: Scope, receive: Receive, send: Send) -> None:
        asyncio.get_running_loop().call_later(0.2, over.set)
        await receive()
        await reply(send, b"done")

    with connected(waits) as connection:
        connection.sendall(head("POST", 1))
        assert over.wait(20)
        connection.sendall(b"x")
        assert answer(connection) == (200, b"done")
