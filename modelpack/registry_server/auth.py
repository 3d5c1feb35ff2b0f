"""Authentication of the embedded registry: htpasswd users, bearer tokens and required scopes."""

from __future__ import annotations

import base64
import hashlib
import hmac
import os
import re
import threading
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Protocol

import anyio.to_thread
import bcrypt
from anyio import CapacityLimiter
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request

from modelpack.errors import InvalidReferenceError, UsageError
from modelpack.registry_server.content import Repository
from modelpack.registry_server.errors import ApiError, Code

#: A resource (`repository:ai/smol`) and an action on it (`pull`).
Needs = frozenset[tuple[str, str]]


def needs_of(request: Request, route: str) -> Needs:
    """Return the permissions that a request to `route`, a path with parameters, needs.

    A route without a repository needs a valid token only. A repository counts under its canonical
    name, so that an alias cannot bypass the check.
    """
    if route == "/v2/_catalog":
        return frozenset({("registry:catalog", "*")})
    if "name" not in request.path_params:
        return frozenset()
    resource = f"repository:{_canonical(request.path_params['name'])}"
    if "/uploads" not in route:
        if request.method in ("GET", "HEAD"):
            return frozenset({(resource, "pull")})
        if request.method == "DELETE":
            return frozenset({(resource, "delete")})
    needs = {(resource, "pull"), (resource, "push")}
    for other in request.query_params.getlist("from"):
        needs.add((f"repository:{_canonical(other)}", "pull"))
    return frozenset(needs)


def spelled(needs: Needs) -> str:
    """Return the `scope` of a challenge: `repository:a/b:pull,push repository:c/d:pull`."""
    actions: dict[str, set[str]] = {}
    for resource, action in needs:
        actions.setdefault(resource, set()).add(action)
    return " ".join(f"{name}:{','.join(sorted(actions[name]))}" for name in sorted(actions))


def _canonical(name: str) -> str:
    try:
        return Repository.parse(name).name or name
    except InvalidReferenceError:
        return name  # the endpoint refuses it


_HASH = re.compile(r"\$2[aby]\$(0[4-9]|1[0-7])\$[./A-Za-z0-9]{53}\Z")
_MAX_BYTES: Final = 1024 * 1024
#: bcrypt looks at no more bytes of a password than these.
_MAX_PASSWORD: Final = 72
_MAX_REMEMBERED: Final = 1024


class PasswordFile:
    """The users of a registry; the file is read again when it changes.

    bcrypt is slow on purpose, and Basic sends the password with every request. So correct pairs are
    remembered, as digests with a key that ends with the process.
    """

    def __init__(self, path: Path) -> None:
        """Raises `UsageError` for an invalid file; the error never shows a line of it."""
        self._path = path
        self._lock = threading.Lock()
        self._key = os.urandom(32)
        self._right: dict[bytes, None] = {}
        self._stamp = _stamp(path)
        self._users = _parse(path)
        # Compared for unknown users, so that the time does not reveal which users exist.
        cost = max(int(value[4:6]) for value in self._users.values())
        self._nobody = bcrypt.hashpw(os.urandom(16).hex().encode(), bcrypt.gensalt(cost))

    def __repr__(self) -> str:
        return f"PasswordFile({str(self._path)!r})"

    def remembers(self, username: str, password: str) -> bool:
        """Return at once whether this pair is known to be correct; if not, `check` decides."""
        expected = self._current().get(username)
        digest = self._digest(username, password.encode(), expected or b"")
        with self._lock:
            return digest in self._right

    def check(self, username: str, password: str) -> bool:
        """Return whether this is a user with that password; it may take a tenth of a second."""
        encoded = password.encode()
        if len(encoded) > _MAX_PASSWORD or "\0" in username + password:
            return False
        expected = self._current().get(username)
        digest = self._digest(username, encoded, expected or b"")
        with self._lock:
            if digest in self._right:
                return True
        right = bcrypt.checkpw(encoded, expected or self._nobody) and expected is not None
        if right:
            with self._lock:
                if len(self._right) >= _MAX_REMEMBERED:
                    self._right.clear()
                self._right[digest] = None
        return right

    def _digest(self, username: str, password: bytes, expected: bytes) -> bytes:
        parts = b"\0".join([username.encode(), expected, password])
        return hmac.new(self._key, parts, hashlib.sha256).digest()

    def _current(self) -> dict[str, bytes]:
        """Return the current users; keep the last ones if the file has become invalid."""
        with suppress(UsageError), self._lock:
            stamp = _stamp(self._path)
            if stamp != self._stamp:
                self._users, self._stamp = _parse(self._path), stamp
        return self._users


