"""Sockets that a stop ends: plain, under TLS and through a proxy."""

from __future__ import annotations

import random
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from modelpack.errors import InterruptedTransferError, RemoteTimeoutError, RemoteUnavailableError
from modelpack.progress import Stop
from modelpack.registry import Timeouts
from modelpack.registry.sockets import InterruptibleSocket, waiting
from modelpack.storage import Outcome
from tests.peers import require
from tests.registry import faults
from tests.registry.faulty import FaultyRegistry
from tests.registry.sources import Client, Connect, Content, read_all

CONTENT = random.Random(31).randbytes(3_000_000)


@contextmanager
def stop_soon(stop: Stop, after: float = 0.1) -> Iterator[Callable[[], float]]:
    """Request a stop after a moment; yield a function of the seconds since then."""
    requested: list[float] = []

    def request() -> None:
        requested.append(time.monotonic())
        stop.request()

    timer = threading.Timer(after, request)
    timer.start()
    try:
        yield lambda: time.monotonic() - requested[0]
    finally:
        timer.join()


@pytest.fixture
def pair() -> Iterator[tuple[InterruptibleSocket, socket.socket]]:
    with socket.create_server(("127.0.0.1", 0)) as server, InterruptibleSocket() as ours:
        ours.settimeout(5)
        ours.connect(server.getsockname())
        theirs, _ = server.accept()
        with theirs:
            yield ours, theirs


def test_bytes_go_both_ways(pair: tuple[InterruptibleSocket, socket.socket]) -> None:
    ours, theirs = pair
    received = bytearray()

    def receive() -> None:
        while len(received) < len(CONTENT):
            received.extend(theirs.recv(100_000))

    thread = threading.Thread(target=receive)
    thread.start()
    ours.sendall(CONTENT)
    thread.join(10)
    assert received == CONTENT
    theirs.sendall(b"back")
    buffer = bytearray(10)
    assert ours.recv_into(buffer) == 4
    assert buffer[:4] == b"back"
    with ours.makefile("rb") as file:
        theirs.sendall(b"a line\n")
        assert file.readline() == b"a line\n"


