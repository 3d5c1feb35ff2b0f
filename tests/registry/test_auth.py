"""Authentication of the client; the numbers are those of the fault scenarios."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

from modelpack.errors import AuthError, DeniedError, RemoteUnavailableError
from modelpack.progress import Action
from modelpack.registry import Credential, StaticCredentials
from modelpack.registry.auth import RegistryAuthenticator, repository_scopes
from modelpack.storage import Outcome
from tests.registry import faults
from tests.registry.faulty import FaultyRegistry
from tests.registry.faulty_auth import BasicAuth, BearerAuth, basic
from tests.registry.sources import Client, Connect, Content, manifest_for, read_all

CONTENT = random.Random(10).randbytes(500_000)
ADA = Credential("ada", "s3cret", source="a test")


def as_ada(registry: FaultyRegistry, connect: Connect, credential: Credential = ADA) -> Client:
    return connect(registry.host, credentials=StaticCredentials({registry.host: credential}))


def test_basic_is_sent_along_after_the_first_challenge(
    registry: FaultyRegistry, connect: Connect
) -> None:
    registry.auth = BasicAuth("ada", "s3cret")
    client = as_ada(registry, connect)
    assert client.write(CONTENT) is Outcome.WRITTEN
    assert registry.count("PUT") == 1, "the content is sent once"
    first, *others = registry.requests
    assert "authorization" not in first.headers
    assert {r.headers.get("authorization") for r in others} == {basic("ada", "s3cret")}


@pytest.mark.scenario(15)
def test_a_wrong_password_ends_at_once_and_is_not_shown(
    registry: FaultyRegistry, connect: Connect
) -> None:
    registry.auth = BasicAuth("ada", "s3cret")
    client = as_ada(registry, connect, Credential("ada", "pa55word", source="~/.docker/x"))
    with pytest.raises(AuthError) as caught:
        client.repository.resolve("v1")
    said = f"{caught.value} {caught.value!r} {caught.value.hint}"
    assert registry.host in said
    assert "~/.docker/x" in said
    assert "'ada'" in said
    assert "pa55word" not in said
    assert caught.value.exit_code == 4
    assert client.sleeps == []
    assert len(registry.requests) == 2


def test_no_credentials(registry: FaultyRegistry, client: Client) -> None:
    registry.auth = BasicAuth("ada", "s3cret")
    with pytest.raises(AuthError, match="none are stored for it") as caught:
        client.repository.resolve("v1")
    assert f"modelpack login {registry.host}" in str(caught.value.hint)


@pytest.mark.parametrize("challenge", ["Negotiate abc", "", "%%%"])
def test_a_challenge_that_is_not_understood(
    registry: FaultyRegistry, client: Client, challenge: str
) -> None:
    registry.faults.add("*", "", faults.answering(401, WWW_Authenticate=challenge), times=None)
    with pytest.raises(AuthError, match="unsupported kind"):
        client.repository.resolve("v1")


def test_401_without_a_challenge(registry: FaultyRegistry, client: Client) -> None:
    registry.faults.add("*", "", faults.answering(401), times=None)
    with pytest.raises(AuthError, match="401"):
        client.repository.resolve("v1")


def test_an_anonymous_token_is_fetched_once(registry: FaultyRegistry, client: Client) -> None:
    registry.auth = auth = BearerAuth()
    descriptor, _ = manifest_for(registry)
    client.repository.fetch_manifest(descriptor)
    assert read_all(client.repository, registry.put_blob(CONTENT)) == CONTENT
    assert auth.token_requests == [
        {"service": ["faulty.example"], "scope": ["repository:team/model:pull"]}
    ]
    assert "authorization" not in registry.seen("GET", "/token")[0].headers


def test_a_password_buys_a_token(registry: FaultyRegistry, connect: Connect) -> None:
    registry.auth = BearerAuth("ada", "s3cret")
    assert as_ada(registry, connect).write(CONTENT) is Outcome.WRITTEN
    (request,) = registry.seen("GET", "/token")
    assert request.headers["authorization"] == basic("ada", "s3cret")
    assert all(
        request.headers.get("authorization", "").startswith(("Bearer ", "Basic "))
        for request in registry.requests[1:]
    )


def test_an_identity_token_buys_a_token(registry: FaultyRegistry, connect: Connect) -> None:
    registry.auth = auth = BearerAuth("ada", "s3cret", identity_token="long-lived")
    client = as_ada(registry, connect, Credential(identity_token="long-lived"))
    assert client.write(CONTENT) is Outcome.WRITTEN
    (request,) = auth.token_requests
    assert request["grant_type"] == ["refresh_token"]
    assert request["service"] == ["faulty.example"]


def test_a_registry_token_is_used_as_it_is(registry: FaultyRegistry, connect: Connect) -> None:
    registry.auth = auth = BearerAuth()
    auth._granted["ready-made"] = {("repository:team/model", "pull")}
    manifest_for(registry)
    client = as_ada(registry, connect, Credential(registry_token="ready-made"))
    client.repository.resolve("v1")
    assert auth.token_requests == []
    auth.revoke()
    with pytest.raises(AuthError, match="refused"):
        client.repository.resolve("v1")


@pytest.mark.scenario(11)
def test_a_push_asks_for_the_right_scopes_up_front(
    registry: FaultyRegistry, connect: Connect
) -> None:
    registry.auth = auth = BearerAuth("ada", "s3cret")
    client = as_ada(registry, connect)
    blob = Content(CONTENT).descriptor
    assert not client.repository.has_blob(blob)
    assert client.write(CONTENT) is Outcome.WRITTEN
    assert [request["scope"] for request in auth.token_requests] == [
        ["repository:team/model:pull,push"]
    ]


@pytest.mark.scenario(11)
def test_a_token_that_is_not_enough_is_exchanged(
    registry: FaultyRegistry, connect: Connect
) -> None:
    registry.auth = auth = BearerAuth("ada", "s3cret")
    client = as_ada(registry, connect)
    manifest_for(registry)
    client.repository.resolve("v1")
    assert client.write(CONTENT) is Outcome.WRITTEN
    client.repository.resolve("v1")
    assert [request["scope"] for request in auth.token_requests] == [
        ["repository:team/model:pull"],
        ["repository:team/model:pull,push"],
    ], "the wider token serves to pull, too"


def test_a_mount_asks_for_both_repositories(registry: FaultyRegistry, connect: Connect) -> None:
    registry.auth = auth = BearerAuth("ada", "s3cret")
    client = as_ada(registry, connect)
    other = client.registry.repository("other/model")
    assert other.mount_blob(registry.put_blob(CONTENT), client.repository)
    assert auth.token_requests[-1]["scope"] == [
        "repository:other/model:pull,push",
        "repository:team/model:pull",
    ]


@pytest.mark.scenario(10)
def test_a_token_that_ended_is_renewed_and_never_replayed(
    registry: FaultyRegistry, connect: Connect
) -> None:
    registry.auth = auth = BearerAuth("ada", "s3cret", uses=1)
    client = as_ada(registry, connect)
    assert client.write(CONTENT) is Outcome.WRITTEN
    assert registry.blob(Content(CONTENT).descriptor.digest) == CONTENT
    sent = [r.headers["authorization"] for r in registry.requests if "authorization" in r.headers]
    bearers = [header for header in sent if header.startswith("Bearer ")]
    assert len(auth.token_requests) >= 3
    assert all(bearers.count(header) <= 2 for header in bearers)


def tokens_of(
    *lives: int, now: Callable[[], float] = lambda: 0.0
) -> tuple[RegistryAuthenticator, list[str]]:
    """Return an authenticator that gets t1, t2, … with these lives, and the URLs that it asked."""
    fetched: list[str] = []

    def request(url: str, **_: object) -> bytes:
        fetched.append(url)
        life = lives[len(fetched) - 1]
        return b'{"access_token": "t%d", "expires_in": %d}' % (len(fetched), life)

    source = StaticCredentials({})
    authenticator = RegistryAuthenticator(
        "r.example", source, request, report=lambda _: None, clock=now
    )
    return authenticator, fetched


@pytest.mark.scenario(10)
def test_a_refused_token_is_forgotten() -> None:
    authenticator, fetched = tokens_of(300, 300)
    pull = repository_scopes("a/b", "pull")
    challenge = 'Bearer realm="https://tokens.example/t"'
    assert authenticator.answer(challenge, None, pull) == "Bearer t1"
    wider = challenge + ',scope="repository:a/b:pull,special"'
    assert authenticator.answer(wider, "Bearer t1", pull) == "Bearer t2"
    assert authenticator.header(pull) == "Bearer t2"
    assert fetched[1].endswith("?scope=repository:a/b:pull,special")


@pytest.mark.scenario(10)
def test_a_token_is_renewed_before_it_ends() -> None:
    now = [1000.0]
    authenticator, fetched = tokens_of(300, 300, 5, 5, now=lambda: now[0])
    pull = repository_scopes("a/b", "pull")
    assert authenticator.header(pull) is None
    challenge = 'Bearer realm="https://tokens.example/t?x=1",service="s"'
    assert authenticator.answer(challenge, None, pull) == "Bearer t1"
    assert fetched == ["https://tokens.example/t?x=1&service=s&scope=repository:a/b:pull"]
    now[0] += 269
    assert authenticator.header(pull) == "Bearer t1"
    now[0] += 2
    assert authenticator.header(pull) == "Bearer t2", "less than 30 s were left"
    now[0] += 300
    assert authenticator.header(pull) == "Bearer t3"
    now[0] += 2
    assert authenticator.header(pull) == "Bearer t3", "a token of 5 s serves for half of them"
    now[0] += 1
    assert authenticator.header(pull) == "Bearer t4"


def test_threads_share_one_token_request(registry: FaultyRegistry, client: Client) -> None:
    registry.auth = auth = BearerAuth()
    blob = registry.put_blob(CONTENT)
    barrier = threading.Barrier(6)

    def read(_: int) -> bytes:
        barrier.wait()
        return read_all(client.repository, blob)

    with ThreadPoolExecutor(6) as executor:
        assert set(executor.map(read, range(6))) == {CONTENT}
    assert len(auth.token_requests) == 1


@pytest.mark.scenario(12)
def test_denied_is_final(registry: FaultyRegistry, client: Client) -> None:
    body = b'{"errors":[{"code":"DENIED","message":"requested access is denied"}]}'
    registry.faults.add("POST", "", faults.answering(403, body), times=None)
    with pytest.raises(DeniedError, match="403 DENIED: requested access") as caught:
        client.write(CONTENT)
    assert caught.value.code == "DENIED"
    assert caught.value.exit_code == 4
    assert registry.count("POST") == 1
    assert client.sleeps == []


def test_a_403_that_names_a_scope_gets_one_more_try(
    registry: FaultyRegistry, connect: Connect
) -> None:
    registry.auth = auth = BearerAuth("ada", "s3cret")
    client = as_ada(registry, connect)
    manifest_for(registry)
    challenge = (
        f'Bearer realm="{registry.url}/token",service="faulty.example",'
        'scope="repository:team/model:pull,special",error="insufficient_scope"'
    )
    registry.faults.add("HEAD", "", faults.answering(403, WWW_Authenticate=challenge))
    client.repository.resolve("v1")
    assert auth.token_requests[-1]["scope"] == ["repository:team/model:pull,special"]


def test_a_token_server_that_refuses(registry: FaultyRegistry, connect: Connect) -> None:
    registry.auth = BearerAuth("ada", "s3cret", anonymous_pull=False)
    with pytest.raises(AuthError, match="refused the credentials of 'ada' from a test") as caught:
        as_ada(registry, connect, Credential("ada", "pa55word", source="a test")).registry.ping()
    assert "pa55word" not in str(caught.value)
    with pytest.raises(AuthError, match="none are stored for it"):
        connect(registry.host).registry.ping()


def test_a_token_server_that_is_down(registry: FaultyRegistry, client: Client) -> None:
    registry.auth = BearerAuth()
    registry.faults.add("GET", "/token", faults.answering(503), times=None)
    with pytest.raises(RemoteUnavailableError, match="token for"):
        client.repository.resolve("v1")
    assert registry.count("GET", "/token") == 5


@pytest.mark.parametrize(
    "body",
    [b"", b"[]", b"{}", b'{"token":5}', b'{"token":""}', b'{"token":"a\\r\\nX: y"}', b'{"token":'],
)
def test_a_token_that_is_none(registry: FaultyRegistry, client: Client, body: bytes) -> None:
    registry.auth = BearerAuth()
    registry.faults.add("GET", "/token", faults.answering(200, body), times=None)
    with pytest.raises(AuthError, match="the response") as caught:
        client.repository.resolve("v1")
    assert "X: y" not in str(caught.value)


@pytest.mark.parametrize("expires_in", [None, 0, -1, 10**12])
def test_an_odd_life_is_taken_as_a_minute(
    registry: FaultyRegistry, client: Client, expires_in: int | None
) -> None:
    registry.auth = auth = BearerAuth(expires_in=expires_in)
    manifest_for(registry)
    client.repository.resolve("v1")
    client.repository.resolve("v1")
    assert len(auth.token_requests) == 1


@pytest.mark.parametrize(
    ("realm", "problem"),
    [
        ("http://tokens.example/token", "plain http on tokens.example"),
        ("tokens.example/token", "expected an http"),
        ("https://u:p@tokens.example/token", "user name"),
        ("", "expected an http"),
    ],
)
def test_a_realm_that_gets_no_credentials(
    registry: FaultyRegistry, connect: Connect, realm: str, problem: str
) -> None:
    registry.auth = BearerAuth(realm=realm or " ")
    with pytest.raises(AuthError, match=problem if realm else "control character"):
        as_ada(registry, connect).registry.ping()


@pytest.mark.parametrize("challenge", ["Bearer", 'Bearer service="x"', 'Bearer realm="",a=b'])
def test_a_challenge_without_a_realm(
    registry: FaultyRegistry, connect: Connect, challenge: str
) -> None:
    registry.faults.add("*", "/v2/", faults.answering(401, WWW_Authenticate=challenge))
    with pytest.raises(AuthError, match="the realm of its challenge is missing") as caught:
        as_ada(registry, connect).registry.ping()
    assert caught.value.exit_code == 4


def test_a_token_request_that_is_redirected_leaves_the_password_behind(
    registry: FaultyRegistry, storage: FaultyRegistry, connect: Connect
) -> None:
    registry.auth = BearerAuth("ada", "s3cret")
    storage.auth = BearerAuth()
    registry.faults.add("GET", "/token", faults.redirecting(storage))
    with pytest.raises(AuthError):
        as_ada(registry, connect).registry.ping()
    (request,) = storage.requests
    assert "authorization" not in request.headers


def test_an_identity_token_is_not_sent_where_a_redirect_leads(
    registry: FaultyRegistry, storage: FaultyRegistry, connect: Connect
) -> None:
    registry.auth = BearerAuth("ada", "s3cret", identity_token="long-lived")
    registry.faults.add("POST", "/token", faults.redirecting(storage))
    with pytest.raises(Exception, match="refused to follow a redirect"):
        as_ada(registry, connect, Credential(identity_token="long-lived")).registry.ping()
    assert storage.requests == []


def test_credentials_that_cannot_be_read_do_not_keep_the_public_out(
    registry: FaultyRegistry, connect: Connect
) -> None:
    class Broken:
        def credential(self, host: str) -> Credential | None:
            raise AuthError("docker-credential-x is not on PATH")

    registry.auth = auth = BearerAuth("ada", "s3cret")
    manifest_for(registry)
    client = connect(registry.host, credentials=Broken())
    client.repository.resolve("v1")
    (note,) = client.reports
    assert note.action is Action.NOTE
    assert "docker-credential-x" in note.message
    auth.anonymous_pull = False
    auth.revoke()
    with pytest.raises(AuthError) as caught:
        client.repository.resolve("v1")
    assert "docker-credential-x" in str(caught.value.hint)


def test_credentials_are_not_looked_up_before_they_are_wanted(
    registry: FaultyRegistry, connect: Connect
) -> None:
    asked = []

    class Watching:
        def credential(self, host: str) -> Credential | None:
            asked.append(host)
            return None

    client = connect(registry.host, credentials=Watching())
    client.registry.ping()
    assert asked == []
    registry.auth = BearerAuth()
    client.registry.ping()
    client.registry.ping()
    assert asked == [registry.host]
