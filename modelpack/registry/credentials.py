"""Credentials for registries: environment, Docker's and containers' files, credential helpers.

A helper is a program that keeps credentials in a keychain, by the docker-credential-helpers
protocol: `docker-credential-NAME get|store|erase` reads the server's URL or a JSON object from
stdin and writes JSON or a message to stdout. Secrets go through pipes, never through arguments,
and no message of Modelpack repeats one.
"""

from __future__ import annotations

import base64
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Protocol

from modelpack.artifacts.json_document import decode_object
from modelpack.errors import AuthError, ManifestError
from modelpack.registry.urls import HUB_NAMES

#: As a user name, it marks the secret as an identity token, not a password.
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
        """Return the credential of a user name and a secret, which may be an identity token."""
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


class StaticCredentials:
    """Given credentials, by `host[:port]`."""

    def __init__(self, credentials: Mapping[str, Credential]) -> None:
        self._credentials = dict(credentials)

    def __repr__(self) -> str:
        return f"StaticCredentials({', '.join(sorted(self._credentials))})"

    def credential(self, host: str) -> Credential | None:
        """Return the credential given for `host`, or None."""
        return self._credentials.get(host)


class EnvironmentCredentials:
    """MODELPACK_USERNAME and MODELPACK_PASSWORD, for the host in MODELPACK_REGISTRY only.

    Without MODELPACK_REGISTRY they are an error, since any host could ask for the password.
    """

    def credential(self, host: str) -> Credential | None:
        """Return the credential if it is for `host`; raise `AuthError` if it names no host."""
        username, password, bound = (os.environ.get(name, "") for name in _VARIABLES)
        if not (username or password):
            return None
        if not bound:
            raise AuthError(
                "MODELPACK_USERNAME and MODELPACK_PASSWORD need MODELPACK_REGISTRY, "
                "which is not set",
                host=host,
                hint=f"set MODELPACK_REGISTRY={host} to use them for {host}",
            )
        if not username or not password:
            missing, other = _VARIABLES[1::-1] if username else _VARIABLES[:2]
            raise AuthError(f"{missing} is not set, but {other} is", host=host)
        if host != bound and not (host in HUB_NAMES and bound in HUB_NAMES):
            return None
        return Credential.of_pair(username, password, "MODELPACK_PASSWORD")


_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*\Z")
_SECONDS: Final = 60.0
_MAX_ANSWER: Final = 1024 * 1024
# A helper without a credential for a host fails with this message.
_NOT_FOUND: Final = "credentials not found"


class CredentialHelper:
    """The credential helper `name` in Docker's config.json; every failure is an `AuthError`."""

    def __init__(self, name: Any) -> None:
        if not isinstance(name, str) or not _NAME.match(name):
            raise AuthError(f"{str(name)[:100]!r} is not the name of a credential helper")
        self.program = f"docker-credential-{name}"

    def get(self, server: str) -> Credential | None:
        """Return the credential that the helper has for `server`, or None."""
        answer = self._run("get", server, server)
        if answer is None:
            return None
        try:
            value = decode_object(answer, self.program, limit=_MAX_ANSWER)
        except ManifestError as error:
            raise AuthError(str(error)) from None
        username, secret = value.get("Username"), value.get("Secret")
        if not isinstance(username, str) or not isinstance(secret, str):
            raise AuthError(f"{self.program} answered without Username and Secret for {server}")
        if not (username or secret):
            return None
        return Credential.of_pair(username, secret, self.program)

    def store(self, server: str, credential: Credential) -> None:
        """Store `credential` for `server` in the helper."""
        secret = credential.identity_token or credential.password
        username = TOKEN_USER if credential.identity_token else credential.username
        entry = {"ServerURL": server, "Username": username, "Secret": secret}
        self._run("store", json.dumps(entry), server, secret)

    def erase(self, server: str) -> None:
        """Delete the credential for `server` from the helper, if there is one."""
        self._run("erase", server, server)

    def _run(self, action: str, sent: str, server: str, secret: str = "") -> bytes | None:
        """Return the output of the helper, or None if it has no credential for `server`."""
        try:
            answer = subprocess.run(
                [self.program, action],
                input=sent.encode(),
                capture_output=True,
                timeout=_SECONDS,
                check=False,
            )
        except FileNotFoundError:
            raise AuthError(
                f"{self.program}, the credential helper for {server}, is not on PATH"
            ) from None
        except OSError as error:
            raise AuthError(f"cannot start {self.program}: {error.strerror}") from None
        except subprocess.TimeoutExpired:
            raise AuthError(f"{self.program} did not answer in {_SECONDS:.0f} s") from None
        if answer.returncode == 0:
            return answer.stdout
        said = answer.stdout.decode(errors="replace").strip()
        if _NOT_FOUND in said:
            return None
        if secret:
            said = said.replace(secret, "…")
        raise AuthError(f"{self.program} failed for {server}: {said[:200] or 'no message'}")


