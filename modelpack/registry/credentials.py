"""Where credentials come from: Docker's config.json and its credential helpers.

Format: docs of `docker login`; helpers speak the docker-credential-helpers protocol: the server's
URL on stdin of `docker-credential-NAME get`, JSON or a message on stdout.
"""

from __future__ import annotations

import base64
import binascii
import os
import re
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Protocol

from modelpack.errors import AuthError, ManifestError
from modelpack.gojson import decode_object
from modelpack.registry.hosts import HUB_NAMES

_HUB_KEY: Final = "https://index.docker.io/v1/"
_HELPER_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*\Z")
_HELPER_SECONDS = 60.0
_MAX_CONFIG_BYTES = 1024 * 1024
# A helper that knows nothing of a host says so in words and fails.
_NOT_FOUND = "credentials not found"
# As a user name: what comes with it is an identity token, not a password.
_TOKEN_USER = "<token>"  # noqa: S105


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

    def credential(self, host: str) -> Credential | None:
        """Return what was given for `host`, if anything."""
        return self._credentials.get(host)


class DockerConfig:
    """Docker's config.json: helpers for one host, the helper for all, entries in the file.

    `path` defaults to config.json in $DOCKER_CONFIG, else in ~/.docker.
    """

    def __init__(self, path: Path | None = None) -> None:
        directory = os.environ.get("DOCKER_CONFIG")
        self._path = path or (Path(directory) if directory else Path.home() / ".docker") / (
            "config.json"
        )

    def credential(self, host: str) -> Credential | None:
        """Return the credential that the file or its helpers have for `host`."""
        config = self._read()
        keys = _keys(host)
        helpers = _object(config.get("credHelpers"))
        helper = next((helpers[key] for key in keys if key in helpers), config.get("credsStore"))
        if helper:
            return _ask_helper(helper, _HUB_KEY if _HUB_KEY in keys else host)
        entries = {_host_of(key): entry for key, entry in _object(config.get("auths")).items()}
        for key in keys:
            entry = _object(entries.get(_host_of(key)))
            if credential := _parse_entry(entry, f"{self._path} (auths)"):
                return credential
        return None

    def _read(self) -> dict[str, Any]:
        try:
            with self._path.open("rb") as file:
                raw = file.read(_MAX_CONFIG_BYTES + 1)
        except FileNotFoundError:
            return {}
        except OSError as error:
            raise AuthError(f"{self._path}: cannot be read: {error.strerror}") from None
        try:
            return decode_object(raw, str(self._path), limit=_MAX_CONFIG_BYTES) if raw else {}
        except ManifestError as error:
            raise AuthError(str(error)) from None


def _keys(host: str) -> tuple[str, ...]:
    return (host, *HUB_NAMES, _HUB_KEY) if host in HUB_NAMES else (host,)


def _host_of(key: str) -> str:
    """Return the host in a key of `auths`, which may be a URL."""
    return key.removeprefix("https://").removeprefix("http://").partition("/")[0]


def _object(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _parse_entry(entry: dict[str, Any], source: str) -> Credential | None:
    texts = {key: value for key, value in entry.items() if isinstance(value, str) and value}
    username, password = texts.get("username", ""), texts.get("password", "")
    if "auth" in texts:
        try:
            pair = base64.b64decode(texts["auth"], validate=True).decode()
        except (binascii.Error, UnicodeDecodeError):
            raise AuthError(f"{source}: an 'auth' is not base64 of user:password") from None
        username, _, password = pair.partition(":")
        password = password.rstrip("\0")
    return _credential(
        username,
        password,
        texts.get("identitytoken", ""),
        texts.get("registrytoken", ""),
        source,
    )


def _credential(
    username: str, password: str, identity_token: str, registry_token: str, source: str
) -> Credential | None:
    if username == _TOKEN_USER:
        username, password, identity_token = "", "", password or identity_token
    if not (username or password or identity_token or registry_token):
        return None
    return Credential(username, password, identity_token, registry_token, source)


def _ask_helper(name: Any, server: str) -> Credential | None:
    if not isinstance(name, str) or not _HELPER_NAME.match(name):
        raise AuthError(f"{str(name)[:100]!r} is not the name of a credential helper")
    program = f"docker-credential-{name}"
    try:
        answer = subprocess.run(
            [program, "get"],
            input=server.encode(),
            capture_output=True,
            timeout=_HELPER_SECONDS,
            check=False,
        )
    except FileNotFoundError:
        raise AuthError(f"{program}, the credential helper for {server}, is not on PATH") from None
    except OSError as error:
        raise AuthError(f"{program} does not start: {error.strerror}") from None
    except subprocess.TimeoutExpired:
        raise AuthError(f"{program} did not answer in {_HELPER_SECONDS:.0f} s") from None
    if answer.returncode != 0:
        said = answer.stdout.decode(errors="replace").strip()
        if _NOT_FOUND in said:
            return None
        raise AuthError(f"{program} failed for {server}: {said[:200] or 'it said nothing'}")
    try:
        value = decode_object(answer.stdout, program, limit=_MAX_CONFIG_BYTES)
    except ManifestError as error:
        raise AuthError(str(error)) from None
    username, secret = value.get("Username"), value.get("Secret")
    if not isinstance(username, str) or not isinstance(secret, str):
        raise AuthError(f"{program} answered without Username and Secret for {server}")
    return _credential(username, secret, "", "", program)
