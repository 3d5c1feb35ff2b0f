"""Registries on the Internet cannot send clients to a private network (SSRF), whatever DNS says."""

from __future__ import annotations

import itertools
import socket
from collections.abc import Callable, Iterable
from typing import Any

import pytest

from modelpack.errors import AuthError, RegistryError
from modelpack.progress import silent
from modelpack.registry import StaticCredentials, TlsOptions
from modelpack.registry.auth import NOTHING, RegistryAuthenticator
from modelpack.registry.credentials import Credential
from modelpack.registry.sockets import InterruptibleSocket
from modelpack.registry.urls import ALLOW_PRIVATE, Scope, literal_scope, scope_of
from tests.registry import faults
from tests.registry.faulty import FaultyRegistry
from tests.registry.sources import Client, Connect, manifest_for, read_all

PUBLIC, OTHER, PRIVATE, LAN = "93.184.216.34", "1.1.1.1", "10.0.0.5", "192.168.7.8"
METADATA = "169.254.169.254"

Answers = dict[str, Iterable[list[str]]]


@pytest.fixture
def dns(monkeypatch: pytest.MonkeyPatch) -> Answers:
    """The addresses of names, by lookup; all of them are this machine."""
    answers: Answers = {}
    real_lookup, real_connect = socket.getaddrinfo, InterruptibleSocket.connect

    def look_up(host: str, port: int, **options: Any) -> list[Any]:
        if host not in answers:
            return list(real_lookup(host, port, **options))
        answers[host] = iter(answers[host])
        return [
            (socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port))
            for address in next(answers[host])
        ]

    def connect(self: InterruptibleSocket, address: Any) -> None:
        real_connect(self, ("127.0.0.1", address[1]) if ":" not in address[0] else address)

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    monkeypatch.setattr(InterruptibleSocket, "connect", connect)
    return answers


def always(*addresses: str) -> Iterable[list[str]]:
    return itertools.repeat(list(addresses))


def port_of(server: FaultyRegistry) -> str:
    return server.host.rpartition(":")[2]


@pytest.fixture
def at(registry: FaultyRegistry, dns: Answers, connect: Connect) -> Callable[..., Client]:
    """Make a client of the registry by a name that resolves to its address."""

    def made(address: str, **options: Any) -> Client:
        dns["registry.example"] = always(address)
        host = f"registry.example:{port_of(registry)}"
        return connect(host, plain_http=True, **options)

    return made


@pytest.mark.parametrize(
    ("address", "scope"),
    [
        (PUBLIC, Scope.PUBLIC),
        ("2606:4700:4700::1111", Scope.PUBLIC),
        ("::ffff:1.1.1.1", Scope.PUBLIC),
        ("64:ff9b::101:101", Scope.PUBLIC),
        ("10.1.2.3", Scope.PRIVATE),
        ("172.16.0.1", Scope.PRIVATE),
        ("192.168.0.1", Scope.PRIVATE),
        ("100.64.0.1", Scope.PRIVATE),
        ("100.100.100.200", Scope.PRIVATE),
        ("fc00::1", Scope.PRIVATE),
        ("fd00:ec2::254", Scope.PRIVATE),
        ("::ffff:10.0.0.1", Scope.PRIVATE),
        ("64:ff9b::a00:1", Scope.PRIVATE),
        ("64:ff9b:1::7f00:1", Scope.PRIVATE),
        ("2002:a00:1::", Scope.PRIVATE),
        ("127.0.0.1", Scope.LOOPBACK),
        ("127.9.9.9", Scope.LOOPBACK),
        ("0.0.0.0", Scope.LOOPBACK),
        ("::", Scope.LOOPBACK),
        ("::1", Scope.LOOPBACK),
        ("::ffff:127.0.0.1", Scope.LOOPBACK),
        ("::127.0.0.1", Scope.LOOPBACK),
        ("64:ff9b::7f00:1", Scope.LOOPBACK),
        (METADATA, Scope.SPECIAL),
        ("::ffff:169.254.169.254", Scope.SPECIAL),
        ("64:ff9b::a9fe:a9fe", Scope.SPECIAL),
        ("fe80::1", Scope.SPECIAL),
        ("fe80::1%eth0", Scope.SPECIAL),
        ("192.0.0.192", Scope.SPECIAL),
        ("fec0::1", Scope.SPECIAL),
        ("::ffff:0:127.0.0.1", Scope.SPECIAL),
        ("::5efe:127.0.0.1", Scope.SPECIAL),
        ("5f00::1", Scope.SPECIAL),
        ("224.0.0.1", Scope.SPECIAL),
        ("ff02::1", Scope.SPECIAL),
        ("nonsense", Scope.SPECIAL),
    ],
)
def test_scopes(address: str, scope: Scope) -> None:
    assert scope_of(address) is scope


