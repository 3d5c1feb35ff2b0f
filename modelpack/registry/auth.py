"""Proving to one registry who asks: Basic, and Bearer with tokens by scope.

Sources: RFC 7617 (Basic), RFC 6750 (Bearer), Docker's token and OAuth 2 specifications. Nothing is
sent before the registry asked for it; then Basic goes along with every request, and a token is
asked for with all the scopes that a call will need. Tokens are kept by (service, scopes) of this
one host, renewed before they end, and never shown.
"""

from __future__ import annotations

import re
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol
from urllib.parse import urlencode

from modelpack.errors import AuthError, ManifestError
from modelpack.gojson import decode_object
from modelpack.progress import Action, Progress, ProgressCallback
from modelpack.registry.challenge import parse_challenges
from modelpack.registry.credentials import Credential, CredentialSource
from modelpack.registry.hosts import uses_plain_http
from modelpack.registry.scopes import Scopes, parse_scopes, spelled
from modelpack.registry.urls import checked_url, origin_of, with_query

_CLIENT_ID = "modelpack"
_DEFAULT_LIFE = 60.0  # seconds, where the server names none (token specification)
_TOKEN = re.compile(r"[\x21-\x7e]+\Z")
_FORM = "application/x-www-form-urlencoded"


class TokenRequest(Protocol):
    """How the authorizer reaches a token server: one request with retries, without a token."""

    def __call__(
        self, url: str, *, method: str, headers: Mapping[str, str], body: bytes | None
    ) -> bytes:
        """Return the body of the answer; raise `AuthError` for 401 and 403."""
        ...


@dataclass(frozen=True, slots=True)
class _Service:
    """A token server, as a challenge names it."""

    realm: str
    service: str


@dataclass(frozen=True, slots=True)
class _Token:
    value: str = field(repr=False)
    service: _Service
    scopes: Scopes
    renew_at: float

    @property
    def header(self) -> str:
        return f"Bearer {self.value}"


