"""Authentication and TLS against Debian's docker-registry."""

from __future__ import annotations

import io
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from modelpack.errors import AuthError, RemoteUnavailableError
from modelpack.registry import Credential, StaticCredentials, TlsOptions
from modelpack.storage import Outcome
from tests.peers import docker_registry
from tests.registry.auth_servers import (
    HTPASSWD,
    PASSWORD,
    USER,
    Pair,
    TokenServer,
    make_pair,
    token_server,
)
from tests.registry.sources import Client, Connect, Content, read_all

pytestmark = pytest.mark.peer("docker-registry")

CONTENT = os.urandom(300_000)


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return make_pair(tmp_path_factory.mktemp("ca"), "authority")


@pytest.fixture(scope="module")
def server_pair(authority: Pair) -> Pair:
    return make_pair(authority.key.parent, "server", authority)


def tls_config(pair: Pair, clients: Path | None = None) -> str:
    """Return a replacement for the listener's part of docker-registry's configuration."""
    more = f", clientcas: [{clients}]" if clients else ""
    return f"{{certificate: {pair.certificate}, key: {pair.key}{more}}}"


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory, server_pair: Pair) -> Iterator[str]:
    """The host:port of a registry with a password, over TLS."""
    root = tmp_path_factory.mktemp("guarded")
    (root / "htpasswd").write_text(HTPASSWD)
    extra = f"auth: {{htpasswd: {{realm: Registry, path: {root / 'htpasswd'}}}}}"
    with docker_registry(root, extra, tls=tls_config(server_pair)) as host:
        yield host


def connect_as(connect: Connect, host: str, credential: Credential, ca: Path | None) -> Client:
    return connect(
        host,
        name=f"team/{os.urandom(6).hex()}",
        plain_http=False,
        credentials=StaticCredentials({host: credential}),
        tls=TlsOptions(ca_file=ca),
    )


def test_a_password_over_tls(guarded: str, connect: Connect, authority: Pair) -> None:
    client = connect_as(connect, guarded, Credential(USER, PASSWORD), authority.certificate)
    assert client.write(CONTENT) is Outcome.WRITTEN
    assert read_all(client.repository, Content(CONTENT).descriptor) == CONTENT
    assert client.sleeps == []


@pytest.mark.scenario(15)
def test_a_wrong_password_over_tls(guarded: str, connect: Connect, authority: Pair) -> None:
    client = connect_as(connect, guarded, Credential(USER, "wr0ng"), authority.certificate)
    with pytest.raises(AuthError, match="refused the credentials of 'ada'") as caught:
        client.registry.ping()
    assert "wr0ng" not in f"{caught.value!r} {caught.value}"


def test_a_certificate_that_nobody_vouches_for(guarded: str, connect: Connect) -> None:
    client = connect_as(connect, guarded, Credential(USER, PASSWORD), None)
    with pytest.raises(RemoteUnavailableError, match="not trusted"):
        client.registry.ping()


@pytest.fixture(scope="module")
def mutual(
    tmp_path_factory: pytest.TempPathFactory, authority: Pair, server_pair: Pair
) -> Iterator[str]:
    """The host:port of a registry that requires a client certificate."""
    root = tmp_path_factory.mktemp("mutual")
    with docker_registry(root, tls=tls_config(server_pair, authority.certificate)) as host:
        yield host


def test_a_client_certificate(mutual: str, connect: Connect, authority: Pair) -> None:
    ours = make_pair(authority.key.parent, "client", authority)
    tls = TlsOptions(authority.certificate, ours.certificate, ours.key)
    client = connect(mutual, plain_http=False, tls=tls)
    client.registry.ping()
    assert client.write(CONTENT) is Outcome.WRITTEN
    without = connect(mutual, plain_http=False, tls=TlsOptions(authority.certificate))
    with pytest.raises(RemoteUnavailableError, match="requires a client certificate") as caught:
        without.registry.ping()
    assert "--client-cert" in str(caught.value.hint)
    assert without.sleeps == []