def _stamp(path: Path) -> tuple[int, int, int]:
    try:
        found = path.stat()
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror}") from None
    return found.st_mtime_ns, found.st_size, found.st_ino


def _parse(path: Path) -> dict[str, bytes]:
    try:
        with path.open("rb") as file:
            raw = file.read(_MAX_BYTES + 1)
        text = raw.decode()
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UsageError(f"{path}: is not text in UTF-8") from None
    if len(raw) > _MAX_BYTES:
        raise UsageError(f"{path}: is larger than {_MAX_BYTES} bytes")
    users: dict[str, bytes] = {}
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip() or line.startswith("#"):
            continue
        name, _, value = line.strip().partition(":")
        if not name or not _HASH.match(value):
            raise UsageError(
                f"{path}: line {number} is not a user with a bcrypt hash",
                hint="use `htpasswd -B`: passwords of other hashes are guessed too fast",
            )
        users[name] = value.encode()
    if not users:
        raise UsageError(f"{path}: has no users")
    return users


if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey

    Key = RSAPublicKey | EllipticCurvePublicKey | Ed25519PublicKey

_LEEWAY: Final = 60  # seconds that clocks may differ, as in distribution
_RSA: Final = ("RS256", "RS384", "RS512", "PS256", "PS384", "PS512")
_CURVES: Final = {"secp256r1": "ES256", "secp384r1": "ES384", "secp521r1": "ES512"}
_MARK: Final = b"-----BEGIN "


@dataclass(frozen=True, slots=True)
class TokenSettings:
    """The token server: `certificates` is a PEM file of its certificates or public keys.

    Clients are sent to the URL `realm`; tokens must be for `service` and from `issuer`.
    """

    realm: str
    service: str
    issuer: str
    certificates: Path


def _granted(claims: dict[str, Any]) -> Needs:
    granted = set()
    entries = claims.get("access")
    for entry in entries if isinstance(entries, list) else []:
        if not isinstance(entry, dict):
            continue
        resource = f"{entry.get('type')}:{entry.get('name')}"
        actions = entry.get("actions")
        for action in actions if isinstance(actions, list) else []:
            granted.add((resource, str(action)))
    return frozenset(granted)


def _read_keys(path: Path) -> list[tuple[Key, tuple[str, ...]]]:
    """Return the keys in a file, each with the algorithms that it may be used with."""
    from cryptography import x509
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    keys = []
    try:
        for part in path.read_bytes().split(_MARK)[1:]:
            pem = _MARK + part
            if part.startswith(b"CERTIFICATE"):
                keys.append(_usable(x509.load_pem_x509_certificate(pem).public_key()))
            else:
                keys.append(_usable(load_pem_public_key(pem)))
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, UnsupportedAlgorithm):
        what = "contains something other than certificates and public keys for tokens"
        raise UsageError(f"{path}: {what}") from None
    if not keys:
        raise UsageError(f"{path}: contains no certificate")
    return keys


def _usable(key: object) -> tuple[Key, tuple[str, ...]]:
    from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

    if isinstance(key, rsa.RSAPublicKey):
        return key, _RSA
    if isinstance(key, ed25519.Ed25519PublicKey):
        return key, ("EdDSA",)
    if isinstance(key, ec.EllipticCurvePublicKey) and key.curve.name in _CURVES:
        return key, (_CURVES[key.curve.name],)
    raise ValueError("such a key cannot sign tokens")


