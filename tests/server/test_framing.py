"""Requests that two servers in a row may frame differently are refused: RFC 9112 section 11.2."""

from __future__ import annotations

import http.client
import re
import socket
from contextlib import closing

import pytest

from modelpack.registry_server import RegistryServer

SECOND = b"GET /v2/second HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"
POST = "POST /v2/x/blobs/uploads/ HTTP/1.1\r\nHost: 127.0.0.1\r\n"
CHUNKED = "Transfer-Encoding: chunked\r\n"


def exchanged(host: str, sent: bytes) -> bytes:
    """Send `sent`; return all that the server sends until it closes the connection."""
    name, _, port = host.rpartition(":")
    with closing(socket.create_connection((name, int(port)), timeout=20)) as connection:
        connection.sendall(sent)
        received = b""
        try:
            while part := connection.recv(65536):
                received += part
        except ConnectionResetError:
            pass  # it closed before it had read all; the response has arrived
        return received


@pytest.mark.parametrize(
    "head",
    [
        POST + CHUNKED + "Content-Length: 5\r\n\r\n0\r\n\r\n",
        POST + "Content-Length: 5\r\n" + CHUNKED + "\r\n0\r\n\r\n",
        POST + "Content-Length: 0\r\n" + CHUNKED + "\r\n0\r\n\r\n",
        POST.replace("HTTP/1.1", "HTTP/1.0") + CHUNKED + "\r\n0\r\n\r\n",
        POST + "Content-Length: 5\r\nContent-Length: 6\r\n\r\nhello",
        POST + "Content-Length: 5, 6\r\n\r\nhello",
        POST + "Content-Length: +5\r\n\r\nhello",
        POST + "Content-Length: 0x5\r\n\r\nhello",
        POST + "Content-Length: -1\r\n\r\n",
        POST + "Content-Length: 5 5\r\n\r\nhello",
        POST + "Content-Length : 5\r\n\r\nhello",
        POST + f"Content-Length: {'9' * 40}\r\n\r\nhello",
        POST + "Transfer-Encoding : chunked\r\n\r\n0\r\n\r\n",
        POST + "Transfer-Encoding: chunked, identity\r\n\r\n0\r\n\r\n",
        POST + "Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n",
        POST + "Transfer-Encoding: identity\r\nContent-Length: 0\r\n\r\n",
        POST + "Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
        POST + CHUNKED + CHUNKED + "\r\n0\r\n\r\n",
        POST + "Transfer-Encoding:\r\n chunked\r\n\r\n0\r\n\r\n",
        POST + "X-Any: one\r\n two\r\nContent-Length: 0\r\n\r\n",
        POST + "X-Any: one\r\n\tTransfer-Encoding: chunked\r\nContent-Length: 0\r\n\r\n",
        POST + "Content-Length: 0\n\r\n",
        (POST + "Content-Length: 0\r\n\r\n").replace("\r\n", "\n"),
        POST + "X-Any: a\rContent-Length: 5\r\n\r\n",
        POST + "X-Any: a\0b\r\nContent-Length: 0\r\n\r\n",
        POST + "Host: elsewhere\r\nContent-Length: 0\r\n\r\n",
        POST + CHUNKED + "\r\n5\nhello\r\n0\r\n\r\n",
        POST + CHUNKED + "\r\n0x5\r\nhello\r\n0\r\n\r\n",
        POST + CHUNKED + "\r\n-5\r\nhello\r\n0\r\n\r\n",
        POST + CHUNKED + "\r\n5\r\nhelloXX0\r\n\r\n",
        POST + CHUNKED + f"\r\n{'f' * 40}\r\nhello\r\n0\r\n\r\n",
        POST + CHUNKED + "\r\n5;a=b\rc\r\nhello\r\n0\r\n\r\n",
        POST + CHUNKED + "\r\n5;a=b\nc\r\nhello\r\n0\r\n\r\n",
        POST + CHUNKED + "\r\n0\r\nX-Trailer: a\nb: c\r\n\r\n",
    ],
)
def test_what_proxies_may_read_otherwise_is_refused(server: RegistryServer, head: str) -> None:
    received = exchanged(server.host, head.encode() + SECOND)
    # At most one response, after which nothing is read: the second request is not served.
    assert received.count(b"HTTP/1.1 ") == 1, received
    assert b"second" not in received
    assert b"connection: close" in received.lower()


def test_an_error_ends_a_pipeline(server: RegistryServer) -> None:
    first = b"GET /v2/ HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"
    wrong = (POST + CHUNKED + "Content-Length: 5\r\n\r\n0\r\n\r\n").encode()
    received = exchanged(server.host, first + wrong + SECOND)
    assert re.findall(rb"HTTP/1\.1 (\d+)", received) == [b"200", b"400"]


def test_chunk_extensions_and_trailers_are_read_past(server: RegistryServer) -> None:
    sound = POST + CHUNKED + '\r\n0;name="value"\r\nX-Trailer: 1\r\n\r\n'
    last = "GET /v2/ HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n"
    received = exchanged(server.host, (sound + last).encode())
    assert received.count(b"HTTP/1.1 2") == 2


def test_a_body_that_goes_wrong_after_its_answer_ends_quietly(
    server: RegistryServer, caplog: pytest.LogCaptureFixture
) -> None:
    name, _, port = server.host.rpartition(":")
    head = "PUT /v2/x/nothing HTTP/1.1\r\nHost: 127.0.0.1\r\n" + CHUNKED
    with closing(socket.create_connection((name, int(port)), timeout=20)) as connection:
        connection.sendall(f"{head}\r\n5\r\nhello\r\n".encode())
        answer = http.client.HTTPResponse(connection)
        answer.begin()
        assert (answer.status, bool(answer.read())) == (404, True)
        connection.sendall(b"zz\r\n" + SECOND)
        assert connection.recv(65536) == b""
    assert not [record for record in caplog.records if record.name == "asyncio"]
