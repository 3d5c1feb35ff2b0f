"""Authentication of registry requests: challenges, scopes, Basic credentials and bearer tokens.

A bearer token comes from the token server that the registry's challenge (`WWW-Authenticate`) names.
`Tokens` caches it by token server, credential and scopes until shortly before it expires; threads
that need the same token share one request. The scope `repository:team/model:pull,push` is a set of
two (resource, action) pairs here, so whether a token covers a request is a subset test.

Sources: RFC 9110, RFC 6750; distribution's token authentication and OAuth 2 specifications.
"""

from __future__ import annotations

import json
import re
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple, Protocol, TypeAlias
from urllib.parse import quote, urlencode

import requests

from modelpack.artifacts.json_document import decode_object
from modelpack.errors import AuthError, ManifestError, RegistryError
from modelpack.progress import Action, Progress, ProgressCallback
from modelpack.registry.credentials import Credential, CredentialSource
from modelpack.registry.urls import api_host, checked_url, is_local, origin_of, with_query

#: A resource (`repository:team/model`) and one action on it (`pull`).
Scope: TypeAlias = tuple[str, str]
Scopes: TypeAlias = frozenset[Scope]

NOTHING: Scopes = frozenset()


def repository_scopes(name: str, *actions: str) -> Scopes:
    """Return the scopes for `actions` (pull, push, delete) on the repository `name`."""
    return frozenset((f"repository:{name}", action) for action in actions)


def parse_scopes(text: str) -> Scopes:
    """Return the scopes in the `scope` parameter of a challenge, which spaces separate."""
    found: set[Scope] = set()
    for scope in text.split():
        resource, colon, actions = scope.rpartition(":")
        if colon:
            found.update((resource, action) for action in actions.split(",") if action)
    return frozenset(found)


def spelled(scopes: Scopes) -> list[str]:
    """Return one `resource:action,action` for each resource, sorted."""
    actions = defaultdict(set)
    for resource, action in scopes:
        actions[resource].add(action)
    return [f"{resource}:{','.join(sorted(actions[resource]))}" for resource in sorted(actions)]


_TOKEN = r"[A-Za-z0-9!#$%&'*+.^_`|~-]+"  # noqa: S105 - a grammar, no secret
_SCHEME = re.compile(rf"[\s,]*({_TOKEN})(?=[\s,]|\Z)")
_PARAM = re.compile(rf'[\s,]*({_TOKEN})\s*=\s*(?:"((?:[^"\\]|\\.)*)"|({_TOKEN})(?=[\s,]|\Z))')
_TOKEN68 = re.compile(r"[ \t]+([A-Za-z0-9._~+/-]+=*)[ \t]*(?=,|\Z)")
_MAX_LENGTH = 16 * 1024


@dataclass(frozen=True, slots=True)
class Challenge:
    """One way to authenticate; `scheme` and the names of `parameters` are in lower case."""

    scheme: str
    parameters: Mapping[str, str] = field(default_factory=dict, hash=False)
    token68: str | None = None


def parse_challenges(header: str) -> list[Challenge]:
    """Return the challenges in the order of the header, up to the first that does not parse."""
    header = header[:_MAX_LENGTH]
    challenges: list[Challenge] = []
    position = 0
    while match := _SCHEME.match(header, position):
        scheme, position = match[1].lower(), match.end()
        token68 = _TOKEN68.match(header, position)
        if token68 and not _PARAM.match(header, position):
            # As in `Negotiate abc`; also `Basic Bearer`, two schemes without a comma.
            challenges.append(Challenge(scheme, {}, token68[1]))
            position = token68.end()
            continue
        parameters: dict[str, str] = {}
        while match := _PARAM.match(header, position):
            value = match[3] if match[2] is None else re.sub(r"\\(.)", r"\1", match[2])
            parameters.setdefault(match[1].lower(), value)
            position = match.end()
        challenges.append(Challenge(scheme, parameters))
    return challenges


