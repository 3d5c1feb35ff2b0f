"""Endless replies, slow or large: each ends with an error, soon."""

from __future__ import annotations

import gzip
import itertools
import json
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from modelpack.artifacts.digest import Digest
from modelpack.errors import (
    AuthError,
    ModelpackError,
    RegistryError,
    RemoteTimeoutError,
    RemoteUnavailableError,
)
from modelpack.registry import RetryPolicy, Timeouts
from modelpack.registry.http_client import MAX_HEAD
from tests.registry import faults
from tests.registry.auth_servers import make_pair
from tests.registry.faulty import FaultyRegistry
from tests.registry.sources import Client, Connect, manifest_for, read_all

#: A limit of a second in place of minutes; a server that sends single bytes is far below it.
QUICK = Timeouts(connect=1, idle=0.3, minimum_speed=10_000, reply=5)
TWICE = RetryPolicy(tries=2, sleep=lambda _: None)
Call = Callable[[Client], object]
CALLS: dict[str, tuple[str, Call]] = {
    "resolve": ("HEAD", lambda client: client.repository.resolve("v1")),
    "manifest": ("GET", lambda client: client.repository.fetch_manifest_by_name("v1")),
    "tags": ("GET", lambda client: list(client.repository.tags())),
    "catalogue": ("GET", lambda client: list(client.registry.repositories())),
    "referrers": ("GET", lambda client: client.repository.referrers(Digest.of(b"x"))),
    "ping": ("GET", lambda client: client.registry.ping()),
    "upload": ("POST", lambda client: client.write(b"content")),
}


def dripping_head(exchange: faults.Exchange) -> None:
    """Send the head of a reply without end, a few bytes at a time."""
    exchange.receive()
    exchange.write(b"HTTP/1.1 200 OK\r\n")
    for number in itertools.count():
        exchange.write(b"X-%d: 1\r\n" % number)
        if exchange.registry.closing.wait(0.02):
            return


def endless(piece: bytes, head: bytes = b"") -> faults.Fault:
    """Send `head`, then `piece` again and again, as fast as it is read."""

    def send(exchange: faults.Exchange) -> None:
        exchange.receive()
        exchange.write(head)
        while not exchange.registry.closing.is_set():
            exchange.write(piece)

    return send


def dripping_body(exchange: faults.Exchange) -> None:
    """Announce a body and send it one byte at a time."""
    exchange.receive()
    exchange.send_head(200, {"Content-Length": "100000", "Content-Type": "application/json"})
    while not exchange.registry.closing.wait(0.02):
        exchange.write(b" ")


@pytest.mark.long
@pytest.mark.parametrize(
    ("name", "fault"),
    [
        (name, fault)
        for name, (method, _) in CALLS.items()
        for fault in (dripping_head, dripping_body)
        if method != "HEAD" or fault is dripping_head  # a reply to HEAD has no body
    ],
)
def test_a_reply_that_drips_is_given_up(
    registry: FaultyRegistry, connect: Connect, name: str, fault: faults.Fault
) -> None:
    method, call = CALLS[name]
    registry.faults.add(method, "", fault, times=None)
    client = connect(registry.host, timeouts=QUICK, retry=TWICE)
    with pytest.raises(RemoteTimeoutError, match="did not answer in time"):
        call(client)


def test_a_token_server_that_drips_is_given_up(registry: FaultyRegistry, connect: Connect) -> None:
    challenge = f'Bearer realm="{registry.url}/token",service="x"'
    registry.faults.add(
        "GET", "/v2/", faults.answering(401, WWW_Authenticate=challenge), times=None
    )
    registry.faults.add("GET", "/token", dripping_body, times=None)
    client = connect(registry.host, timeouts=QUICK, retry=TWICE)
    with pytest.raises(RemoteTimeoutError, match="token for"):
        client.registry.ping()


def test_a_body_that_is_fast_but_not_done_in_time_is_given_up(
    registry: FaultyRegistry, connect: Connect
) -> None:
    def steady(exchange: faults.Exchange) -> None:
        exchange.send_head(200, {"Content-Length": "3000000", "Content-Type": "application/json"})
        while not exchange.registry.closing.wait(0.01):
            exchange.write(b" " * 1000)

    registry.faults.add("GET", "", steady, times=None)
    timeouts = Timeouts(connect=1, idle=0.3, minimum_speed=10, reply=0.5)
    with pytest.raises(RemoteTimeoutError):
        CALLS["manifest"][1](connect(registry.host, timeouts=timeouts, retry=TWICE))


