"""Authorisation in the registry of `tests.registry.faulty`."""

from __future__ import annotations

import base64
import itertools
import json
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING
from urllib.parse import parse_qs

from modelpack.registry.auth import spelled
from tests.registry.faulty_content import Reply, error_reply

if TYPE_CHECKING:
    from tests.registry.faults import Exchange

_NAME = re.compile(r"/v2/(.+?)/(?:blobs|manifests|tags|referrers)/")
_ACTION = {"GET": "pull", "HEAD": "pull", "DELETE": "delete"}


def basic(username: str, password: str) -> str:
    """Return a Basic header."""
    return "Basic " + base64.b64encode(f"{username}:{password}".encode()).decode()


@dataclass
class BasicAuth:
    """One user and password for all requests."""

    username: str
    password: str

    def refusal(self, exchange: Exchange) -> Reply | None:
        """Let the user in."""
        if exchange.headers.get("authorization") == basic(self.username, self.password):
            return None
        return error_reply(401, "UNAUTHORIZED", WWW_Authenticate='Basic realm="Registry"')


@dataclass
class BearerAuth:
    """Tokens by scope, from `/token` of the same server (or from `realm`).

    Without a user, every client gets any token; with a user, other clients get tokens to pull at
    most. `uses` limits how often each token works, in place of an expiry. `delete_action` is the
    action that a DELETE needs.
    """

    username: str = ""
    password: str = ""
    anonymous_pull: bool = True
    expires_in: int | None = 300
    uses: int | None = None
    realm: str | None = None
    identity_token: str | None = None
    delete_action: str = "delete"
    token_requests: list[dict[str, list[str]]] = field(default_factory=list)
    _numbers: itertools.count[int] = field(default_factory=itertools.count)
    _granted: dict[str, set[tuple[str, str]]] = field(default_factory=dict)
    _left: dict[str, int] = field(default_factory=dict)

    def refusal(self, exchange: Exchange) -> Reply | None:
        """Issue tokens, and accept requests with a correct token."""
        if exchange.path == "/token":
            return self._token(exchange)
        needed = self._needed(exchange)
        scheme, _, token = exchange.headers.get("authorization", "").partition(" ")
        if scheme == "Bearer" and token in self._granted:
            left = self._left.get(token, 1)
            self._left[token] = left - 1 if self.uses is not None else left
            if left > 0 and needed <= self._granted[token]:
                return None
        realm = self.realm or f"{exchange.registry.url}/token"
        challenge = f'Bearer realm="{realm}",service="faulty.example"'
        if needed:
            challenge += f',scope="{" ".join(spelled(frozenset(needed)))}"'
        if token:
            challenge += ',error="insufficient_scope"'
        return error_reply(401, "UNAUTHORIZED", WWW_Authenticate=challenge)

    def revoke(self) -> None:
        """Revoke all tokens."""
        self._granted.clear()

    def _needed(self, exchange: Exchange) -> set[tuple[str, str]]:
        match = _NAME.match(exchange.path)
        if match is None:
            return set()
        resource, action = f"repository:{match[1]}", _ACTION.get(exchange.method, "push")
        if action == "delete":
            action = self.delete_action
        actions = {"pull", "push"} if action == "push" else {action}
        needed = {(resource, action) for action in actions}
        if origin := exchange.query.get("from"):
            needed.add((f"repository:{origin[0]}", "pull"))
        return needed

    def _token(self, exchange: Exchange) -> Reply:
        query = exchange.query
        known = exchange.headers.get("authorization") == basic(self.username, self.password)
        if exchange.method == "POST":
            exchange.receive()
            query = parse_qs(exchange.body.decode())
            known = query.get("refresh_token") == [self.identity_token]
            query["scope"] = query.get("scope", [""])[0].split()
        self.token_requests.append(query)
        anonymous = "authorization" not in exchange.headers and exchange.method == "GET"
        if not known and self.username and not (anonymous and self.anonymous_pull):
            return error_reply(401, "UNAUTHORIZED", "who are you?")
        granted = set()
        for scope in query.get("scope", []):
            resource, _, actions = scope.rpartition(":")
            for action in actions.split(","):
                if known or not self.username or action == "pull":
                    granted.add((resource, action))
        token = f"secret-token-{next(self._numbers)}"
        self._granted[token] = granted
        if self.uses is not None:
            self._left[token] = self.uses
        body: dict[str, object] = {"token": token}
        if self.expires_in is not None:
            body["expires_in"] = self.expires_in
        return Reply(200, {"Content-Type": "application/json"}, json.dumps(body).encode())
