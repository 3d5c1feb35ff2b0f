"""The HTTP client of a hub: its address and token, how it authenticates, and its errors.

Of huggingface_hub only `get_token` is used: it finds the token where its users expect it. Its HTTP
client has no limits on bytes, speed, redirects and private addresses, and no `Stop`; `RepoFile`
accepts paths, sizes and digests of any kind, so all checks of `repository` would stay.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final
from urllib.parse import urlsplit

import requests

from modelpack.errors import (
    AuthError,
    DeniedError,
    NotFoundError,
    RegistryError,
    RemoteUnavailableError,
    UsageError,
)
from modelpack.hub.reference import HUGGING_FACE, Site
from modelpack.registry.auth import Scopes
from modelpack.registry.http_client import HttpClient
from modelpack.registry.http_errors import shown
from modelpack.registry.tls import TlsOptions
from modelpack.registry.urls import checked_url, is_local, origin_of

_TRUE: Final = frozenset({"1", "ON", "YES", "TRUE"})  # as huggingface_hub reads them


@dataclass(frozen=True, slots=True)
class HubSettings:
    """The settings of a hub: `endpoint` is its address or a mirror's, `token` may be None."""

    endpoint: str = HUGGING_FACE.endpoint
    token: str | None = field(default=None, repr=False)
    offline: bool = False
    site: Site = HUGGING_FACE

    @classmethod
    def from_environment(
        cls, environ: Mapping[str, str] = os.environ, site: Site = HUGGING_FACE
    ) -> HubSettings:
        """Return the settings in the environment; raise `UsageError` for an invalid address."""
        variable = site.endpoint_variable
        given = environ.get(variable, "").strip().rstrip("/")
        try:
            endpoint = checked_url(given, variable) if given else site.endpoint
        except RegistryError as error:
            raise UsageError(
                str(error),
                hint=f"set {variable} to the address of a hub, like https://hf-mirror.example",
            ) from None
        if site is not HUGGING_FACE:
            return cls(endpoint.rstrip("/"), environ.get(site.token_variable) or None, site=site)
        switches = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
        offline = any(environ.get(name, "").upper() in _TRUE for name in switches)
        return cls(endpoint.rstrip("/"), None if offline else _token(environ), offline)

    def check_online(self, what: str) -> None:
        """Raise `RemoteUnavailableError` if nothing may be fetched."""
        if self.offline:
            raise RemoteUnavailableError(
                f"{what}: not in the store, and HF_HUB_OFFLINE forbids requests to the hub",
                hint="unset HF_HUB_OFFLINE, or name a model that is stored",
            )


def _token(environ: Mapping[str, str]) -> str | None:
    if environ.get("HF_HUB_DISABLE_IMPLICIT_TOKEN", "").upper() in _TRUE:
        return None
    from huggingface_hub import get_token

    try:
        return get_token()
    except Exception as error:  # of an OIDC exchange, the network or a file
        raise AuthError(
            f"cannot read the token of the hub: {error}", hint="log in with `hf auth login`"
        ) from error


@dataclass(frozen=True, slots=True)
class HubAuthenticator:
    """The `Authenticator` of a hub: it sends the token with each request, without a challenge."""

    host: str
    token: str | None = field(repr=False)
    log_in: str = HUGGING_FACE.log_in

    def header(self, _: Scopes) -> str | None:
        """Return the `Authorization` header, or None without a token."""
        return f"Bearer {self.token}" if self.token else None

    def is_challenge(self, _: requests.Response) -> bool:
        """Return False: there is no other header to send."""
        return False

    def answer(self, _challenge: str, _sent: str | None, _scopes: Scopes) -> str:
        """Raise `AuthError`: there is no other header to send."""
        raise self.refused()

    def refused(self) -> AuthError:
        """Return the error for a token that is missing or was refused."""
        problem = "refused the token" if self.token else "requires a token, and none is set"
        return AuthError(
            f"{self.host} {problem}", host=self.host, status_code=401, hint=self.log_in
        )

    def scrubbed(self, said: bytes) -> bytes:
        """Return what the hub said with the token masked."""
        return said.replace(self.token.encode(), b"...") if self.token else said

    def error(self, what: str, response: requests.Response) -> RegistryError | None:
        """Return the error that the hub's own headers describe, if there are any."""
        code = response.headers.get("X-Error-Code", "")
        if not code and response.status_code not in (401, 403):
            return None
        said = response.headers.get("X-Error-Message", "")
        said = shown(self.scrubbed(said.encode()).decode(), 300)
        host = origin_of(response.url).netloc
        return _error(what, host, response.status_code, code, said, self.log_in)


def hub_client(settings: HubSettings, *, tls: TlsOptions, **options: Any) -> HttpClient:
    """Return the client for one hub; raise `AuthError` if its token would go over plain http.

    `options` are those of `HttpClient`.
    """
    parts = urlsplit(settings.endpoint)
    exposed = parts.scheme == "http" and not is_local(parts.netloc)
    if exposed and settings.token and parts.netloc not in tls.insecure:
        raise AuthError(
            f"the token of the hub is not sent to {parts.netloc} over plain http",
            host=parts.netloc,
            hint=f"use https in {settings.site.endpoint_variable}, or --insecure {parts.netloc}",
        )
    authenticator = HubAuthenticator(parts.netloc, settings.token, settings.site.log_in)
    return HttpClient(origin_of(settings.endpoint), lambda _: authenticator, tls=tls, **options)


def _error(what: str, host: str, status: int, code: str, said: str, log_in: str) -> RegistryError:
    kind: type[RegistryError] = {401: AuthError, 403: DeniedError}.get(status, RegistryError)
    hint = {401: log_in, 403: "ask for a token that may read this repository"}.get(status)
    if code == "GatedRepo":
        kind = DeniedError if status == 403 else AuthError
        hint = "accept the terms of the gated model on its page, with the account of the token"
        if status == 401:
            hint += "; " + log_in
    elif code in ("RevisionNotFound", "EntryNotFound"):
        kind, hint = NotFoundError, None
        if code == "RevisionNotFound":
            hint = "check the revision: a branch, a tag or a commit of the repository"
    elif status == 404 or (code == "RepoNotFound" and status != 401):
        kind, hint = NotFoundError, None
    shown_code = f" {code}" if code else ""
    return kind(
        f"{what}: {host} answered {status}{shown_code}{': ' if said else ''}{said}",
        host=host,
        status_code=status,
        code=code or None,
        hint=hint,
    )