@pytest.mark.parametrize("address", ["255.255.255.255", "240.0.0.1", "0.1.2.3", "198.18.0.1"])
def test_reserved_addresses_are_not_public(address: str) -> None:
    assert scope_of(address) is not Scope.PUBLIC


@pytest.mark.parametrize(
    ("host", "scope"),
    [
        ("2130706433", Scope.LOOPBACK),
        ("0x7f000001", Scope.LOOPBACK),
        ("0x7f.1", Scope.LOOPBACK),
        ("0177.0.0.1", Scope.LOOPBACK),
        ("127.1", Scope.LOOPBACK),
        ("0", Scope.LOOPBACK),
        ("[::1]", Scope.LOOPBACK),
        ("localhost", Scope.LOOPBACK),
        ("a.localhost.", Scope.LOOPBACK),
        ("2852039166", Scope.SPECIAL),
        ("[fe80::1%25eth0]", Scope.SPECIAL),
        ("10.1", Scope.PRIVATE),
        ("example.com", None),
        ("127.0.0.1.example.com", None),
    ],
)
def test_addresses_in_any_notation(host: str, scope: Scope | None) -> None:
    assert literal_scope(host) is scope


TARGETS = [
    "127.0.0.1", "localhost", "[::1]", "[::ffff:127.0.0.1]", "2130706433", "0x7f.1", "0177.0.0.1",
    "0", "0.0.0.0", PRIVATE, LAN, METADATA, "[::ffff:a9fe:a9fe]", "[fe80::1]", "[fd00::1]",
    "[64:ff9b::7f00:1]", "storage.internal", "metadata.internal",
]  # fmt: skip


@pytest.mark.parametrize("target", TARGETS)
def test_a_public_registry_does_not_redirect_into_private_networks(
    registry: FaultyRegistry,
    storage: FaultyRegistry,
    dns: Answers,
    at: Callable[..., Client],
    target: str,
) -> None:
    dns["storage.internal"], dns["metadata.internal"] = always(PRIVATE), always(METADATA)
    client = at(PUBLIC)
    blob = storage.put_blob(b"secret")
    url = f"http://{target}:{port_of(storage)}/v2/team/model/blobs/{blob.digest}"
    registry.faults.add("*", "/v2/", faults.redirecting(url), times=None)
    for call in (
        lambda: read_all(client.repository, blob),
        lambda: client.repository.fetch_manifest_by_name("v1"),
        lambda: list(client.repository.tags()),
        lambda: client.repository.open_file(blob).read(1),
    ):
        with pytest.raises(RegistryError, match="refused to connect") as caught:
            call()
        assert "--allow-private" in str(caught.value.hint)
    assert storage.requests == []
    assert client.sleeps == []


def test_nor_by_upload_locations_mounts_and_token_realms(
    registry: FaultyRegistry, storage: FaultyRegistry, at: Callable[..., Client]
) -> None:
    client = at(PUBLIC)
    away = f"http://{PRIVATE}:{port_of(storage)}/v2/upload"
    registry.faults.add("POST", "/uploads/", faults.answering(202, Location=away), times=None)
    with pytest.raises(RegistryError, match="refused to connect"):
        client.write(b"content")
    other = client.registry.repository("team/other")
    blob = registry.put_blob(b"weights")
    assert client.repository.mount_blob(blob, other) is False
    with pytest.raises(RegistryError, match="refused to connect"):
        client.write(b"weights, again")
    challenge = f'Bearer realm="http://{PRIVATE}:{port_of(storage)}/token"'
    registry.faults.clear()
    registry.faults.add("GET", "/v2/", faults.answering(401, WWW_Authenticate=challenge))
    with pytest.raises(RegistryError, match="refused to connect"):
        client.registry.ping()
    assert storage.requests == []


def test_a_name_that_means_another_address_later_is_refused(
    registry: FaultyRegistry, dns: Answers, at: Callable[..., Client]
) -> None:
    """DNS rebinding: a registry whose name was public cannot become this machine."""
    client = at(PUBLIC)
    dns["registry.example"] = iter([[PUBLIC], ["127.0.0.1"], [METADATA]])
    client.registry.ping()
    registry.faults.add("GET", "", lambda exchange: exchange.cut(), times=1)
    with pytest.raises(RegistryError, match="refused to connect") as caught:
        client.registry.ping()
    assert "127.0.0.1" in str(caught.value)


def test_of_several_addresses_the_public_one_is_taken(
    registry: FaultyRegistry, storage: FaultyRegistry, dns: Answers, at: Callable[..., Client]
) -> None:
    client = at(PUBLIC)
    dns["storage.example"] = always(PRIVATE, METADATA, OTHER)
    blob = storage.put_blob(b"weights")
    url = f"http://storage.example:{port_of(storage)}/v2/team/model/blobs/{blob.digest}"
    registry.faults.add("GET", "/blobs/", faults.redirecting(url))
    assert read_all(client.repository, blob) == b"weights"