#: Passwords checked at a time: each check occupies a processor for a while.
_AT_A_TIME: Final = 2
_MAX_HEADER: Final = 32 * 1024


class Guard(Protocol):
    """Authorises requests."""

    async def check(self, request: Request, needs: Needs) -> None:
        """Raise `ApiError` (401) unless the request proves the permissions that it needs."""


class Passwords:
    """Basic authentication (RFC 7617): the users of a password file may do everything."""

    def __init__(self, file: PasswordFile) -> None:
        self._file = file
        self._limiter: CapacityLimiter | None = None

    async def check(self, request: Request, needs: Needs) -> None:
        """Raise the challenge unless user and password are correct."""
        pair = _decoded(_proof(request, "basic"))
        if pair is not None:
            # Only unknown pairs wait for each other, so guesses do not delay users.
            if await run_in_threadpool(self._file.remembers, *pair):
                return
            if self._limiter is None:
                self._limiter = CapacityLimiter(_AT_A_TIME)
            if await anyio.to_thread.run_sync(self._file.check, *pair, limiter=self._limiter):
                return
        message = "wrong user or password" if pair else "this registry requires a user and password"
        raise _unauthorized(message, 'Basic realm="modelpack", charset="UTF-8"')


class BearerTokens:
    """Bearer authentication (RFC 6750): a token lists the permissions of its holder."""

    def __init__(self, settings: TokenSettings) -> None:
        """Raises `UsageError` for unusable keys, or where PyJWT is missing."""
        try:
            import jwt
            from cryptography.hazmat.primitives import serialization  # noqa: F401
        except ImportError:
            raise UsageError(
                "bearer tokens need PyJWT and cryptography, which are not installed",
                hint="run pip install 'modelpack[tokens]'",
            ) from None
        self._jwt = jwt
        self._settings = settings
        self._keys = _read_keys(settings.certificates)
        self._challenge = f'Bearer realm="{settings.realm}",service="{settings.service}"'

    async def check(self, request: Request, needs: Needs) -> None:
        """Raise the challenge, with the required scope, unless the token has it."""
        proof = _proof(request, "bearer")
        allowed = self._allowed(proof) if proof else None
        if allowed is not None and needs <= allowed:
            return
        challenge = self._challenge + (f',scope="{spelled(needs)}"' if needs else "")
        if allowed is not None:
            raise _unauthorized(
                "the token does not allow this", f'{challenge},error="insufficient_scope"'
            )
        if proof:
            raise _unauthorized("the token is not valid", f'{challenge},error="invalid_token"')
        raise _unauthorized("this registry requires a token", challenge)

    def _allowed(self, token: str) -> Needs | None:
        """Return the permissions of `token`; None if it is not valid."""
        for key, algorithms in self._keys:
            try:
                claims = self._jwt.decode(
                    token,
                    key,
                    algorithms=list(algorithms),
                    audience=self._settings.service,
                    issuer=self._settings.issuer,
                    leeway=_LEEWAY,
                    options={"require": ["exp", "iss", "aud"]},
                )
            except (self._jwt.InvalidSignatureError, self._jwt.InvalidAlgorithmError):
                continue
            except (self._jwt.PyJWTError, ValueError, TypeError, RecursionError):
                return None
            return _granted(claims)
        return None


def _proof(request: Request, wanted: str) -> str:
    header = request.headers.get("authorization", "")[:_MAX_HEADER]
    scheme, _, proof = header.partition(" ")
    return proof.strip() if scheme.lower() == wanted else ""


def _decoded(proof: str) -> tuple[str, str] | None:
    try:
        text = base64.b64decode(proof, validate=True).decode()
    except ValueError:
        return None
    username, colon, password = text.partition(":")
    return (username, password) if colon else None


def _unauthorized(message: str, challenge: str) -> ApiError:
    # The scope comes from a path, which may have characters that a header cannot have.
    clean = challenge.encode("ascii", "replace").decode()
    clean = "".join(c if c.isprintable() else "?" for c in clean)
    return ApiError(401, Code.UNAUTHORIZED, message, headers={"WWW-Authenticate": clean})