class Authenticator(Protocol):
    """Authenticates requests to one server; several threads may use it.

    The client calls it only for responses of that server itself, not of a redirect's target.
    """

    def header(self, scopes: Scopes) -> str | None:
        """Return the `Authorization` header to send with the first try, or None."""

    def is_challenge(self, response: requests.Response) -> bool:
        """Return whether the request may succeed with another `Authorization` header."""

    def answer(self, challenge: str, sent: str | None, scopes: Scopes) -> str:
        """Return the `Authorization` header for a `WWW-Authenticate`, other than `sent`.

        Raises `AuthError` if there is none.
        """

    def refused(self) -> AuthError:
        """Return the error for credentials that are missing or were refused."""

    def scrubbed(self, said: bytes) -> bytes:
        """Return a body or header of the server with all secrets masked."""

    def error(self, what: str, response: requests.Response) -> RegistryError | None:
        """Return the error for a failed response, or None to use its error body."""


class TokenRequest(Protocol):
    """A request to a token server, with retries and without credentials of its own."""

    def __call__(
        self, url: str, *, method: str, headers: Mapping[str, str], body: bytes | None
    ) -> bytes:
        """Return the body of the response; raise `AuthError` for 401 and 403."""


_CLIENT_ID: Final = "modelpack"
_DEFAULT_LIFE: Final = 60.0  # seconds, where the server names none (token specification)
#: A token that an HTTP header can carry.
TOKEN: Final = re.compile(r"[\x21-\x7e]+\Z")
_FORM: Final = "application/x-www-form-urlencoded"


@dataclass(frozen=True, slots=True)
class TokenServer:
    """A token server, as a challenge names it."""

    realm: str
    service: str


class _Key(NamedTuple):
    server: TokenServer
    credential: Credential | None
    scopes: Scopes


@dataclass(frozen=True, slots=True)
class _Token:
    value: str = field(repr=False)
    renew_at: float

    @property
    def header(self) -> str:
        return f"Bearer {self.value}"