@pytest.fixture(scope="module")
def signer(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return make_pair(tmp_path_factory.mktemp("signer"), "signer")


class Tokened:
    """A docker-registry that requires tokens, and its token server."""

    def __init__(self, host: str, server: TokenServer) -> None:
        self.host = host
        self.server = server


@pytest.fixture(scope="module")
def running(
    tmp_path_factory: pytest.TempPathFactory, signer: Pair, server_pair: Pair
) -> Iterator[Tokened]:
    root = tmp_path_factory.mktemp("tokened")
    with (
        token_server(signer, tls=server_pair) as server,
        docker_registry(root, server.registry_config(), tls=tls_config(server_pair)) as host,
    ):
        yield Tokened(host, server)


@pytest.fixture
def tokened(running: Tokened) -> Tokened:
    """The registry, with a new token server."""
    running.server.requests.clear()
    running.server.tokens.clear()
    running.server.expires_in, running.server.dies_after = 300, 300.0
    return running


@pytest.mark.parametrize(
    "credential",
    [Credential(USER, PASSWORD), Credential(identity_token="identity-token-of-ada")],
    ids=["password", "identity token"],
)
def test_tokens(
    tokened: Tokened, connect: Connect, authority: Pair, credential: Credential
) -> None:
    client = connect_as(connect, tokened.host, credential, authority.certificate)
    assert client.write(CONTENT) is Outcome.WRITTEN
    other = client.registry.repository(f"{client.repository.name}-copy")
    blob = Content(CONTENT).descriptor
    assert other.mount_blob(blob, client.repository)
    assert read_all(other, blob) == CONTENT
    push, mount = (" ".join(asked["scope"]).split() for asked in tokened.server.requests)
    name = client.repository.name
    assert push == [f"repository:{name}:pull,push"]
    assert set(mount) == {f"repository:{name}-copy:pull,push", f"repository:{name}:pull"}
    stranger = connect_as(connect, tokened.host, Credential(USER, "x"), authority.certificate)
    with pytest.raises(AuthError, match="refused by the token server"):
        stranger.registry.ping()


def test_strangers_may_pull_but_not_push(
    tokened: Tokened, connect: Connect, authority: Pair
) -> None:
    ours = connect_as(connect, tokened.host, Credential(USER, PASSWORD), authority.certificate)
    ours.write(CONTENT)
    tls = TlsOptions(authority.certificate)
    stranger = connect(tokened.host, name=ours.repository.name, plain_http=False, tls=tls)
    blob = Content(CONTENT).descriptor
    assert read_all(stranger.repository, blob) == CONTENT
    with pytest.raises(AuthError, match="none are stored for it"):
        stranger.write(b"other")


class Slow(Content):
    """Content whose second half comes `seconds` after the first."""

    def __init__(self, content: bytes, seconds: float) -> None:
        super().__init__(content)
        self._seconds = seconds

    @contextmanager
    def open(self, offset: int = 0) -> Iterator[Any]:
        half, wait = len(self.content) // 2, self._seconds

        class Stream(io.BytesIO):
            def readinto(self, buffer: Any) -> int:
                nonlocal wait
                if self.tell() >= half and wait:
                    threading.Event().wait(wait)  # this test is about time
                    wait = 0
                return super().readinto(buffer)

        self.opened += 1
        yield Stream(self.content[offset:])


@pytest.mark.long
@pytest.mark.parametrize(("life", "announced"), [(5, 5), (2, 300)])
@pytest.mark.scenario(10)
def test_a_slow_upload_outlasts_its_token(
    tokened: Tokened, connect: Connect, authority: Pair, life: int, announced: int
) -> None:
    server = tokened.server
    server.dies_after, server.expires_in = float(life), announced
    client = connect_as(connect, tokened.host, Credential(USER, PASSWORD), authority.certificate)
    slow = Slow(CONTENT * 10, server.dies_after + 1)
    outcome = client.repository.write_blob(slow.descriptor, slow, client.watch)
    assert outcome is Outcome.WRITTEN
    assert slow.opened == 1, "the content is sent once"
    assert client.write(CONTENT) is Outcome.WRITTEN
    assert read_all(client.repository, slow.descriptor) == slow.content
    assert len(server.tokens) >= 2
    assert client.sleeps == [], "an ended token costs no waiting"