@pytest.mark.parametrize(
    ("own", "target", "followed"),
    [
        (PUBLIC, OTHER, True),
        (PUBLIC, "registry.example", True),
        (PRIVATE, OTHER, True),
        (PRIVATE, LAN, True),
        (PRIVATE, "127.0.0.1", False),
        (PRIVATE, METADATA, False),
        ("127.0.0.1", OTHER, True),
        ("127.0.0.1", LAN, True),
        ("127.0.0.1", "localhost", True),
        ("127.0.0.1", METADATA, False),
        (METADATA, "127.0.0.1", True),
    ],
)
def test_a_registry_leads_as_far_as_it_is_itself(
    registry: FaultyRegistry,
    storage: FaultyRegistry,
    at: Callable[..., Client],
    own: str,
    target: str,
    followed: bool,
) -> None:
    client = at(own)
    blob = storage.put_blob(b"weights")
    url = f"http://{target}:{port_of(storage)}/v2/team/model/blobs/{blob.digest}"
    registry.faults.add("GET", "/blobs/", faults.redirecting(url))
    if followed:
        assert read_all(client.repository, blob) == b"weights"
        return
    with pytest.raises(RegistryError, match="refused to connect"):
        read_all(client.repository, blob)
    assert storage.requests == []


@pytest.mark.parametrize("how", ["host", "netloc", "environment"])
def test_a_host_that_is_allowed(
    registry: FaultyRegistry,
    storage: FaultyRegistry,
    dns: Answers,
    at: Callable[..., Client],
    monkeypatch: pytest.MonkeyPatch,
    how: str,
) -> None:
    dns["storage.internal"] = always(PRIVATE)
    netloc = f"storage.internal:{port_of(storage)}"
    allowed = {"host": {"Storage.Internal"}, "netloc": {netloc}}.get(how, set())
    if how == "environment":
        monkeypatch.setenv(ALLOW_PRIVATE, f"other.internal, {netloc}")
    client = at(PUBLIC, tls=TlsOptions(allow_private=frozenset(allowed)))
    blob = storage.put_blob(b"weights")
    url = f"http://{netloc}/v2/team/model/blobs/{blob.digest}"
    registry.faults.add("GET", "/blobs/", faults.redirecting(url))
    assert read_all(client.repository, blob) == b"weights"


def test_a_proxy_is_not_asked_for_private_addresses(
    registry: FaultyRegistry,
    storage: FaultyRegistry,
    connect: Connect,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The client cannot see how the proxy resolves a name, but it can check an address."""
    monkeypatch.setenv("http_proxy", registry.url)
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    client = connect("registry.invalid", plain_http=True)
    descriptor, raw = manifest_for(registry)
    for target in (METADATA, "2852039166", PRIVATE, "[::1]", f"127.0.0.1:{port_of(storage)}"):
        before = len(registry.requests)
        registry.faults.add("GET", "", faults.redirecting(f"http://{target}/v2/x"))
        with pytest.raises(RegistryError, match="refused to connect"):
            client.repository.fetch_manifest(descriptor)
        assert len(registry.requests) == before + 1
    assert storage.requests == []
    assert client.repository.fetch_manifest(descriptor) == raw


@pytest.mark.parametrize(
    "realm", ["http://127.0.0.1/token", "http://localhost/t", "http://a.example/"]
)
def test_a_registry_by_https_has_no_token_realm_by_http(realm: str) -> None:
    credentials = StaticCredentials({"registry.example": Credential.of_pair("ann", "pw", "test")})

    def request(url: str, **_: Any) -> bytes:
        raise AssertionError(f"{url} was asked")

    for host in ("registry.example", "127.0.0.1:5000"):
        authenticator = RegistryAuthenticator(host, credentials, request, report=silent)
        with pytest.raises(AuthError, match="is plain http"):
            authenticator.answer(f'Bearer realm="{realm}"', None, NOTHING)


@pytest.mark.parametrize("scheme", ["socks5", "socks5h", "SOCKS4a", "ftp"])
def test_proxies_that_go_round_the_checks_are_refused(
    registry: FaultyRegistry,
    connect: Connect,
    monkeypatch: pytest.MonkeyPatch,
    scheme: str,
) -> None:
    """A SOCKS proxy would use its own sockets, which check no address, certificate or time."""
    monkeypatch.setenv("all_proxy", f"{scheme}://user:secret@{registry.host}")
    for name in ("no_proxy", "NO_PROXY", "http_proxy", "HTTP_PROXY"):
        monkeypatch.delenv(name, raising=False)
    client = connect("registry.invalid", plain_http=True)
    with pytest.raises(RegistryError, match="is not supported, only http and https") as caught:
        client.registry.ping()
    assert "secret" not in str(caught.value)
    assert client.sleeps == [], "it is not tried again"
    assert registry.requests == []
