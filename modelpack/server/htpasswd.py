"""Users and passwords in a file that Apache's `htpasswd -B` writes: `name:$2y$...`, by bcrypt."""

from __future__ import annotations

import hashlib
import hmac
import os
import re
import threading
from pathlib import Path
from typing import Final

import bcrypt

from modelpack.errors import UsageError

_HASH = re.compile(r"\$2[aby]\$(0[4-9]|1[0-7])\$[./A-Za-z0-9]{53}\Z")
_MAX_BYTES: Final = 1024 * 1024
#: bcrypt looks at no more bytes of a password than these.
_MAX_PASSWORD: Final = 72
_MAX_REMEMBERED: Final = 1024


class PasswordFile:
    """The users of a registry; the file is read again when it changes.

    bcrypt is slow on purpose, and Basic sends the password with every request: a pair that was
    right is remembered, as a keyed digest that dies with the process.
    """

    def __init__(self, path: Path) -> None:
        """Raises `UsageError` for a file that cannot be used; it never shows a line of it."""
        self._path = path
        self._lock = threading.Lock()
        self._key = os.urandom(32)
        self._right: dict[bytes, None] = {}
        self._stamp = _stamp(path)
        self._users = _parse(path)
        # Compared with for unknown users, so that the time tells nothing about who exists.
        self._nobody = bcrypt.hashpw(os.urandom(16).hex().encode(), bcrypt.gensalt(_cost(self)))

    def __repr__(self) -> str:
        return f"PasswordFile({str(self._path)!r})"

    def remembers(self, username: str, password: str) -> bool:
        """Return whether this pair was right before and still is, at once; False says nothing."""
        expected = self._current().get(username)
        digest = self._digest(username, password.encode(), expected or b"")
        with self._lock:
            return digest in self._right

    def check(self, username: str, password: str) -> bool:
        """Return whether this is a user with that password; it may take a tenth of a second."""
        users = self._current()
        encoded = password.encode()
        if len(encoded) > _MAX_PASSWORD or "\0" in username + password:
            return False
        expected = users.get(username)
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
        """Return the users as they are now; a file that has become unusable changes nothing."""
        try:
            stamp = _stamp(self._path)
            with self._lock:
                if stamp != self._stamp:
                    self._users, self._stamp = _parse(self._path), stamp
        except UsageError:
            pass
        return self._users


def _cost(file: PasswordFile) -> int:
    """Return the cost of the file's hashes, so that a made-up one takes as long."""
    return max((int(value[4:6]) for value in file._users.values()), default=10)


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
                hint="make it with `htpasswd -B`: other hashes are too quick to guess",
            )
        users[name] = value.encode()
    if not users:
        raise UsageError(f"{path}: has no users")
    return users