class Authorizer:
    """Makes the `Authorization` headers for one registry; several threads may use it."""

    def __init__(
        self,
        host: str,
        credentials: CredentialSource,
        request: TokenRequest,
        *,
        plain_http: bool | None = None,
        report: ProgressCallback,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._host = host
        self._source = credentials
        self._request = request
        self._plain_http = plain_http
        self._report = report
        self._clock = clock
        self._lock = threading.Lock()
        self._asked: str | _Service | None = None  # "basic", or where tokens are
        self._tokens: dict[tuple[_Service, Scopes], _Token] = {}
        self._flights: dict[tuple[_Service, Scopes], threading.Lock] = defaultdict(threading.Lock)
        self._credential_lock = threading.Lock()
        self._credential: Credential | None = None
        self._looked_up = False
        self._trouble: str | None = None

    def header(self, scopes: Scopes) -> str | None:
        """Return what to send along unasked; None before the first challenge."""
        asked = self._asked
        if asked is None:
            return None
        if isinstance(asked, _Service):
            return self._bearer(asked, scopes, stale=None)
        credential = self._find_credential()
        return credential.basic if credential else None

    def answer(self, challenge: str, sent: str | None, scopes: Scopes) -> str:
        """Return the header that meets a 401 with this `WWW-Authenticate`, other than `sent`.

        Raises `AuthError` where there is none.
        """
        offered = {found.scheme: found for found in reversed(parse_challenges(challenge))}
        if "bearer" in offered:
            parameters = offered["bearer"].parameters
            service = _Service(
                self._checked_realm(parameters.get("realm", "")), parameters.get("service", "")
            )
            self._asked = service
            wanted = scopes | parse_scopes(parameters.get("scope", ""))
            return self._bearer(service, wanted, stale=sent)
        if "basic" in offered:
            self._asked = "basic"
            credential = self._find_credential()
            if credential is None or credential.basic == sent:
                raise self.refused()
            return credential.basic
        names = ", ".join(offered) or "none"
        raise AuthError(
            f"{self._host} wants credentials of a kind that is not supported: {names[:100]}",
            host=self._host,
            status_code=401,
        )

    def refused(self, said: str = "") -> AuthError:
        """Return the error for credentials that are missing, or that did not do."""
        credential = self._find_credential()
        if credential is None:
            hint = (
                f"log in with `docker login {self._host}`; "
                "a repository that does not exist may look the same"
            )
            return AuthError(
                f"{self._host} wants credentials, and there are none for it{said}",
                host=self._host,
                status_code=401,
                hint=f"{self._trouble}; {hint}" if self._trouble else hint,
            )
        who = f" of {credential.username!r}" if credential.username else ""
        return AuthError(
            f"{self._host} refused the credentials{who} from {credential.source}{said}",
            host=self._host,
            status_code=401,
            hint="check the password and what the account may do there, or log in again",
        )

    def _bearer(self, service: _Service, scopes: Scopes, stale: str | None) -> str:
        credential = self._find_credential()
        if credential and credential.registry_token:
            header = f"Bearer {credential.registry_token}"
            if header == stale:
                raise self.refused()
            return header
        with self._lock:
            flight = self._flights[service, scopes]
        with flight:  # threads that need the same token wait for one request
            token = self._kept(service, scopes)
            if token is None or token.header == stale:
                token = self._fetch(service, scopes, credential)
                self._keep(token, stale)
            if token.header == stale:
                raise self.refused()
            return token.header

    def _keep(self, token: _Token, stale: str | None) -> None:
        with self._lock:
            fresh = {k: t for k, t in self._tokens.items() if t.header != stale}
            self._tokens = {**fresh, (token.service, token.scopes): token}

    def _kept(self, service: _Service, scopes: Scopes) -> _Token | None:
        now = self._clock()
        with self._lock:
            self._tokens = {k: t for k, t in self._tokens.items() if t.renew_at > now}
            exact = self._tokens.get((service, scopes))
            wider = (
                t for t in self._tokens.values() if t.service == service and t.scopes >= scopes
            )
            return exact or next(wider, None)

    def _fetch(self, service: _Service, scopes: Scopes, credential: Credential | None) -> _Token:
        started = self._clock()
        parameters = {"service": service.service} if service.service else {}
        headers, body, url = {"Accept": "application/json"}, None, service.realm
        if credential and credential.identity_token:
            form = {
                "grant_type": "refresh_token",
                "refresh_token": credential.identity_token,
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
        try:
            raw = self._request(url, method="POST" if body else "GET", headers=headers, body=body)
        except AuthError as error:
            where = origin_of(service.realm).netloc
            raise self.refused(f" (said its token server {where})") from error
        value, life = _parse_token(raw, f"token server of {self._host}")
        # Renewed while 30 s or 10 % are left, but a token of seconds is used for half its life.
        renew_at = started + life - min(max(30.0, life / 10), life / 2)
        return _Token(value, service, scopes, renew_at)

    def _checked_realm(self, realm: str) -> str:
        what = f"{self._host}: the realm of its challenge"
        url = checked_url(realm, what)
        origin = origin_of(url)
        if origin.scheme == "http" and not uses_plain_http(origin.netloc, self._plain_http):
            raise AuthError(
                f"{what} is plain http on {origin.netloc}; no credentials are sent there",
                host=self._host,
                hint="--plain-http allows it, if that is the network's business",
            )
        return url

    def _find_credential(self) -> Credential | None:
        with self._credential_lock:
            if not self._looked_up:
                try:
                    self._credential = self._source.credential(self._host)
                except AuthError as error:
                    # Many models are public: a broken helper must not keep anyone from them.
                    self._trouble = str(error)
                    self._report(
                        Progress(Action.NOTE, message=f"{error}; going on without credentials")
                    )
                self._looked_up = True
            return self._credential


def _parse_token(raw: bytes, what: str) -> tuple[str, float]:
    """Return the token and its life in seconds; errors never show the answer."""
    try:
        value: dict[str, Any] = decode_object(raw, what)
    except ManifestError as error:
        raise AuthError(f"{what}: its answer is not a JSON object") from error
    token = value.get("token") or value.get("access_token")
    if not isinstance(token, str) or not _TOKEN.match(token):
        raise AuthError(f"{what}: its answer holds no usable token")
    life = value.get("expires_in")
    if isinstance(life, bool) or not isinstance(life, int | float) or not 0 < life < 10**9:
        life = _DEFAULT_LIFE
    return token, float(life)
