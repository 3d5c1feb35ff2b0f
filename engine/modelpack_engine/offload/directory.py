"""BlockDirectory: offloaded KV blocks and recurrent states on disk, one file for each.

    magic 8 | identity 16 | hash 16 | length of the content, u64 little-endian | SHA-256 | content

The checksum covers everything but itself. A file is written under a temporary name and renamed when
it is complete. It is not synced: a file damaged by a power failure fails its checksum and is
dropped.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import logging
import os
import re
import stat
import struct
import time
from collections.abc import Iterator
from pathlib import Path

from modelpack_engine.errors import EngineError

_log = logging.getLogger(__name__)

MAGIC = b"MPKVBLK1"
_HEAD = struct.Struct("<8s16s16sQ")
_CHECKSUM_SIZE = 32
HEADER_SIZE = _HEAD.size + _CHECKSUM_SIZE
_IDENTITY = re.compile(r"[0-9a-f]{32}")
_BLOCK = re.compile(r"([0-9a-f]{32})\.kv")
_TEMPORARY = re.compile(r"\.[0-9a-f]{32}\.\d+\.\d+\.tmp")

#: The share of a full directory that stays when room is made, since that scans every file.
_KEPT_SHARE = 0.95

#: Seconds after which a temporary file is taken for one of a crashed server.
_ABANDONED_AFTER = 3600.0

#: Seconds without writes after a failed write.
_PAUSE = 30.0
_numbers = itertools.count()


class BadBlockFileError(EngineError):
    """A file does not hold the block that it is named after."""


def write_block(path: Path, identity: bytes, hash_: bytes, content: bytes) -> None:
    """Write a file atomically, readable by its owner only; raises `OSError`."""
    head = _HEAD.pack(MAGIC, identity, hash_, len(content))
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.{next(_numbers)}.tmp")
    flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        with open(os.open(temporary, flags, 0o600), "wb", buffering=0) as file:
            for part in (head, _checksum(head, content), content):
                rest = memoryview(part)
                while rest:
                    rest = rest[file.write(rest) :]
        temporary.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def read_block(path: Path, identity: bytes, hash_: bytes, *lengths: int) -> bytes:
    """Return the content of a file, if it has this identity and hash, and one of the `lengths`.

    Raises `BadBlockFileError` if the file is anything else, and `OSError`.
    """
    # O_NONBLOCK: opening a named pipe would wait for a writer.
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    file = os.open(path, flags)
    try:
        found = os.fstat(file)
        if not stat.S_ISREG(found.st_mode):
            raise BadBlockFileError("not a regular file")
        length = found.st_size - HEADER_SIZE
        if length not in lengths:
            expected_sizes = " or ".join(str(HEADER_SIZE + length) for length in lengths)
            raise BadBlockFileError(f"{found.st_size} bytes, expected {expected_sizes}")
        with open(file, "rb", 0, closefd=False) as stream:
            data = stream.read()
    finally:
        os.close(file)
    expected = _HEAD.pack(MAGIC, identity, hash_, length)
    if data[: _HEAD.size] != expected:
        raise BadBlockFileError("the header is that of another block")
    content = data[HEADER_SIZE:]
    if len(content) != length or data[_HEAD.size : HEADER_SIZE] != _checksum(expected, content):
        raise BadBlockFileError("the checksum does not match")
    return content


def _checksum(head: bytes, content: bytes) -> bytes:
    checksum = hashlib.sha256(head)
    checksum.update(content)
    return checksum.digest()


class BlockDirectory:
    """The contents of one identity, of `lengths` bytes; all identities share `limit` bytes.

    Each group of layers has one length for its blocks, and snapshots of recurrent state have one.

    One thread reads and writes; others may use `in`. Raises `EngineError` if the directory cannot
    be created or is not private to this user.
    """

    def __init__(
        self, root: Path, identity: bytes, *, lengths: tuple[int, ...], limit: int
    ) -> None:
        self.root, self.limit = root, limit
        self.num_bytes = self.num_dropped = 0
        self._identity, self._lengths = identity, lengths
        self._path = root / identity.hex()
        self._known: set[bytes] = set()
        self._failing = False
        self._paused_until = 0.0
        try:
            root.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._path.mkdir(mode=0o700, exist_ok=True)
            own = _is_private(self._path)
        except OSError as error:
            raise EngineError(
                f"cannot keep KV blocks in {root}: {error.strerror}",
                hint="choose a writable directory (--kv-offload-dir)",
            ) from error
        if not own:
            raise EngineError(
                f"{self._path} is not a directory that only this user can access (mode 0700)",
                hint="choose another directory: KV blocks reveal the prompts",
            )
        self.refresh()

    def __contains__(self, hash_: bytes) -> bool:
        return hash_ in self._known

    def refresh(self) -> None:
        """Scan the files, which other servers write and remove as well."""
        known, total = set[bytes](), 0
        for entry, size, _ in self._files():
            total += size
            found = _BLOCK.fullmatch(entry.name)
            if found and Path(entry.path).parent == self._path:
                known.add(bytes.fromhex(found[1]))
        self._known, self.num_bytes = known, total

    def read(self, hash_: bytes) -> bytes | None:
        """Return a block; None if it is missing, or damaged and now removed."""
        path = self._file(hash_)
        try:
            content = read_block(path, self._identity, hash_, *self._lengths)
            os.utime(path)
        except FileNotFoundError:
            self._known.discard(hash_)
            return None
        except (OSError, BadBlockFileError) as error:
            self.num_dropped += 1
            _log.warning("dropped the KV block %s: %s", path, error)
            self.discard(hash_)
            return None
        return content

    def write(self, hash_: bytes, content: bytes) -> bool:
        """Write a block, making room for it; return False if that fails."""
        assert len(content) in self._lengths
        size = HEADER_SIZE + len(content)
        if hash_ in self._known or size > self.limit or time.monotonic() < self._paused_until:
            return False
        try:
            if self.num_bytes + size > self.limit:
                self._make_room(size)
            write_block(self._file(hash_), self._identity, hash_, content)
        except OSError as error:
            level = logging.DEBUG if self._failing else logging.WARNING
            _log.log(level, "writing KV blocks to %s is paused: %s", self._path, error)
            self._failing, self._paused_until = True, time.monotonic() + _PAUSE
            return False
        self._failing = False
        self._known.add(hash_)
        self.num_bytes += size
        return True

    def forget(self, hash_: bytes) -> None:
        """Report a block as missing from now on; its file stays until `discard`."""
        self._known.discard(hash_)

    def discard(self, hash_: bytes) -> None:
        """Remove a block, if it is present."""
        self._known.discard(hash_)
        with contextlib.suppress(OSError):
            path = self._file(hash_)
            size = path.lstat().st_size
            path.unlink()
            self.num_bytes = max(self.num_bytes - size, 0)

    def _make_room(self, size: int) -> None:
        """Remove the least recently used files of all models until `size` more bytes fit."""
        files = sorted(self._files(), key=lambda file: file[2])
        total = sum(file[1] for file in files)
        target = min(int(self.limit * _KEPT_SHARE), self.limit - size)
        for entry, length, _ in files:
            if total <= target:
                break
            with contextlib.suppress(FileNotFoundError):  # another server has removed it
                Path(entry.path).unlink()
            total -= length
        self.refresh()

    def _files(self) -> Iterator[tuple[os.DirEntry[str], int, int]]:
        """Yield the files of all models with their size and time of last use; skip other files."""
        for path in [p for p in _entries(self.root) if _IDENTITY.fullmatch(p.name)]:
            for entry in _entries(path.path):
                temporary = _TEMPORARY.fullmatch(entry.name)
                if not temporary and not _BLOCK.fullmatch(entry.name):
                    continue
                try:
                    found = entry.stat(follow_symlinks=False)
                except FileNotFoundError:
                    continue
                if not stat.S_ISREG(found.st_mode):
                    continue
                if temporary and time.time() - found.st_mtime > _ABANDONED_AFTER:
                    with contextlib.suppress(OSError):
                        Path(entry.path).unlink()
                    continue
                yield entry, found.st_size, found.st_mtime_ns

    def _file(self, hash_: bytes) -> Path:
        return self._path / f"{hash_.hex()}.kv"


def _entries(path: Path | str) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(path) as entries:
            return list(entries)
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return []


def _is_private(path: Path) -> bool:
    found = path.lstat()
    private = stat.S_ISDIR(found.st_mode) and not found.st_mode & 0o077
    return private and found.st_uid == os.geteuid()
