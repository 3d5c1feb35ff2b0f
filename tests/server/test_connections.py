"""The registry on a raw connection: large bodies both ways, and unusual clients."""

from __future__ import annotations

import hashlib
import http.client
import random
import socket
import ssl
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import IO

import pytest
import requests

from modelpack.registry_server import RegistryServer
from modelpack.registry_server.uploads import Limits
from tests.registry.auth_servers import make_pair
from tests.server.conftest import Client, digest_of

MIB = 1024 * 1024
CONTENT = random.Random(11).randbytes(3 * MIB + 4567)
DIGEST = digest_of(CONTENT)
PATH = f"/v2/raw/blob/blobs/{DIGEST}"


@pytest.fixture(autouse=True, scope="module")
def blob(server: RegistryServer) -> None:
    Client(server.url, "raw/blob").push_blob(CONTENT)


@contextmanager
def connected(host: str, buffer: int | None = None) -> Iterator[socket.socket]:
    """Connect, with a receive buffer of `buffer` bytes."""
    name, _, port = host.rpartition(":")
    with closing(socket.socket()) as connection:
        if buffer is not None:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
        connection.settimeout(30)
        connection.connect((name, int(port)))
        yield connection


def head(method: str, path: str, *fields: str) -> bytes:
    return "\r\n".join((f"{method} {path} HTTP/1.1", "Host: 127.0.0.1", *fields, "", "")).encode()


def read_answer(stream: IO[bytes], method: str = "GET") -> tuple[int, dict[str, str], bytes]:
    """Return the next response of a connection: status, header fields, body by Content-Length."""
    status = int(stream.readline().split()[1])
    lines = [line.decode().rstrip("\r\n") for line in iter(stream.readline, b"\r\n")]
    fields = {name.lower(): value.strip() for name, _, value in (x.partition(":") for x in lines)}
    has_body = method != "HEAD" and status not in (100, 204)
    return status, fields, stream.read(int(fields.get("content-length", "0")) if has_body else 0)


def test_requests_in_a_row_without_waiting(server: RegistryServer) -> None:
    """Whole blob, range, HEAD, an error and the blob again, in pipelined requests."""
    asked = [
        ("GET", PATH, [], 200, CONTENT),
        ("GET", PATH, [f"Range: bytes=5-{2 * MIB}"], 206, CONTENT[5 : 2 * MIB + 1]),
        ("HEAD", PATH, [], 200, b""),
        ("GET", PATH, ["Range: bytes=9999999-"], 416, b""),
        ("GET", PATH, ["Range: bytes=-1"], 206, CONTENT[-1:]),
        ("GET", PATH, [], 200, CONTENT),
    ]
    with connected(server.host) as connection, connection.makefile("rb") as stream:
        requests_ = b"".join(head(method, path, *fields) for method, path, fields, _, _ in asked)
        connection.sendall(requests_)
        for method, _, _, status, body in asked:
            found, fields, content = read_answer(stream, method)
            assert (found, len(content)) == (status, len(body))
            assert content == body
            if method == "HEAD":
                assert fields["content-length"] == str(len(CONTENT))


def test_a_client_that_reads_in_drops(server: RegistryServer) -> None:
    """The socket's buffer is small, so the server waits for the client hundreds of times."""
    with connected(server.host, buffer=4096) as connection:
        connection.sendall(head("GET", PATH) + head("GET", PATH, "Range: bytes=0-0"))
        with connection.makefile("rb", buffering=2048) as stream:
            assert read_answer(stream)[2] == CONTENT
            assert read_answer(stream)[2] == CONTENT[:1]


@pytest.mark.parametrize("version", ["1.0", "1.1"])
def test_a_connection_that_closes_after_the_answer(server: RegistryServer, version: str) -> None:
    request = head("GET", PATH, "Connection: close").replace(
        b"HTTP/1.1", f"HTTP/{version}".encode()
    )
    with connected(server.host) as connection, connection.makefile("rb") as stream:
        connection.sendall(request)
        status, fields, content = read_answer(stream)
        assert (status, fields["connection"]) == (200, "close")
        assert content == CONTENT
        assert stream.read() == b""


