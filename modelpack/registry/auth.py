"""Proving to one registry who asks: Basic, and Bearer with tokens by scope.

Sources: RFC 7617 (Basic), RFC 6750 (Bearer). Nothing is sent before the registry asked for it; then
Basic goes along with every request, and a token is asked for with all the scopes that a call will
need. What proves an identity goes neither over plain http beyond loopback, unless the host was
named as insecure, nor into a message.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Collection
from urllib.parse import quote

from modelpack.errors import AuthError
from modelpack.progress import Action, Progress, ProgressCallback
from modelpack.registry.challenge import parse_challenges
from modelpack.registry.credentials import Credential, CredentialSource
from modelpack.registry.hosts import api_host, is_loopback
from modelpack.registry.scopes import Scopes, parse_scopes
from modelpack.registry.tokens import TOKEN, TokenRequest, Tokens, TokenServer
from modelpack.registry.urls import checked_url, origin_of


class Authorizer:
    """Makes the `Authorization` headers for one registry; several threads may use it."""

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
        """Hosts in `insecure` get credentials over plain http; `plain_http`: so `host` is asked."""
        self._host = host
        self._source = credentials
        self._insecure = frozenset(insecure)
        self._plain_http = plain_http
        self._exposed = plain_http and not self._may_overhear(api_host(host))
        self._report = report
        self._tokens = Tokens(host, request, clock)
        self._asked: str | TokenServer | None = None  # "basic", or where tokens are
        self._credential_lock = threading.Lock()
        self._credential: Credential | None = None
        self._looked_up = False
        self._trouble: str | None = None

    def header(self, scopes: Scopes) -> str | None:
        """Return what to send along unasked; None before the first challenge."""
        asked = self._asked
        if asked is None:
            return None
        if isinstance(asked, TokenServer):
            return self._bearer(asked, scopes, stale=None)
        return self._basic()

    def answer(self, challenge: str, sent: str | None, scopes: Scopes) -> str:
        """Return the header that meets a 401 with this `WWW-Authenticate`, other than `sent`.

        Raises `AuthError` where there is none.
        """
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
            f"{self._host} wants credentials of a kind that is not supported: {names[:100]}",
            host=self._host,
            status_code=401,
        )

    def refused(self, said: str = "") -> AuthError:
        """Return the error for credentials that are missing, or that did not do."""
        credential = self._find_credential()
        if credential is None:
            hint = (
                f"log in with `modelpack login {self._host}`; "
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

    def scrubbed(self, said: bytes) -> bytes:
        """Return what a server said without our secrets, which it may repeat."""
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
        # A token is no password: from one alone, Basic has nothing to send.
        has_pair = credential is not None and (credential.username or credential.password)
        return credential.basic if credential and has_pair else None

    def _bearer(self, server: TokenServer, scopes: Scopes, stale: str | None) -> str:
        credential = self._find_credential()
        if credential and credential.registry_token:
            if not TOKEN.match(credential.registry_token):
                raise AuthError(f"the token from {credential.source} is none", host=self._host)
            header = f"Bearer {credential.registry_token}"
        else:
            try:
                header = self._tokens.header(server, credential, scopes, stale)
            except AuthError as error:
                if error.status_code is None:
                    raise  # the token server gave no answer to go by
                where = origin_of(server.realm).netloc
                raise self.refused(f" (said its token server {where})") from error
        if header == stale:
            raise self.refused()
        return header

    def _may_overhear(self, netloc: str) -> bool:
        """Return whether plain http to this host is nobody's business but the user's."""
        return is_loopback(netloc) or netloc in self._insecure

    def _checked_realm(self, realm: str) -> str:
        what = f"{self._host}: the realm of its challenge"
        url = checked_url(realm, what)
        origin = origin_of(url)
        allowed = self._exposed or origin.netloc in self._insecure
        if origin.scheme == "http" and not (
            allowed or (self._plain_http and is_loopback(origin.netloc))
        ):
            raise AuthError(
                f"{what} is plain http on {origin.netloc}; no credentials are sent there",
                host=self._host,
                hint=f"--insecure {origin.netloc} allows it, if that is the network's business",
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
