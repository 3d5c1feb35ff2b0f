"""API keys: the file that defines them and their limits. It holds hashes, never keys.

```toml
[keys.alice]
sha256 = "64 hexadecimal digits"       # of alice's key
requests_per_minute = 60               # without a line, there is no such limit
tokens_per_minute = 100000
concurrency = 4
models = ["ai/smollm2*"]               # without a line: all models, and managing them
gateway = false                        # true: the key of a gateway, which names its callers

[keys.alice.per_caller]                # limits of each caller that alice names (X-Modelpack-Caller)
requests_per_minute = 10
```
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import os
import re
import secrets
import tomllib
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from modelpack.errors import (
    ConflictError,
    FormatError,
    ModelpackError,
    NotFoundError,
    UsageError,
)
from modelpack.store.filesystem import FileLock, write_atomically
from modelpack_server.gateway.caller import Caller
from modelpack_server.gateway.limits import NO_LIMITS, Limits

#: The prefix of all keys, by which scanners for leaked secrets can find them.
PREFIX = "mp_"
KEY_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,63}")

_SHA256 = re.compile(r"[0-9a-f]{64}")
_LIMIT_FIELDS = ("requests_per_minute", "tokens_per_minute", "concurrency")
_MOST = 2**53


@dataclass(frozen=True, slots=True)
class Key:
    """One API key: its name in logs, the SHA-256 of its secret, and its permissions.

    `models` are glob patterns for the names in requests; None allows all names, and the routes that
    manage models. `gateway`: the key belongs to a gateway, which may name the caller of each
    request (`modelpack_server.gateway.forwarding`).
    """

    name: str
    sha256: bytes
    limits: Limits = NO_LIMITS
    per_caller: Limits | None = None
    models: tuple[str, ...] | None = None
    gateway: bool = False

    def allows(self, model: str) -> bool:
        """Return whether this key may use `model`; see `Caller.allows_unresolved`."""
        return Caller(self.name, self.models).allows_unresolved(model)


@dataclass(frozen=True, slots=True)
class Keys:
    """The keys in a keys file."""

    keys: tuple[Key, ...] = ()

    def find(self, secret: str) -> Key | None:
        """Return the key with this secret, in constant time, or None."""
        digest = hash_of(secret)
        found = None
        for key in self.keys:
            if hmac.compare_digest(key.sha256, digest):
                found = key
        return found

    def named(self, name: str | None) -> Key | None:
        """Return the key with this name, or None."""
        return next((key for key in self.keys if key.name == name), None)


def hash_of(secret: str) -> bytes:
    """Return the SHA-256 of a secret, for `Key.sha256`."""
    return hashlib.sha256(secret.encode(errors="surrogateescape")).digest()


def parse_keys(text: str, path: str) -> Keys:
    """Return the keys in the TOML document `text`; `path` names it in errors.

    Raises `FormatError` with file, key and field, but without the value of a hash.
    """
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise FormatError(f"is not TOML: {error}", path=path) from error
    unknown = sorted(set(document) - {"keys"})
    if unknown:
        raise FormatError(f"unknown field {unknown[0]!r}; keys are tables [keys.NAME]", path=path)
    tables = document.get("keys", {})
    if not isinstance(tables, dict):
        raise FormatError("'keys' is not a table; expected tables [keys.NAME]", path=path)
    keys = tuple(_parse_key(name, table, path) for name, table in tables.items())
    owner: dict[bytes, str] = {}
    for key in keys:
        if other := owner.get(key.sha256):
            raise FormatError(f"[keys.{key.name}] has the same sha256 as [keys.{other}]", path=path)
        owner[key.sha256] = key.name
    return Keys(keys)


def _parse_key(name: str, table: Any, path: str) -> Key:
    def fail(field: str, problem: str) -> NoReturn:
        raise FormatError(f"[keys.{name}] {field}: {problem}".replace(" :", ":"), path=path)

    if not KEY_NAME.fullmatch(name):
        raise FormatError(
            f"[keys.{name[:64]!r}]: a name has 1 to 64 letters, digits and . _ @ -, and begins "
            "with a letter or digit",
            path=path,
        )
    if not isinstance(table, dict):
        fail("", f"expected a table, got {_kind(table)}")
    known = {"sha256", "models", "per_caller", "gateway", *_LIMIT_FIELDS}
    for field in table:
        if field not in known:
            fail(field, f"is unknown; expected one of {', '.join(sorted(known))}")
    if "sha256" not in table:
        fail("sha256", "is missing")
    digest = table["sha256"]
    if not isinstance(digest, str):
        fail("sha256", f"expected 64 hexadecimal digits, got {_kind(digest)}")
    if not _SHA256.fullmatch(digest.lower()):
        fail("sha256", f"expected 64 hexadecimal digits, got other text of length {len(digest)}")
    gateway = table.get("gateway", False)
    if not isinstance(gateway, bool):
        fail("gateway", f"expected a boolean, got {_kind(gateway)}")
    if gateway and "models" in table:
        fail("gateway", "cannot be combined with 'models': set them in the gateway's keys")
    return Key(
        name=name,
        sha256=bytes.fromhex(digest),
        limits=_parse_limits(table, "", fail),
        per_caller=_parse_per_caller(table.get("per_caller"), fail),
        models=_parse_models(table.get("models"), fail),
        gateway=gateway,
    )


def _parse_limits(
    table: Mapping[str, Any], place: str, fail: Callable[[str, str], NoReturn]
) -> Limits:
    values: dict[str, int | None] = {}
    for field in _LIMIT_FIELDS:
        value = table.get(field)
        if value is not None:
            if not isinstance(value, int) or isinstance(value, bool):
                fail(place + field, f"expected a whole number, got {_kind(value)}")
            if not 1 <= value <= _MOST:
                fail(place + field, f"expected 1 to {_MOST}, got {value}")
        values[field] = value
    return Limits(**values)


def _parse_per_caller(table: Any, fail: Callable[[str, str], NoReturn]) -> Limits | None:
    if table is None:
        return None
    if not isinstance(table, dict):
        fail("per_caller", f"expected a table, got {_kind(table)}")
    for field in table:
        if field not in _LIMIT_FIELDS:
            fail(f"per_caller.{field}", f"is unknown; expected one of {', '.join(_LIMIT_FIELDS)}")
    return _parse_limits(table, "per_caller.", fail)


def _parse_models(value: Any, fail: Callable[[str, str], NoReturn]) -> tuple[str, ...] | None:
    if value is None:
        return None
    if not isinstance(value, list):
        fail("models", f"expected a list of patterns, got {_kind(value)}")
    for index, glob in enumerate(value):
        if not isinstance(glob, str) or not glob:
            fail(f"models[{index}]", f"expected a pattern, got {_kind(glob)}")
    if not value:
        fail("models", "is empty, which allows no model; remove it to allow all")
    return tuple(value)


def _kind(value: Any) -> str:
    if value == "":
        return "an empty string"
    names = {bool: "a boolean", int: "a number", float: "a fraction", str: "a string",
             list: "a list", dict: "a table"}  # fmt: skip
    return names.get(type(value), "a date or time")


_LOG = logging.getLogger("modelpack_server.gateway")
_MAX_BYTES = 8 * 1024 * 1024
_Signature = tuple[int, int, int, int, int]


class KeyFile:
    """The current keys in the file at `path`.

    A change takes effect with the next request. If the file is missing or invalid, the previous
    keys remain and the error is logged, so that a mistake neither locks clients out nor lets
    others in. To refuse all requests, empty the file.
    """

    def __init__(self, path: Path | str) -> None:
        """Raises `FormatError` or `UsageError` if the file cannot be used initially."""
        self.path = Path(path)
        self._signature: _Signature | None
        self._signature, text = _read(self.path)
        self._keys = parse_keys(text, str(self.path))
        self._warn()

    def current(self) -> Keys:
        """Return the keys, after reading the file again if it has changed."""
        try:
            status = os.stat(self.path)
        except OSError as error:
            if self._signature is not None:
                _LOG.error("the previous keys remain in use: %s: %s", self.path, error.strerror)
            self._signature = None
            return self._keys
        if _signature(status) != self._signature:
            self._signature = _signature(status)  # log an unreadable file only once
            self._reload()
        return self._keys

    def _reload(self) -> None:
        try:
            self._signature, text = _read(self.path)
            self._keys = parse_keys(text, str(self.path))
        except ModelpackError as error:
            _LOG.error("the previous keys remain in use: %s", error)
            return
        _LOG.warning("reloaded %s; number of keys: %d", self.path, len(self._keys.keys))
        self._warn()

    def _warn(self) -> None:
        if not self._keys.keys:
            _LOG.warning("%s contains no keys: every request is refused", self.path)
        mode = self._signature[4] & 0o777 if self._signature else 0o600
        if mode & 0o077:
            _LOG.warning("%s can be read or written by others (mode %04o): chmod 600 it",
                         self.path, mode)  # fmt: skip


def add_key(
    path: Path | str,
    name: str,
    *,
    limits: Limits = NO_LIMITS,
    models: tuple[str, ...] = (),
    gateway: bool = False,
) -> str:
    """Create a key named `name`, add its hash to the file at `path`, and return the key.

    The key cannot be read from the file later. The file is created if needed and replaced
    atomically, with mode 0600; comments are kept. Raises `UsageError` for an invalid name,
    `ConflictError` for an existing one, `FormatError` for an invalid file.
    """
    if not KEY_NAME.fullmatch(name):
        raise UsageError(
            f"{name!r} is not a valid key name",
            hint="1 to 64 letters, digits and . _ @ -, beginning with a letter or digit",
        )
    path = Path(os.path.realpath(path))
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    with _locked(path):
        text = _read(path)[1] if path.exists() else ""
        if any(key.name == name for key in parse_keys(text, str(path)).keys):
            raise ConflictError(f"{path} already has a key {name!r}", hint="choose another name")
        secret = PREFIX + secrets.token_urlsafe(32)
        text = f"{text.rstrip()}\n\n{_table(name, secret, limits, models, gateway)}".lstrip()
        parse_keys(text, str(path))  # check that the new text is valid
        write_atomically(path, text.encode(), by_way_of=path.parent, mode=0o600)
    return secret


def remove_key(path: Path | str, name: str) -> None:
    """Remove the key named `name` from the file at `path`, which is replaced as by `add_key`.

    Other keys and comments are kept. Raises `NotFoundError` for an unknown name, `ConflictError` if
    the key is not written as a table, `FormatError` or `UsageError` for an invalid file.
    """
    path = Path(os.path.realpath(path))
    with _locked(path):
        text = _read(path)[1]
        before = parse_keys(text, str(path)).keys
        left = tuple(key for key in before if key.name != name)
        if left == before:
            raise NotFoundError(
                f"{path} has no key {name!r}", hint="run modelpack gateway key list --keys FILE"
            )
        text = _without(text, name)
        try:
            removed = parse_keys(text, str(path)).keys == left
        except FormatError:
            removed = False
        if not removed:
            raise ConflictError(
                f"cannot remove the key {name!r} from {path}: it is not a table [keys.{name}]",
                hint="remove it with an editor",
            )
        write_atomically(path, text.encode(), by_way_of=path.parent, mode=0o600)


def _locked(path: Path) -> AbstractContextManager[None]:
    return FileLock(path.with_name(f".{path.name}.lock")).held(remove=True)


def _without(text: str, name: str) -> str:
    """Return `text` without the tables of the key, up to the last line that is not a comment."""
    kept: list[str] = []
    comments: list[str] = []  # blank lines and comments, which may belong to the next table
    drops = False
    for line in text.splitlines(keepends=True):
        if line.lstrip().startswith("["):
            drops = _path_of(line)[:2] == ["keys", name]
        elif not line.strip() or line.lstrip().startswith("#"):
            comments.append(line)
            continue
        if not drops:
            kept += [*comments, line]
        elif line.lstrip().startswith("["):
            kept += comments  # above the table
        comments = []
    return "".join([*kept, *comments]).strip("\n") + "\n"


def _path_of(header: str) -> list[str]:
    """Return the keys in the header of a TOML table; [] for another line."""
    try:
        table: Any = tomllib.loads(header)
    except tomllib.TOMLDecodeError:
        return []
    path = []
    while isinstance(table, dict) and table:
        [(key, table)] = table.items()
        path.append(key)
    return path


def _table(name: str, secret: str, limits: Limits, models: tuple[str, ...], gateway: bool) -> str:
    lines = [f"[keys.{_quoted(name)}]", f'sha256 = "{hash_of(secret).hex()}"']
    for field in _LIMIT_FIELDS:
        if (value := getattr(limits, field)) is not None:
            lines.append(f"{field} = {value}")
    if models:
        lines.append(f"models = [{', '.join(map(_quoted, models))}]")
    if gateway:
        lines.append("gateway = true")
    return "\n".join(lines) + "\n"


def _quoted(text: str) -> str:
    """Return a TOML basic string, without control characters, which names cannot contain."""
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return '"' + "".join(c if c.isprintable() else f"\\U{ord(c):08x}" for c in escaped) + '"'


def _read(path: Path) -> tuple[_Signature, str]:
    try:
        with open(path, "rb") as file:
            signature = _signature(os.fstat(file.fileno()))
            content = file.read(_MAX_BYTES + 1)
    except OSError as error:
        raise UsageError(
            f"cannot read the keys at {path}: {error.strerror}",
            hint="to create a key, run modelpack gateway key NAME --keys FILE",
        ) from error
    if len(content) > _MAX_BYTES:
        raise FormatError(f"is larger than {_MAX_BYTES} bytes", path=str(path))
    try:
        return signature, content.decode()
    except UnicodeDecodeError as error:
        raise FormatError("is not UTF-8", path=str(path), offset=error.start) from error


def _signature(found: os.stat_result) -> _Signature:
    return found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_mode