class Tokens:
    """The tokens for one registry; several threads may use it."""

    def __init__(
        self, host: str, request: TokenRequest, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._host = host
        self._request = request
        self._clock = clock
        self._lock = threading.Lock()
        self._kept: dict[_Key, _Token] = {}
        self._flights: dict[_Key, threading.Lock] = defaultdict(threading.Lock)
        self._refreshed: dict[str, str] = {}  # identity tokens and their replacements

    def header(
        self, server: TokenServer, credential: Credential | None, scopes: Scopes, stale: str | None
    ) -> str:
        """Return a header with a token for `scopes`; fetch a new one if the header equals `stale`.

        The token server may return the same token again. Raises `AuthError` if it refuses.
        """
        key = _Key(server, credential, scopes)
        with self._lock:
            flight = self._flights[key]
        with flight:
            token = self._find(key)
            if token is None or token.header == stale:
                token = self._fetch(key)
                with self._lock:
                    fresh = {k: t for k, t in self._kept.items() if t.header != stale}
                    self._kept = {**fresh, key: token}
            return token.header

    def values(self) -> list[str]:
        """Return all cached tokens, so that the caller can mask them."""
        with self._lock:
            return [token.value for token in self._kept.values()] + list(self._refreshed.values())

    def _find(self, key: _Key) -> _Token | None:
        now = self._clock()
        with self._lock:
            self._kept = {k: t for k, t in self._kept.items() if t.renew_at > now}
            if exact := self._kept.get(key):
                return exact
            wider = (t for k, t in self._kept.items() if k[:2] == key[:2] and k.scopes > key.scopes)
            return next(wider, None)

    def _fetch(self, key: _Key) -> _Token:
        started = self._clock()
        server, credential, scopes = key
        parameters = {"service": server.service} if server.service else {}
        headers, body, url = {"Accept": "application/json"}, None, server.realm
        identity = credential.identity_token if credential else ""
        if identity:
            form = {
                "grant_type": "refresh_token",
                "refresh_token": self._refreshed.get(identity, identity),
                "client_id": _CLIENT_ID,
                "scope": " ".join(spelled(scopes)),
            }
            headers["Content-Type"] = _FORM
            body = urlencode(form | parameters).encode()
        else:
            if credential:
                headers["Authorization"] = credential.basic
            url = with_query(url, **parameters)
            for scope in spelled(scopes):
                url = with_query(url, scope=scope)
        raw = self._request(url, method="POST" if body else "GET", headers=headers, body=body)
        token, life, refresh_token = _parse_answer(raw, f"token server of {self._host}")
        if identity and isinstance(refresh_token, str) and refresh_token:
            self._refreshed[identity] = refresh_token
        # Renew a token 30 s before it expires, or 10 % of its life if that is longer, but not
        # before half of its life.
        spare = min(max(30.0, life / 10), life / 2)
        return _Token(token, started + life - spare)


def _parse_answer(raw: bytes, what: str) -> tuple[str, float, Any]:
    """Return token, seconds of life and refresh token of a response; errors never show them."""
    try:
        value = decode_object(raw, what)
    except ManifestError:
        raise AuthError(f"{what}: the response is not a JSON object") from None
    token = value.get("token") or value.get("access_token")
    if not isinstance(token, str) or not TOKEN.match(token):
        raise AuthError(f"{what}: the response has no valid bearer token")
    life = value.get("expires_in")
    if isinstance(life, bool) or not isinstance(life, int | float) or not 0 < life < 10**9:
        life = _DEFAULT_LIFE
    return token, float(life), value.get("refresh_token")


class RegistryAuthenticator:
    """The `Authenticator` of one registry: anonymous, Basic, or with tokens of a token server."""

    def __init__(
        self,
        host: str,
        credentials: CredentialSource,
        request: TokenRequest,
        *,
        plain_http: bool = False,
        insecure: Collection[str] = (),
        report: ProgressCallback,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`plain_http`: of the registry; `insecure`: hosts that get credentials over plain http."""
        self._host = host
        self._source = credentials
        self._insecure = frozenset(insecure)
        self._plain_http = plain_http
        address = api_host(host)
        self._exposed = plain_http and not (is_local(address) or address in self._insecure)
        self._report = report
        self._tokens = Tokens(host, request, clock)
        self._asked: str | TokenServer | None = None  # "basic", or the server of bearer tokens
        self._credential_lock = threading.Lock()
        self._credential: Credential | None = None
        self._looked_up = False
        self._trouble: str | None = None

    def header(self, scopes: Scopes) -> str | None:
        """Return the header of the next request; None before the first challenge."""
        asked = self._asked
        if isinstance(asked, TokenServer):
            return self._bearer(asked, scopes, stale=None)
        return self._basic() if asked else None

    def is_challenge(self, response: requests.Response) -> bool:
        """Return whether the response says how to authenticate."""
        challenge = response.headers.get("WWW-Authenticate")
        if response.status_code == 401:
            return challenge is not None
        # RFC 6750 section 3.1; any other 403 is final.
        return response.status_code == 403 and "insufficient_scope" in (challenge or "")

    def error(self, what: str, response: requests.Response) -> None:
        """Return None: the errors of a registry are those of distribution-spec."""

    def answer(self, challenge: str, sent: str | None, scopes: Scopes) -> str:
        """Return the `Authorization` header for this challenge, other than `sent`."""
        offered = {found.scheme: found for found in reversed(parse_challenges(challenge))}
        if "bearer" in offered:
            parameters = offered["bearer"].parameters
            server = TokenServer(
                self._checked_realm(parameters.get("realm", "")), parameters.get("service", "")
            )
            self._asked = server
            wanted = scopes | parse_scopes(parameters.get("scope", ""))
            return self._bearer(server, wanted, stale=sent)
        if "basic" in offered:
            self._asked = "basic"
            header = self._basic()
            if header is None or header == sent:
                raise self.refused()
            return header
        names = ", ".join(offered) or "none"
        raise AuthError(
            f"{self._host} requires an unsupported kind of credentials: {names[:100]}",
            host=self._host,
            status_code=401,
        )

    def refused(self, said: str = "") -> AuthError:
        """Return the error for credentials that are missing, or that the registry refused."""
        credential = self._find_credential()
        if credential is None:
            return AuthError(
                f"{self._host} requires credentials, and none are stored for it{said}",
                host=self._host,
                status_code=401,
                hint=(f"{self._trouble}; " if self._trouble else "")
                + f"log in with `modelpack login {self._host}`; "
                "a repository that does not exist may look the same",
            )
        who = f" of {credential.username!r}" if credential.username else ""
        return AuthError(
            f"{self._host} refused the credentials{who} from {credential.source}{said}",
            host=self._host,
            status_code=401,
            hint="check the password and the permissions of the account, or log in again",
        )

    def scrubbed(self, said: bytes) -> bytes:
        """Return the text of a server with our secrets masked; a server may repeat them."""
        credential = self._credential
        secrets = self._tokens.values()
        if credential is not None:
            secrets += [credential.password, credential.identity_token, credential.registry_token]
            secrets.append(credential.basic.partition(" ")[2])
        for secret in filter(None, secrets):
            for form in (secret, json.dumps(secret)[1:-1], quote(secret, safe="")):
                said = said.replace(form.encode(), b"...")
        return said

    def _basic(self) -> str | None:
        credential = self._find_credential()
        # A token alone is not enough for Basic, which sends a user name and a password.
        has_pair = credential is not None and (credential.username or credential.password)
        return credential.basic if credential and has_pair else None

    def _bearer(self, server: TokenServer, scopes: Scopes, stale: str | None) -> str:
        credential = self._find_credential()
        if credential and credential.registry_token:
            if not TOKEN.match(credential.registry_token):
                raise AuthError(f"{credential.source} has no valid bearer token", host=self._host)
            header = f"Bearer {credential.registry_token}"
        else:
            try:
                header = self._tokens.header(server, credential, scopes, stale)
            except AuthError as error:
                if error.status_code is None:
                    raise  # the token server did not refuse, it failed
                where = origin_of(server.realm).netloc
                raise self.refused(f" (refused by the token server {where})") from error
        if header == stale:
            raise self.refused()
        return header

    def _checked_realm(self, realm: str) -> str:
        what = f"{self._host}: the realm of its challenge"
        if not realm:
            raise AuthError(f"{what} is missing", host=self._host, status_code=401)
        try:
            url = checked_url(realm, what)
        except RegistryError as error:
            raise AuthError(error.message, host=self._host, status_code=401) from None
        origin = origin_of(url)
        allowed = self._exposed or origin.netloc in self._insecure
        allowed |= self._plain_http and is_local(origin.netloc)
        if origin.scheme == "http" and not allowed:
            raise AuthError(
                f"{what} is plain http on {origin.netloc}: no credentials are sent to it",
                host=self._host,
                hint=f"use --insecure {origin.netloc}, but only on a network you trust",
            )
        return url

    def _find_credential(self) -> Credential | None:
        with self._credential_lock:
            if not self._looked_up:
                try:
                    self._credential = self._source.credential(self._host)
                    if self._credential and self._exposed:
                        self._credential = None
                        raise AuthError(
                            f"credentials are not sent to {self._host} over plain http "
                            f"(--insecure {self._host} allows it)"
                        )
                except AuthError as error:
                    # Many models are public: a broken helper must not keep anyone from them.
                    self._trouble = str(error)
                    self._report(
                        Progress(Action.NOTE, message=f"{error}; going on without credentials")
                    )
                self._looked_up = True
            return self._credential