def test_a_limit_longer_than_a_slice_is_kept(
    pair: tuple[InterruptibleSocket, socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("modelpack.registry.sockets.SLICE", 0.02)
    ours, _ = pair
    ours.settimeout(0.2)
    assert ours.gettimeout() == 0.2
    started = time.monotonic()
    with pytest.raises(TimeoutError):
        ours.recv_into(bytearray(1))
    assert 0.18 <= time.monotonic() - started < 2


def test_sending_has_a_limit_of_its_own(pair: tuple[InterruptibleSocket, socket.socket]) -> None:
    ours, _ = pair
    with waiting(Stop(), send_limit=0.1), pytest.raises(TimeoutError):
        ours.sendall(bytes(50_000_000))


@pytest.mark.parametrize("sending", [False, True])
def test_a_stop_ends_a_blocked_call(
    pair: tuple[InterruptibleSocket, socket.socket], sending: bool
) -> None:
    ours, _ = pair
    ours.settimeout(60)
    stop = Stop()
    call = ours.sendall if sending else ours.recv_into
    with waiting(stop, 60), stop_soon(stop) as ago, pytest.raises(InterruptedTransferError):
        call(bytearray(50_000_000))
    assert ago() < 1


def test_a_stop_ends_a_connection_that_is_not_answered() -> None:
    """A listener whose queue is full does not respond to further connections."""
    stop = Stop()
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen(0)
        fillers = [socket.socket() for _ in range(8)]
        try:
            for filler in fillers:
                filler.setblocking(False)
                filler.connect_ex(server.getsockname())
            with InterruptibleSocket() as ours, waiting(stop, 60), stop_soon(stop) as ago:
                ours.settimeout(30)
                with pytest.raises(InterruptedTransferError):
                    ours.connect(server.getsockname())
            assert ago() < 1
            with InterruptibleSocket() as ours:
                ours.settimeout(0.1)
                with pytest.raises(TimeoutError):
                    ours.connect(server.getsockname())
        finally:
            for filler in fillers:
                filler.close()


def test_a_name_that_is_looked_up_for_too_long(
    connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    never = threading.Event()

    def hang(*_: object, **__: object) -> object:
        never.wait(60)
        raise socket.gaierror(socket.EAI_AGAIN, "try again")

    monkeypatch.setattr(socket, "getaddrinfo", hang)
    try:
        client = connect("registry.invalid")
        with stop_soon(client.stop) as ago, pytest.raises(InterruptedTransferError):
            client.registry.ping()
        assert ago() < 1
        client = connect("registry.invalid", timeouts=Timeouts(connect=0.1))
        with pytest.raises(RemoteTimeoutError):
            client.registry.ping()
        assert len(client.sleeps) == 4
    finally:
        never.set()


def test_a_refused_connection_says_so() -> None:
    with socket.socket() as unused, InterruptibleSocket() as ours:
        unused.bind(("127.0.0.1", 0))
        ours.settimeout(5)
        with pytest.raises(ConnectionRefusedError):
            ours.connect(unused.getsockname())


def test_a_stop_ends_a_download(registry: FaultyRegistry, client: Client) -> None:
    blob = registry.put_blob(CONTENT)
    registry.faults.add("GET", "/blobs/", faults.silent_after(1_000_000))
    with stop_soon(client.stop) as ago, pytest.raises(InterruptedTransferError):
        read_all(client.repository, blob)
    assert ago() < 2


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A key and a certificate for 127.0.0.1 in one file."""
    directory = tmp_path_factory.mktemp("tls")
    key, certificate = directory / "key.pem", directory / "cert.pem"
    command = [str(require("openssl")), "req", "-x509", "-newkey", "rsa:2048", "-nodes"]
    command += ["-days", "2", "-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1"]
    command += ["-keyout", str(key), "-out", str(certificate)]
    subprocess.run(command, check=True, capture_output=True)
    both = directory / "both.pem"
    both.write_bytes(key.read_bytes() + certificate.read_bytes())
    return both


@pytest.fixture
def secure(certificate: Path) -> Iterator[FaultyRegistry]:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    with FaultyRegistry(tls=context) as registry:
        yield registry


@pytest.fixture
def trusted(certificate: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))


def secured(connect: Connect, registry: FaultyRegistry, **options: Any) -> Client:
    return connect(registry.host, plain_http=False, **options)


@pytest.mark.usefixtures("trusted")
def test_tls_both_ways(secure: FaultyRegistry, connect: Connect) -> None:
    client = secured(connect, secure)
    source = Content(CONTENT)
    outcome = client.repository.write_blob(source.descriptor, source, client.watch)
    assert outcome is Outcome.WRITTEN
    secure.faults.add("GET", "/blobs/", faults.cut_after(1_000_000))
    assert read_all(client.repository, source.descriptor) == CONTENT
    assert secure.count("GET", "/blobs/") == 2


def test_an_unknown_certificate_is_refused(secure: FaultyRegistry, connect: Connect) -> None:
    client = secured(connect, secure)
    with pytest.raises(RemoteUnavailableError, match=r"certificate of .* is not trusted") as caught:
        client.registry.ping()
    assert "SSL_CERT_FILE" in str(caught.value.hint)
    assert client.sleeps == []
    assert secure.requests == []


@pytest.mark.usefixtures("trusted")
def test_a_certificate_for_another_name_is_refused(
    secure: FaultyRegistry, connect: Connect
) -> None:
    client = connect(secure.host.replace("127.0.0.1", "localhost"), plain_http=False)
    with pytest.raises(RemoteUnavailableError, match="is not trusted"):
        client.registry.ping()


@pytest.mark.usefixtures("trusted")
@pytest.mark.parametrize("fault", [faults.silent, faults.silent_after(100_000)])
def test_a_stop_under_tls(secure: FaultyRegistry, connect: Connect, fault: faults.Fault) -> None:
    client = secured(connect, secure)
    blob = secure.put_blob(CONTENT)
    secure.faults.add("GET", "/blobs/", fault)
    with stop_soon(client.stop, 0.3) as ago, pytest.raises(InterruptedTransferError):
        read_all(client.repository, blob)
    assert ago() < 2


@pytest.mark.usefixtures("trusted")
@pytest.mark.scenario(35)
def test_a_stop_cancels_an_upload_under_tls(secure: FaultyRegistry, connect: Connect) -> None:
    client = secured(connect, secure)
    secure.faults.add("PUT", "/blobs/", faults.stalled_upload(1000))
    source = Content(bytes(30_000_000))
    with stop_soon(client.stop, 0.3) as ago, pytest.raises(InterruptedTransferError):
        client.repository.write_blob(source.descriptor, source, client.watch)
    assert ago() < 2
    assert secure.open_uploads == []


@pytest.mark.scenario(31)
def test_a_handshake_that_is_not_answered(connect: Connect) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        host = f"127.0.0.1:{server.getsockname()[1]}"
        client = connect(host, plain_http=False, timeouts=Timeouts(connect=0.1, idle=0.2))
        with pytest.raises(RemoteTimeoutError):
            client.registry.ping()
        client = connect(host, plain_http=False)
        with stop_soon(client.stop) as ago, pytest.raises(InterruptedTransferError):
            client.registry.ping()
        assert ago() < 2


def test_a_redirect_from_https_to_http_is_refused(
    secure: FaultyRegistry,
    registry: FaultyRegistry,
    connect: Connect,
    trusted: None,
) -> None:
    client = secured(connect, secure)
    blob = registry.put_blob(CONTENT)
    secure.faults.add("GET", "/blobs/", faults.redirecting(registry))
    with pytest.raises(Exception, match="from https to plain http"):
        read_all(client.repository, blob)
    assert registry.requests == []


def test_a_proxy_is_used_but_not_for_this_machine(
    registry: FaultyRegistry, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", registry.url)
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    client = connect("registry.invalid", plain_http=True)
    registry.faults.add("GET", "http://registry.invalid/v2/", faults.answering(200, b"{}"))
    client.registry.ping()
    assert registry.requests[0].path == "/v2/"
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    connect(registry.host).registry.ping()
    with pytest.raises(RemoteUnavailableError, match=r"the proxy before registry\.invalid"):
        client.registry.ping()