@pytest.mark.parametrize(
    "fault",
    [
        pytest.param(endless(b"HTTP/1.1 100 Continue\r\n\r\n"), id="interim responses"),
        pytest.param(
            endless(b"HTTP/1.1 100 Continue\r\nX-Any: %b\r\n\r\n" % (b"x" * 60_000)),
            id="large interim responses",
        ),
        pytest.param(endless(b"X-Any: 1\r\n" * 500, b"HTTP/1.1 200 OK\r\n"), id="headers"),
        pytest.param(endless(b"x" * 4096, b"HTTP/1.1 200 OK\r\nX-Any: "), id="a header"),
        pytest.param(endless(b"x" * 4096, b"HTTP/1.1 "), id="a status line"),
        pytest.param(
            endless(
                b"X-Any: 1\r\n" * 500, b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n"
            ),
            id="trailers",
        ),
        pytest.param(
            endless(b"x" * 4096, b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5;"),
            id="a chunk's extension",
        ),
        pytest.param(
            endless(b"x" * 4096, b"HTTP/1.1 500 No\r\nContent-Length: 999999999999\r\n\r\n"),
            id="an error's body",
        ),
        pytest.param(
            endless(b"x" * 4096, b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n\r\n"),
            id="a body",
        ),
    ],
)
@pytest.mark.parametrize("name", ["manifest", "tags", "upload", "ping"])
def test_a_reply_without_end_is_cut_off(
    registry: FaultyRegistry, connect: Connect, name: str, fault: faults.Fault
) -> None:
    method, call = CALLS[name]
    registry.faults.add(method, "", fault, times=None)
    with pytest.raises((RegistryError, RemoteUnavailableError)):
        call(connect(registry.host, retry=TWICE))


@pytest.mark.parametrize("code", [b"200 OK", b"206 Partial Content"])
def test_trailers_of_a_blob_without_end_are_cut_off(
    registry: FaultyRegistry, connect: Connect, code: bytes
) -> None:
    blob = registry.put_blob(b"weights")
    head = b"HTTP/1.1 %b\r\nTransfer-Encoding: chunked\r\n\r\n7\r\nweights\r\n0\r\n" % code
    registry.faults.add("GET", "/blobs/", endless(b"X-Any: 1\r\n" * 500, head), times=None)
    with pytest.raises(ModelpackError):
        read_all(connect(registry.host, retry=TWICE).repository, blob)


def test_large_headers_within_the_limit_are_taken(registry: FaultyRegistry, client: Client) -> None:
    descriptor, _ = manifest_for(registry)
    many = {f"X_{number}": "x" * 2000 for number in range(80)}
    assert MAX_HEAD > 80 * 2000
    registry.faults.add("HEAD", "", faults.with_headers(**many))
    assert client.repository.resolve("v1") == descriptor


def test_a_server_that_cuts_off_after_each_byte_is_given_up(
    registry: FaultyRegistry, client: Client
) -> None:
    blob = registry.put_blob(bytes(100_000))
    registry.faults.add("GET", "/blobs/", faults.cut_after(1), times=None)
    with pytest.raises(RemoteUnavailableError, match="given up after 5 tries"):
        read_all(client.repository, blob)
    assert registry.count("GET", "/blobs/") == 5


@pytest.mark.parametrize("later", ["1000000000", "9" * 400, "Fri, 31 Dec 9999 23:59:59 GMT"])
def test_a_wait_of_years_is_refused(registry: FaultyRegistry, client: Client, later: str) -> None:
    fault = faults.answering(503, Retry_After=later, Date="Thu, 01 Jan 1970 00:00:00 GMT")
    registry.faults.add("GET", "", fault, times=None)
    with pytest.raises(RemoteUnavailableError, match="asks to wait"):
        client.registry.ping()
    assert client.sleeps == []


@pytest.mark.parametrize("size", [20_000, 60_000])
def test_a_challenge_of_many_kilobytes(registry: FaultyRegistry, client: Client, size: int) -> None:
    for challenge in (f'Bearer realm="{"x" * size}"', "Basic " + 'a="b", ' * (size // 7)):
        registry.faults.add("GET", "", faults.answering(401, WWW_Authenticate=challenge))
        with pytest.raises((AuthError, RegistryError)):
            client.registry.ping()


@pytest.mark.long
@pytest.mark.parametrize("name", [*CALLS, "blob", "file"])
def test_numbers_that_are_not_decimal(
    registry: FaultyRegistry, connect: Connect, name: str
) -> None:
    """`isdigit` accepts `²`, which `int` refuses; and `int` refuses thousands of digits."""
    manifest_for(registry)
    blob = registry.put_blob(b"content")
    calls: dict[str, Call] = {name: call for name, (_, call) in CALLS.items()}
    calls["blob"] = lambda client: read_all(client.repository, blob)
    calls["file"] = lambda client: client.repository.open_file(blob).read()
    current: dict[str, str] = {}
    registry.faults.add("*", "", lambda at: faults.with_headers(**current)(at), times=None)
    numbers = ("\xb2", "9" * 5000)
    for header, value in itertools.product(("Content-Length", "OCI-Chunk-Min-Length"), numbers):
        current = {header: value}
        made = connect(registry.host, timeouts=QUICK, retry=TWICE)
        with made as client, suppress(ModelpackError):  # but no ValueError
            calls[name](client)


@pytest.mark.parametrize("encoding", ["gzip", "deflate", "br", "zstd"])
@pytest.mark.parametrize("name", ["manifest", "tags"])
def test_compressed_replies_are_not_expanded(
    registry: FaultyRegistry, client: Client, name: str, encoding: str
) -> None:
    """The client does not ask for compression; a kilobyte could become a gigabyte."""
    bomb = gzip.compress(b'{"tags":["' + b"x" * 1_000_000 + b'"]}')
    fault = faults.answering(200, bomb, Content_Encoding=encoding, Content_Type="application/json")
    registry.faults.add("GET", "", fault, times=None)
    with pytest.raises(ModelpackError) as caught:
        CALLS[name][1](client)
    assert "xxx" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "key"), [("tags", "tags"), ("catalogue", "repositories"), ("referrers", "manifests")]
)
def test_empty_pages_without_end_are_refused(
    registry: FaultyRegistry,
    client: Client,
    name: str,
    key: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("modelpack.registry.manifests.MAX_PAGES", 20)
    pages = itertools.count()
    kind = "application/vnd.oci.image.index.v1+json"
    body = json.dumps({"schemaVersion": 2, "mediaType": kind, key: []}).encode()

    def page(exchange: faults.Exchange) -> None:
        link = f'<{exchange.path}?last={next(pages)}>; rel="next"'
        faults.answering(200, body, Link=link, Content_Type=kind)(exchange)

    registry.faults.add("GET", "", page, times=None)
    with pytest.raises(RegistryError, match="list is too long: 0 entries on 21 pages"):
        CALLS[name][1](client)


@pytest.mark.parametrize(
    ("name", "key"), [("tags", "tags"), ("catalogue", "repositories"), ("referrers", "manifests")]
)
def test_large_pages_are_limited_together(
    registry: FaultyRegistry,
    client: Client,
    name: str,
    key: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A few entries on many pages: the list is also limited in bytes, as it is held in memory."""
    monkeypatch.setattr("modelpack.registry.manifests.MAX_LIST_BYTES", 50_000)
    pages = itertools.count()
    kind = "application/vnd.oci.image.index.v1+json"
    value = {"schemaVersion": 2, "mediaType": kind, key: [], "annotations": {"a": "x" * 9_000}}
    body = json.dumps(value).encode()

    def page(exchange: faults.Exchange) -> None:
        number = next(pages)
        link = {"Link": f'<{exchange.path}?last={number}>; rel="next"'} if number < 20 else {}
        faults.answering(200, body, Content_Type=kind, **link)(exchange)

    registry.faults.add("GET", "", page, times=None)
    with pytest.raises(RegistryError, match="list is too long: more than 50000 bytes on 6 pages"):
        CALLS[name][1](client)


@contextmanager
def handshaking_for_ever(certificate: Path, key: Path) -> Iterator[str]:
    """Yield the address of a TLS server that sends its handshake a byte at a time."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    closing = threading.Event()

    def serve(connection: socket.socket) -> None:
        incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        tls = context.wrap_bio(incoming, outgoing, server_side=True)
        with connection:
            incoming.write(connection.recv(65536))
            with suppress(ssl.SSLError):
                tls.do_handshake()
            for byte in outgoing.read():
                if closing.wait(0.02):
                    return
                try:
                    connection.sendall(bytes([byte]))
                except OSError:
                    return

    def accept(server: socket.socket) -> None:
        while not closing.is_set():
            try:
                connection, _ = server.accept()
            except OSError:
                return
            thread = threading.Thread(target=serve, args=(connection,))
            threads.append(thread)
            thread.start()

    threads: list[threading.Thread] = []
    with socket.create_server(("127.0.0.1", 0)) as server:
        acceptor = threading.Thread(target=accept, args=(server,))
        acceptor.start()
        try:
            yield f"127.0.0.1:{server.getsockname()[1]}"
        finally:
            closing.set()
            server.shutdown(socket.SHUT_RDWR)
            acceptor.join(10)
            for thread in threads:
                thread.join(10)


def test_a_handshake_that_drips_is_given_up(connect: Connect, tmp_path: Path) -> None:
    pair = make_pair(tmp_path, "server")
    with handshaking_for_ever(pair.certificate, pair.key) as host:
        client = connect(host, plain_http=False, timeouts=QUICK, retry=TWICE)
        with pytest.raises(RemoteTimeoutError):
            client.registry.ping()