def test_downloads_over_tls(tmp_path: Path) -> None:
    """Downloads without `sendfile`."""
    authority = make_pair(tmp_path, "authority")
    pair = make_pair(tmp_path, "server", authority)
    context = ssl.create_default_context(cafile=str(authority.certificate))
    tls = (pair.certificate, pair.key)
    with RegistryServer(tmp_path / "store", address="127.0.0.1:0", tls=tls) as server:
        connection = http.client.HTTPSConnection(server.host, context=context, timeout=30)
        connection.request("POST", f"/v2/raw/blob/blobs/uploads/?digest={DIGEST}", body=CONTENT)
        assert connection.getresponse().read() == b""
        for method, asked, status, body in (
            ("GET", {}, 200, CONTENT),
            ("HEAD", {}, 200, b""),
            ("GET", {"Range": f"bytes={MIB}-{2 * MIB}"}, 206, CONTENT[MIB : 2 * MIB + 1]),
            ("GET", {}, 200, CONTENT),
        ):
            connection.request(method, PATH, headers=asked)
            answer = connection.getresponse()
            assert (answer.status, answer.read() == body) == (status, True)
        connection.close()


def upload_path(client: Client) -> str:
    return client.upload().removeprefix(client.base)


def test_more_than_content_length_says(client: Client, server: RegistryServer) -> None:
    """The blob ends at its announced length; the bytes after it end the connection."""
    content = CONTENT + b"more"
    request = head(
        "PUT",
        f"{upload_path(client)}?digest={digest_of(content)}",
        f"Content-Length: {len(content)}",
    )
    with connected(server.host) as connection, connection.makefile("rb") as stream:
        connection.sendall(request + content + b"these bytes were not announced\r\n\r\n")
        assert read_answer(stream)[0] == 201
        assert read_answer(stream)[0] == 400
        assert stream.read().endswith(b"\r\n0\r\n\r\n")  # and it ends
    assert client.request("GET", f"blobs/{digest_of(content)}").content == content


def resume(client: Client, path: str, content: bytes) -> int:
    """Send what the upload lacks; return how many bytes it had."""
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:  # until the server has detected it and released the upload
        status = client.request("GET", path)
        staged = int(status.headers["Range"].removeprefix("0-")) + 1
        staged -= staged == 1  # `0-0` also means nothing
        if staged == len(content):
            return staged
        answer = client.patch(client.base + path, content[staged:], staged)
        if answer.status_code not in (409, 416):
            break
    assert answer.status_code == 202
    return staged


@pytest.mark.parametrize("reset", [False, True], ids=["closes", "resets"])
def test_less_than_content_length_says(client: Client, server: RegistryServer, reset: bool) -> None:
    """The received bytes are kept, and the upload resumes after them."""
    content = CONTENT + f"{reset}".encode()
    path = upload_path(client)
    with connected(server.host) as connection:
        length = f"Content-Length: {len(content)}"
        connection.sendall(head("PATCH", path, length) + content[: 2 * MIB + 77])
        deadline = time.monotonic() + 20
        while client.request("GET", path).headers["Range"] == "0-0":  # until it is under way
            assert time.monotonic() < deadline
        if reset:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    staged = resume(client, path, content)
    assert staged <= 2 * MIB + 77
    assert client.put(client.base + path, digest_of(content)).status_code == 201


def test_a_stream_in_chunks_of_any_size(client: Client, server: RegistryServer) -> None:
    path, sizes = upload_path(client), random.Random(2)
    with connected(server.host) as connection, connection.makefile("rb") as stream:
        connection.sendall(head("PATCH", path, "Transfer-Encoding: chunked"))
        at = 0
        while at < len(CONTENT):
            chunk = CONTENT[at : at + sizes.choice([1, 100, 4096, 200_000, MIB])]
            connection.sendall(b"%x\r\n%b\r\n" % (len(chunk), chunk))
            at += len(chunk)
        connection.sendall(b"0\r\n\r\n")
        status, fields, _ = read_answer(stream)
        assert (status, fields["range"]) == (202, f"0-{len(CONTENT) - 1}")
        # The connection goes on.
        connection.sendall(head("PUT", f"{path}?digest={DIGEST}", "Content-Length: 0"))
        assert read_answer(stream)[0] == 201


def test_a_stream_that_breaks_off_is_not_a_whole_one(
    client: Client, server: RegistryServer
) -> None:
    """An upload without the last chunk is not finished, even if the digest matches."""
    path, content = upload_path(client), CONTENT + b"no end"
    put = head("PUT", f"{path}?digest={digest_of(content)}", "Transfer-Encoding: chunked")
    with connected(server.host) as connection, connection.makefile("rb") as stream:
        connection.sendall(put + b"%x\r\n%b\r\n" % (len(content), content))
        connection.shutdown(socket.SHUT_WR)
        assert b" 201 " not in stream.readline()
    assert client.request("HEAD", f"blobs/{digest_of(content)}").status_code == 404
    resume(client, path, content)  # uvicorn drops what it has not handed on when a client ends
    assert client.put(client.base + path, digest_of(content)).status_code == 201


