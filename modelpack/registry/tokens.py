"""Bearer tokens: bought from a token server by scope, kept until shortly before they end.

Sources: Docker's token authentication and OAuth 2 specifications of distribution. A token is kept
by its server, what bought it and the scopes that were asked for, of the one host that the cache is
for; threads that need the same one wait for one request.
"""

from __future__ import annotations

import re
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple, Protocol
from urllib.parse import urlencode

from modelpack.errors import AuthError, ManifestError
from modelpack.gojson import decode_object
from modelpack.registry.credentials import Credential
from modelpack.registry.scopes import Scopes, spelled
from modelpack.registry.urls import with_query

_CLIENT_ID: Final = "modelpack"
_DEFAULT_LIFE: Final = 60.0  # seconds, where the server names none (token specification)
#: What a header can carry of a token.
TOKEN: Final = re.compile(r"[\x21-\x7e]+\Z")
_FORM: Final = "application/x-www-form-urlencoded"


class TokenRequest(Protocol):
    """How a token server is reached: one request with retries, without a token."""

    def __call__(
        self, url: str, *, method: str, headers: Mapping[str, str], body: bytes | None
    ) -> bytes:
        """Return the body of the answer; raise `AuthError` for 401 and 403."""
        ...


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
        self._refreshed: dict[str, str] = {}  # identity tokens, and what replaced them

    def header(
        self, server: TokenServer, credential: Credential | None, scopes: Scopes, stale: str | None
    ) -> str:
        """Return a header with a token for `scopes`; one that equals `stale` is fetched anew.

        A token server may give out the same token once more: the caller compares. Raises
        `AuthError` where the server refuses.
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
        """Return the secrets that are held."""
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
        answer = _Answer.parse(raw, f"token server of {self._host}")
        if identity and answer.refresh_token:
            self._refreshed[identity] = answer.refresh_token
        # Renewed while 30 s or 10 % are left, but a token of seconds is used for half its life.
        spare = min(max(30.0, answer.life / 10), answer.life / 2)
        return _Token(answer.token, started + answer.life - spare)


@dataclass(frozen=True, slots=True)
class _Answer:
    token: str = field(repr=False)
    life: float
    refresh_token: str | None = field(repr=False)

    @classmethod
    def parse(cls, raw: bytes, what: str) -> _Answer:
        """Return what a token server said; errors never show it."""
        try:
            value: dict[str, Any] = decode_object(raw, what)
        except ManifestError:
            raise AuthError(f"{what}: its answer is not a JSON object") from None
        token = value.get("token") or value.get("access_token")
        if not isinstance(token, str) or not TOKEN.match(token):
            raise AuthError(f"{what}: its answer holds no usable token")
        life = value.get("expires_in")
        if isinstance(life, bool) or not isinstance(life, int | float) or not 0 < life < 10**9:
            life = _DEFAULT_LIFE
        refresh = value.get("refresh_token")
        return cls(token, float(life), refresh if isinstance(refresh, str) and refresh else None)
