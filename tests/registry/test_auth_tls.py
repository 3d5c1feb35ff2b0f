"""Certificates: which authorities are trusted for which host, and what a proxy sees."""

from __future__ import annotations

import base64
import select
import socket
import socketserver
import ssl
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization

from modelpack.errors import RemoteUnavailableError, UsageError
from modelpack.registry import Credential, StaticCredentials, TlsOptions
from tests.cli.running import modelpack, succeed
from tests.registry.auth_servers import Pair, make_pair
from tests.registry.faults import redirecting
from tests.registry.faulty import FaultyRegistry
from tests.registry.faulty_auth import BasicAuth
from tests.registry.sources import Client, Connect, manifest_for, read_all


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return make_pair(tmp_path_factory.mktemp("ca"), "authority")


@pytest.fixture(scope="module")
def server_pair(authority: Pair) -> Pair:
    return make_pair(authority.key.parent, "server", authority)


@pytest.fixture(scope="module")
def client_pair(authority: Pair) -> Pair:
    return make_pair(authority.key.parent, "client", authority)


def serve(pair: Pair, clients: Pair | None = None) -> FaultyRegistry:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pair.certificate, pair.key)
    if clients is not None:
        context.load_verify_locations(clients.certificate)
        context.verify_mode = ssl.CERT_REQUIRED
    return FaultyRegistry(tls=context)


@pytest.fixture
def secure(server_pair: Pair) -> Iterator[FaultyRegistry]:
    with serve(server_pair) as running:
        yield running


def over_tls(connect: Connect, host: str, tls: TlsOptions, **options: Any) -> Client:
    return connect(host, plain_http=False, tls=tls, **options)


def test_an_authority_by_option(
    secure: FaultyRegistry, connect: Connect, authority: Pair, client_pair: Pair
) -> None:
    over_tls(connect, secure.host, TlsOptions(authority.certificate)).registry.ping()
    with pytest.raises(RemoteUnavailableError, match="not trusted"):
        over_tls(connect, secure.host, TlsOptions(client_pair.certificate)).registry.ping()


def test_insecure_is_for_the_host_that_was_named(secure: FaultyRegistry, connect: Connect) -> None:
    over_tls(connect, secure.host, TlsOptions(insecure=frozenset({secure.host}))).registry.ping()
    for other in ("127.0.0.1", "other.example", f"localhost:{secure.host.partition(':')[2]}"):
        client = over_tls(connect, secure.host, TlsOptions(insecure=frozenset({other})))
        with pytest.raises(RemoteUnavailableError, match="not trusted"):
            client.registry.ping()


def test_insecure_does_not_extend_to_storage(
    server_pair: Pair, secure: FaultyRegistry, connect: Connect
) -> None:
    blob = secure.put_blob(b"weights")
    with serve(server_pair) as storage:
        storage.put_blob(b"weights")
        secure.faults.add("GET", "/blobs/", redirecting(storage), times=None)
        client = over_tls(connect, secure.host, TlsOptions(insecure=frozenset({secure.host})))
        with pytest.raises(RemoteUnavailableError, match=f"certificate of {storage.host}"):
            read_all(client.repository, blob)
        assert storage.requests == []


def test_a_client_certificate_is_for_the_registry_only(
    server_pair: Pair, authority: Pair, client_pair: Pair, connect: Connect
) -> None:
    tls = TlsOptions(authority.certificate, client_pair.certificate, client_pair.key)
    with serve(server_pair, authority) as registry, serve(server_pair, authority) as storage:
        client = over_tls(connect, registry.host, tls)
        blob = registry.put_blob(b"weights")
        assert read_all(client.repository, blob) == b"weights"
        storage.put_blob(b"weights")
        registry.faults.add("GET", "/blobs/", redirecting(storage), times=None)
        with pytest.raises(RemoteUnavailableError, match=f"{storage.host} requires a client"):
            read_all(client.repository, blob)
        assert storage.requests == []


@pytest.mark.parametrize("where", ["docker", "containers"])
def test_directories_of_certificates(
    server_pair: Pair,
    authority: Pair,
    client_pair: Pair,
    connect: Connect,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    where: str,
) -> None:
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path / "docker"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    with serve(server_pair, authority) as registry:
        folder = tmp_path / where / "certs.d" / registry.host
        folder.mkdir(parents=True)
        for source, name in (
            (authority.certificate, "ca.crt"),
            (client_pair.certificate, "client.cert"),
            (client_pair.key, "client.key"),
        ):
            (folder / name).write_bytes(source.read_bytes())
        over_tls(connect, registry.host, TlsOptions()).registry.ping()


