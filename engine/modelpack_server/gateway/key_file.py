"""The file that holds the keys: read again when it changes, added to as a whole."""

from __future__ import annotations

import logging
import os
import secrets
from pathlib import Path

from modelpack.errors import ConflictError, FormatError, ModelpackError, UsageError
from modelpack.stores.durability import write_atomically
from modelpack.stores.locks import FileLock
from modelpack_server.gateway.keys import KEY_NAME, PREFIX, Keys, hash_of, parse_keys
from modelpack_server.gateway.limits import NO_LIMITS, Limits

_LOG = logging.getLogger("modelpack_server.gateway")
_MAX_BYTES = 8 * 1024 * 1024
_Signature = tuple[int, int, int, int, int]


class KeyFile:
    """The keys at `path`, as they are now.

    A change is seen with the next request. A file that does not parse, or is gone, leaves the keys
    as they were and is logged as an error: a slip of the editor neither locks everybody out nor
    lets anybody in. To refuse everybody, empty the file.
    """

    def __init__(self, path: Path | str) -> None:
        """Raises `FormatError` or `UsageError` where the file is unusable to begin with."""
        self.path = Path(path)
        self._signature: _Signature | None
        self._signature, text = _read(self.path)
        self._keys = parse_keys(text, str(self.path))
        self._warn()

    def current(self) -> Keys:
        """Return the keys, read again if the file is another one than last time."""
        try:
            status = os.stat(self.path)
        except OSError as error:
            if self._signature is not None:
                _LOG.error("keys stay as they were: %s: %s", self.path, error.strerror)
            self._signature = None
            return self._keys
        if _signature(status) != self._signature:
            self._signature = _signature(status)  # told once, should it be unreadable
            self._reload()
        return self._keys

    def _reload(self) -> None:
        try:
            self._signature, text = _read(self.path)
            self._keys = parse_keys(text, str(self.path))
        except ModelpackError as error:
            _LOG.error("keys stay as they were: %s", error)
            return
        _LOG.warning("read %s again: keys in it: %d", self.path, len(self._keys.keys))
        self._warn()

    def _warn(self) -> None:
        if not self._keys.keys:
            _LOG.warning("%s holds no key: everybody is refused", self.path)
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
    """Make a key called `name`, add its hash to the file at `path`, and return it.

    It cannot be read back later. The file is replaced as a whole, with mode 0600, and made if it is
    not there; comments stay. Raises `UsageError` for a bad name, `ConflictError` for a taken one,
    `FormatError` where the file does not parse.
    """
    if not KEY_NAME.fullmatch(name):
        raise UsageError(
            f"{name!r} is no name for a key",
            hint="1 to 64 letters, digits and . _ @ -, beginning with a letter or digit",
        )
    path = Path(os.path.realpath(path))
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    with FileLock(path.with_name(f".{path.name}.lock")).held(remove=True):
        text = _read(path)[1] if path.exists() else ""
        if any(key.name == name for key in parse_keys(text, str(path)).keys):
            raise ConflictError(f"{path} has a key {name!r} already", hint="choose another name")
        secret = PREFIX + secrets.token_urlsafe(32)
        text = f"{text.rstrip()}\n\n{_table(name, secret, limits, models, gateway)}".lstrip()
        parse_keys(text, str(path))  # what we write, we can read
        write_atomically(path, text.encode(), by_way_of=path.parent, mode=0o600)
    return secret


def _table(name: str, secret: str, limits: Limits, models: tuple[str, ...], gateway: bool) -> str:
    lines = [f"[keys.{_quoted(name)}]", f'sha256 = "{hash_of(secret).hex()}"']
    for field in ("requests_per_minute", "tokens_per_minute", "concurrency"):
        if (value := getattr(limits, field)) is not None:
            lines.append(f"{field} = {value}")
    if models:
        lines.append(f"models = [{', '.join(map(_quoted, models))}]")
    if gateway:
        lines.append("gateway = true")
    return "\n".join(lines) + "\n"


def _quoted(text: str) -> str:
    """Return a TOML basic string; control characters have no place in names."""
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
            hint="modelpack gateway key NAME --keys FILE makes a key",
        ) from error
    if len(content) > _MAX_BYTES:
        raise FormatError(f"is more than the limit of {_MAX_BYTES} bytes", path=str(path))
    try:
        return signature, content.decode()
    except UnicodeDecodeError as error:
        raise FormatError("is not UTF-8", path=str(path), offset=error.start) from error


def _signature(status: os.stat_result) -> _Signature:
    return (
        status.st_ino,
        status.st_size,
        status.st_mtime_ns,
        status.st_ctime_ns,
        status.st_mode,
    )