_HUB_KEY: Final = "https://index.docker.io/v1/"
_MAX_BYTES: Final = 1024 * 1024


class DockerConfig:
    """Credentials for registries in a file, or in the helpers that it names.

    `path` defaults to config.json in $DOCKER_CONFIG, else in ~/.docker. `repository` selects an
    entry if the file has several for one host.
    """

    def __init__(self, path: Path | None = None, *, repository: str = "") -> None:
        directory = os.environ.get("DOCKER_CONFIG")
        folder = Path(directory) if directory else Path.home() / ".docker"
        self.path = path or folder / "config.json"
        self._repository = repository

    def __repr__(self) -> str:
        return f"DockerConfig({str(self.path)!r})"

    def credential(self, host: str) -> Credential | None:
        """Return the credential that the file or its helpers have for `host`."""
        config = self._read()
        names = list(self._names(host))
        helpers = _by_name(config.get("credHelpers"))
        for name in names:
            if name in helpers:
                return CredentialHelper(helpers[name]).get(_helper_key(name))
        if config.get("credsStore"):
            return CredentialHelper(config["credsStore"]).get(_helper_key(host))
        entries = _by_name(config.get("auths"))
        for name in names:
            if credential := _parse_entry(_object(entries.get(name)), f"{self.path} (auths)"):
                return credential
        return None

    def store(self, host: str, credential: Credential) -> str | None:
        """Store `credential` for `host`; return the helper's program, None for the file itself."""
        config = self._read()
        if helper := self._helper(config, host):
            helper.store(_helper_key(host), credential)
            return helper.program
        if credential.identity_token:
            entry = {"auth": _encoded(TOKEN_USER, ""), "identitytoken": credential.identity_token}
        else:
            entry = {"auth": _encoded(credential.username, credential.password)}
        self._write({**config, "auths": {**_without(config, host), _helper_key(host): entry}})
        return None

    def erase(self, host: str) -> bool:
        """Delete the credentials for `host`; return whether there were any."""
        config = self._read()
        kept = _without(config, host)
        found = in_file = len(kept) < len(_object(config.get("auths")))
        if helper := self._helper(config, host):
            found = helper.get(_helper_key(host)) is not None or found
            helper.erase(_helper_key(host))
        if in_file:
            self._write({**config, "auths": kept})
        return found

    def _names(self, host: str) -> Iterator[str]:
        """Yield the possible names of entries for `host`, the most specific first."""
        parts = self._repository.split("/") if self._repository else []
        for alias in _aliases(host):
            for count in range(len(parts), 0, -1):
                yield "/".join([alias, *parts[:count]])
        yield from _aliases(host)

    def _helper(self, config: dict[str, Any], host: str) -> CredentialHelper | None:
        helpers = _by_name(config.get("credHelpers"))
        name = next((helpers[n] for n in _aliases(host) if n in helpers), config.get("credsStore"))
        return CredentialHelper(name) if name else None

    def _read(self) -> dict[str, Any]:
        try:
            with self.path.open("rb") as file:
                raw = file.read(_MAX_BYTES + 1)
        except FileNotFoundError:
            return {}
        except OSError as error:
            raise AuthError(f"{self.path}: cannot be read: {error.strerror}") from None
        try:
            return decode_object(raw, str(self.path), limit=_MAX_BYTES) if raw else {}
        except ManifestError as error:
            raise AuthError(str(error)) from None

    def _write(self, config: dict[str, Any]) -> None:
        """Replace the file, or the file it links to, atomically; only its owner may read it."""
        path = self.path.resolve()
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")  # 0600
            try:
                with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                    json.dump(config, file, indent="\t")
                    file.flush()
                    os.fsync(file.fileno())
                os.replace(name, path)
            except BaseException:
                with suppress(OSError):
                    os.unlink(name)
                raise
        except OSError as error:
            raise AuthError(f"{self.path}: cannot be written: {error.strerror}") from None