def test_files_that_are_no_certificates(
    secure: FaultyRegistry, connect: Connect, client_pair: Pair, authority: Pair, tmp_path: Path
) -> None:
    empty = tmp_path / "empty.pem"
    empty.write_text("")
    sealed = tmp_path / "sealed.pem"
    sealed.write_bytes(
        client_pair.private.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.BestAvailableEncryption(b"x"),
        )
    )
    for options, problem in (
        (TlsOptions(empty), "no certificate"),
        (TlsOptions(tmp_path / "nowhere"), "cannot read"),
        (TlsOptions(client_certificate=client_pair.certificate), "as a certificate with its key"),
        (TlsOptions(None, client_pair.certificate, authority.key), "as a certificate with its key"),
        (TlsOptions(None, client_pair.certificate, sealed), "the key is encrypted"),
    ):
        client = over_tls(connect, secure.host, options)
        with pytest.raises(UsageError, match=problem):
            client.registry.ping()
        assert client.sleeps == []


def test_options_of_commands(secure: FaultyRegistry, authority: Pair, client_pair: Pair) -> None:
    manifest_for(secure)
    reference = f"{secure.host}/team/model:v1"
    remote = ["manifest", "--remote", "--https", reference]
    succeed(*remote, "--ca-file", authority.certificate)
    succeed(*remote, "--insecure", secure.host)
    pair = ["--client-cert", client_pair.certificate, "--client-key", client_pair.key]
    succeed(*remote, "--ca-file", authority.certificate, *pair)
    refused = modelpack(*remote)
    assert refused.code == 6
    assert "--ca-file" in refused.err


class Proxy(socketserver.ThreadingTCPServer):
    """An HTTP proxy that tunnels for clients with its password, and records their requests."""

    allow_reuse_address = True
    daemon_threads = True

    def __init__(self) -> None:
        self.heads: list[str] = []
        super().__init__(("127.0.0.1", 0), Tunnel)


class Tunnel(socketserver.StreamRequestHandler):
    """One connection through the proxy."""

    server: Proxy

    def handle(self) -> None:
        lines = [self.rfile.readline().decode()]
        while lines[-1].strip():
            lines.append(self.rfile.readline().decode())
        self.server.heads.append("".join(lines))
        password = base64.b64encode(b"pat:pr0xy-pw").decode()
        if f"Proxy-Authorization: Basic {password}" not in self.server.heads[-1]:
            self.wfile.write(b"HTTP/1.1 407 No\r\nContent-Length: 0\r\n\r\n")
            return
        port = int(lines[0].split()[1].rpartition(":")[2])
        with socket.create_connection(("127.0.0.1", port)) as beyond:
            self.wfile.write(b"HTTP/1.1 200 OK\r\n\r\n")
            sides = {self.connection: beyond, beyond: self.connection}
            while True:
                for side in select.select(list(sides), [], [])[0]:
                    content = side.recv(65536)
                    if not content:
                        return
                    sides[side].sendall(content)


@pytest.fixture
def proxy() -> Iterator[Proxy]:
    with Proxy() as running:
        threading.Thread(target=running.serve_forever, args=(0.05,), daemon=True).start()
        yield running
        running.shutdown()


@pytest.fixture
def named_pair(authority: Pair) -> Pair:
    return make_pair(authority.key.parent, "named", authority, "models.example")


def test_a_proxy_from_the_environment_sees_no_credentials(
    named_pair: Pair,
    authority: Pair,
    connect: Connect,
    proxy: Proxy,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with serve(named_pair) as registry:
        registry.auth = BasicAuth("ada", "s3cret")
        host = f"models.example:{registry.host.partition(':')[2]}"
        address = f"127.0.0.1:{proxy.server_address[1]}"
        monkeypatch.setenv("HTTPS_PROXY", f"http://pat:pr0xy-pw@{address}")
        source = StaticCredentials({host: Credential("ada", "s3cret")})
        tls = TlsOptions(authority.certificate)
        client = over_tls(connect, host, tls, credentials=source)
        client.registry.ping()
        assert [r.headers.get("proxy-authorization") for r in registry.requests] == [None, None]
        (head,) = proxy.heads
        assert head.startswith(f"CONNECT {host} ")
        assert "\r\nAuthorization" not in head
        monkeypatch.setenv("HTTPS_PROXY", f"http://pat:wr0ng@{address}")
        refused = over_tls(connect, host, tls, credentials=source)
        with pytest.raises(RemoteUnavailableError, match="the proxy before") as caught:
            refused.registry.ping()
        assert "wr0ng" not in f"{caught.value} {caught.value!r}"
        monkeypatch.setenv("NO_PROXY", "models.example")
        direct = over_tls(connect, host, tls, credentials=source)
        with pytest.raises(RemoteUnavailableError):
            direct.registry.ping()  # only the proxy can resolve this name
        assert len(proxy.heads) == 1 + 5