def test_a_client_that_asks_first_is_told_before_it_sends(tmp_path: Path) -> None:
    limits = Limits(upload=4 * MIB)
    with RegistryServer(tmp_path / "store", address="127.0.0.1:0", limits=limits) as server:
        client = Client(server.url, "raw/asks")
        with connected(server.host) as connection, connection.makefile("rb") as stream:
            path = upload_path(client)
            length = f"Content-Length: {len(CONTENT)}"
            put = head("PUT", f"{path}?digest={DIGEST}", length, "Expect: 100-continue")
            connection.sendall(put)
            assert read_answer(stream)[0] == 100
            connection.sendall(CONTENT)
            assert read_answer(stream)[0] == 201
            path = upload_path(client)
            length = f"Content-Length: {5 * MIB}"
            connection.sendall(head("PATCH", path, length, "Expect: 100-continue"))
            status, fields, _ = read_answer(stream)
            assert (status, fields["connection"]) == (413, "close")
            assert stream.read() == b""


def test_many_at_once_get_what_they_asked_for(server: RegistryServer) -> None:
    """Uploads and downloads over eight connections, each used many times."""
    problems: list[str] = []

    def work(number: int) -> None:
        chance = random.Random(number)
        connection = http.client.HTTPConnection(server.host, timeout=30)
        for turn in range(6):
            mine = chance.randbytes(chance.choice([10, 70_000, MIB, 2 * MIB + 3]))
            digest = digest_of(mine)
            where = f"/v2/raw/many/blobs/uploads/?digest={digest}"
            connection.request("POST", where, body=mine)
            if connection.getresponse().read() != b"":
                problems.append(f"{number} {turn}: refused")
            first = chance.randrange(len(mine))
            asked = {"Range": f"bytes={first}-"}
            connection.request("GET", f"/v2/raw/many/blobs/{digest}", headers=asked)
            if connection.getresponse().read() != mine[first:]:
                problems.append(f"{number} {turn}: other bytes")
        connection.close()

    workers = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert problems == []


def stopping(server: RegistryServer) -> threading.Thread:
    """Ask the server to stop; return when it accepts no more connections."""
    thread = threading.Thread(target=server.stop)
    url = server.url
    thread.start()
    for _ in range(5000):
        try:
            requests.get(f"{url}/v2/", timeout=10)
        except requests.ConnectionError:
            return thread
    raise AssertionError("the server goes on taking connections")


def test_a_download_is_finished_before_the_server_stops(tmp_path: Path) -> None:
    content = random.Random(6).randbytes(24 * MIB)  # more than sockets buffer
    server = RegistryServer(tmp_path / "store", address="127.0.0.1:0", grace=30)
    server.start()
    Client(server.url, "raw/stop").push_blob(content)
    with connected(server.host, buffer=65536) as connection, connection.makefile("rb") as stream:
        connection.sendall(head("GET", f"/v2/raw/stop/blobs/{digest_of(content)}"))
        assert stream.readline().startswith(b"HTTP/1.1 200 ")
        thread = stopping(server)
        fields = list(iter(stream.readline, b"\r\n"))
        assert fields
        received = hashlib.sha256()
        while chunk := stream.read(MIB):
            received.update(chunk)
    thread.join(30)
    assert not thread.is_alive()
    assert f"sha256:{received.hexdigest()}" == digest_of(content)


def test_what_came_of_an_upload_is_kept_when_the_server_stops(tmp_path: Path) -> None:
    came = 2 * MIB + 99
    server = RegistryServer(tmp_path / "store", address="127.0.0.1:0", grace=0)
    server.start()
    path = upload_path(Client(server.url, "raw/stop"))
    with connected(server.host) as connection:
        connection.sendall(head("PATCH", path, f"Content-Length: {len(CONTENT)}"))
        connection.sendall(CONTENT[:came])
        requests.get(f"{server.url}/v2/", timeout=10)  # it has seen the upload by now
        server.stop()
    with RegistryServer(tmp_path / "store", address="127.0.0.1:0") as again:
        client = Client(again.url, "raw/stop")
        status = client.request("GET", again.url + path)
        staged = int(status.headers["Range"].removeprefix("0-")) + 1
        assert 2 * MIB <= staged <= came
        rest = client.put(again.url + path, DIGEST, CONTENT[staged:])
        assert rest.status_code == 201