def _aliases(host: str) -> tuple[str, ...]:
    return (host, *(name for name in HUB_NAMES if name != host)) if host in HUB_NAMES else (host,)


def _helper_key(name: str) -> str:
    return _HUB_KEY if name in HUB_NAMES else name


def _name(key: str) -> str:
    """Return the `host` or `host/namespace` in a key, which may be a URL of an API."""
    bare = key.removeprefix("https://").removeprefix("http://")
    host, _, path = bare.partition("/")
    path = path.strip("/")
    return host if bare != key or path in ("", "v1", "v2") else f"{host}/{path}"


def _without(config: dict[str, Any], host: str) -> dict[str, Any]:
    names = _aliases(host)
    return {k: v for k, v in _object(config.get("auths")).items() if _name(k) not in names}


def _by_name(value: Any) -> dict[str, Any]:
    return {_name(key): entry for key, entry in _object(value).items()}


def _object(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _encoded(username: str, password: str) -> str:
    return base64.b64encode(f"{username}:{password}".encode()).decode()


def _parse_entry(entry: dict[str, Any], source: str) -> Credential | None:
    texts: dict[str, str] = {k: v for k, v in entry.items() if isinstance(v, str)}
    username, password = texts.get("username", ""), texts.get("password", "")
    if texts.get("auth"):
        try:
            pair = base64.b64decode(texts["auth"], validate=True).decode()
        except ValueError:
            raise AuthError(f"{source}: an 'auth' is not base64 of user:password") from None
        username, _, password = pair.partition(":")
        password = password.rstrip("\0")
    identity, token = texts.get("identitytoken", ""), texts.get("registrytoken", "")
    if username == TOKEN_USER:
        username, password, identity = "", "", identity or password
    if not (username or password or identity or token):
        return None
    return Credential(username, password, identity, token, source)


class CredentialChain:
    """Several sources in order; the first one with a credential for a host is used."""

    def __init__(self, sources: Sequence[CredentialSource]) -> None:
        self._sources = tuple(sources)

    def __repr__(self) -> str:
        return f"CredentialChain({', '.join(map(repr, self._sources))})"

    def credential(self, host: str) -> Credential | None:
        """Return the first credential for `host`; raise `AuthError` if a source is broken."""
        for source in self._sources:
            if credential := source.credential(host):
                return credential
        return None


def default_credentials(repository: str = "") -> CredentialChain:
    """Return the default sources of credentials; `repository` selects an entry of any host."""
    files = [DockerConfig(path, repository=repository) for path in _auth_files()]
    return CredentialChain([EnvironmentCredentials(), *files])


def _auth_files() -> Iterator[Path | None]:
    if chosen := os.environ.get("REGISTRY_AUTH_FILE"):
        yield Path(chosen)
    yield None  # Docker's config.json
    if runtime := os.environ.get("XDG_RUNTIME_DIR"):
        yield Path(runtime) / "containers" / "auth.json"
    elif sys.platform == "linux":
        yield Path(f"/run/containers/{os.getuid()}/auth.json")
    config = os.environ.get("XDG_CONFIG_HOME")
    yield (Path(config) if config else Path.home() / ".config") / "containers" / "auth.json"
