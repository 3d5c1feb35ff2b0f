"""Login and logout: check credentials against a registry and store them in Docker's config file."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from modelpack.errors import UsageError
from modelpack.registry.credentials import Credential, DockerConfig, StaticCredentials
from modelpack.registry.repository import Registry

_MAX_SECRET: Final = 64 * 1024


@dataclass(frozen=True, slots=True)
class Login:
    """Where a login is stored: in `helper` or, if that is None, as plain text in `file`.

    `checked` is false if the registry accepted requests without asking for the credentials.
    """

    host: str
    helper: str | None
    file: str
    checked: bool


def login_file() -> DockerConfig:
    """Return the file for logins: $REGISTRY_AUTH_FILE, which is read first, or Docker's file."""
    chosen = os.environ.get("REGISTRY_AUTH_FILE")
    return DockerConfig(Path(chosen) if chosen else None)


def log_in(host: str, username: str, secret: str, config: DockerConfig, **options: Any) -> Login:
    """Check the credentials with the registry `host`, and store them in `config`.

    `options` are those of `Registry`. With the user name `<token>` the secret is an identity token.
    Raises `AuthError`, and stores nothing, if the registry refuses them.
    """
    _check(host, username, secret)
    credential = Credential.of_pair(username, secret, "this login")
    source = _Asked(host, credential)
    with Registry(host, credentials=source, **options) as registry:
        registry.ping()
    helper = config.store(host, credential)
    return Login(host, helper, str(config.path), source.asked)


def log_out(host: str, config: DockerConfig) -> bool:
    """Delete the credentials for `host`; return whether there were any."""
    _check_host(host)
    return config.erase(host)


class _Asked(StaticCredentials):
    """Credentials that record whether the registry asked for them."""

    def __init__(self, host: str, credential: Credential) -> None:
        super().__init__({host: credential})
        self.asked = False

    def credential(self, host: str) -> Credential | None:
        self.asked = True
        return super().credential(host)


def _check(host: str, username: str, secret: str) -> None:
    _check_host(host)
    if not username or ":" in username or not username.isprintable():
        raise UsageError(
            "the user name must be printable, not empty and without a colon", hint="use --username"
        )
    # These messages must not contain the secret.
    if not secret:
        raise UsageError("the password is empty")
    if len(secret) > _MAX_SECRET or any(c in secret for c in "\0\r\n"):
        raise UsageError(f"the password must be one line of at most {_MAX_SECRET} characters")


def _check_host(host: str) -> None:
    if not host or any(c in host for c in "/@?#\\") or not host.isprintable() or " " in host:
        raise UsageError(
            f"{host[:200]!r} is not a registry: expected HOST or HOST:PORT",
            hint="leave out https:// and the name of the repository",
        )
