"""Credentials for a registry, and the sources that hold them in the process or its environment.

`docker_config` reads files and credential helpers, and combines all sources.
"""

from __future__ import annotations

import base64
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final, Protocol

from modelpack.errors import AuthError
from modelpack.registry.urls import HUB_NAMES

#: As a user name: what comes with it is an identity token, not a password.
TOKEN_USER: Final[str] = "<token>"  # noqa: S105
_VARIABLES: Final = ("MODELPACK_USERNAME", "MODELPACK_PASSWORD", "MODELPACK_REGISTRY")


@dataclass(frozen=True, slots=True)
class Credential:
    """Proof of identity for one registry; `source` says where it was found, for messages.

    An identity token is exchanged for access tokens (OAuth 2), a registry token is sent as it is.
    """

    username: str = ""
    password: str = field(default="", repr=False)
    identity_token: str = field(default="", repr=False)
    registry_token: str = field(default="", repr=False)
    source: str = "given"

    @classmethod
    def of_pair(cls, username: str, secret: str, source: str) -> Credential:
        """Return what a user name and a secret stand for, which may be an identity token."""
        if username == TOKEN_USER:
            return cls(identity_token=secret, source=source)
        return cls(username, secret, source=source)

    @property
    def basic(self) -> str:
        """The value of a Basic `Authorization` header (RFC 7617)."""
        pair = f"{self.username}:{self.password}".encode()
        return "Basic " + base64.b64encode(pair).decode()


class CredentialSource(Protocol):
    """Where a registry client looks for credentials."""

    def credential(self, host: str) -> Credential | None:
        """Return the credential for `host[:port]`, None for anonymous; raise `AuthError`."""
        ...


class StaticCredentials:
    """Credentials that are known already, by `host[:port]`."""

    def __init__(self, credentials: Mapping[str, Credential]) -> None:
        self._credentials = dict(credentials)

    def __repr__(self) -> str:
        return f"StaticCredentials({', '.join(sorted(self._credentials))})"

    def credential(self, host: str) -> Credential | None:
        """Return what was given for `host`, if anything."""
        return self._credentials.get(host)


class EnvironmentCredentials:
    """MODELPACK_USERNAME and MODELPACK_PASSWORD, for the host in MODELPACK_REGISTRY only.

    Without the host they are an error rather than a password for whoever asks.
    """

    def credential(self, host: str) -> Credential | None:
        """Return the credential if it is for `host`; raise `AuthError` if it is for nobody."""
        username, password, bound = (os.environ.get(name, "") for name in _VARIABLES)
        if not (username or password):
            return None
        if not bound:
            raise AuthError(
                "MODELPACK_USERNAME and MODELPACK_PASSWORD are for no host",
                host=host,
                hint=f"MODELPACK_REGISTRY={host} says that they are for {host}",
            )
        if not username or not password:
            missing = _VARIABLES[1] if username else _VARIABLES[0]
            raise AuthError(f"{missing} is not set, though its companion is", host=host)
        if host != bound and not (host in HUB_NAMES and bound in HUB_NAMES):
            return None
        return Credential.of_pair(username, password, "MODELPACK_PASSWORD")
