"""One block as a file: a header that says whose it is, and bytes that are checked when read.

    magic 8 | identity 16 | hash 16 | length of the content, u64 little-endian | SHA-256 | content

The checksum covers everything but itself. A file appears under its name when it is complete. It is
not synced: what a power failure leaves of it fails its check, and is computed again.
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

MAGIC = b"MPKVBLK1"
_HEAD = struct.Struct("<8s16s16sQ")
_CHECKSUM_SIZE = 32
HEADER_SIZE = _HEAD.size + _CHECKSUM_SIZE

_numbers = itertools.count()


class BadBlockFileError(EngineError):
    """A file does not hold the block that its name says."""


def write_block(path: Path, identity: bytes, hash_: bytes, content: bytes) -> None:
    """Write a file, readable by its owner only, all at once; raises `OSError`."""
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


def read_block(path: Path, identity: bytes, hash_: bytes, length: int) -> bytes:
    """Return the content of a file, which has to be `length` bytes of this identity and hash.

    Raises `BadBlockFileError` if it is anything else, and `OSError`.
    """
    # A pipe would keep us waiting for a writer.
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    file = os.open(path, flags)
    try:
        found = os.fstat(file)
        if not stat.S_ISREG(found.st_mode):
            raise BadBlockFileError("it is not a file")
        if found.st_size != HEADER_SIZE + length:
            raise BadBlockFileError(f"{found.st_size} bytes, expected {HEADER_SIZE + length}")
        with open(file, "rb", 0, closefd=False) as stream:
            data = stream.read()
    finally:
        os.close(file)
    expected = _HEAD.pack(MAGIC, identity, hash_, length)
    if data[: _HEAD.size] != expected:
        raise BadBlockFileError("its header is another block's")
    content = data[HEADER_SIZE:]
    if len(content) != length or data[_HEAD.size : HEADER_SIZE] != _checksum(expected, content):
        raise BadBlockFileError("its bytes and its checksum differ")
    return content


def _checksum(head: bytes, content: bytes) -> bytes:
    checksum = hashlib.sha256(head)
    checksum.update(content)
    return checksum.digest()


_log = logging.getLogger(__name__)

_IDENTITY = re.compile(r"[0-9a-f]{32}")
_BLOCK = re.compile(r"([0-9a-f]{32})\.kv")
_TEMPORARY = re.compile(r"\.[0-9a-f]{32}\.\d+\.\d+\.tmp")

#: Of a full directory, this share stays: making room looks at every file, so it makes some more.
_KEPT_SHARE = 0.95
#: Seconds after which a file that was not completed is a crashed server's.
_ABANDONED_AFTER = 3600.0
#: Seconds without writing after a write that failed: the disk is full, or gone.
_PAUSE = 30.0


class BlockDirectory:
    """The blocks of one identity, each of `length` bytes; all identities take `limit` together.

    One thread reads and writes; others may ask what it `contains`. Raises `EngineError` if the
    directory cannot be made, or is not this user's alone.
    """

    def __init__(self, root: Path, identity: bytes, *, length: int, limit: int) -> None:
        self.root = root
        self.limit = limit
        self.num_bytes = 0
        self.num_dropped = 0
        self._identity, self._length = identity, length
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
                f"KV blocks cannot be kept in {root}: {error.strerror}",
                hint="choose a directory that can be written (--kv-offload-dir)",
            ) from error
        if not own:
            raise EngineError(
                f"{self._path} is not a directory of this user's alone (mode 0700)",
                hint="KV blocks tell what was asked: choose another directory",
            )
        self.refresh()

    def __contains__(self, hash_: bytes) -> bool:
        return hash_ in self._known

    def refresh(self) -> None:
        """Look at the files there are: other servers come and go."""
        known, total = set[bytes](), 0
        for entry, size, _ in self._files():
            total += size
            found = _BLOCK.fullmatch(entry.name)
            if found and Path(entry.path).parent == self._path:
                known.add(bytes.fromhex(found[1]))
        self._known, self.num_bytes = known, total

    def read(self, hash_: bytes) -> bytes | None:
        """Return a block; None if it is gone, or was not whole, and is gone now."""
        path = self._file(hash_)
        try:
            content = read_block(path, self._identity, hash_, self._length)
            os.utime(path)
        except FileNotFoundError:
            self._known.discard(hash_)
            return None
        except (OSError, BadBlockFileError) as error:
            self.num_dropped += 1
            _log.warning("the KV block %s is dropped: %s", path, error)
            self.discard(hash_)
            return None
        return content

    def write(self, hash_: bytes, content: bytes) -> bool:
        """Keep a block, and make room for it; False if the disk does not take it."""
        assert len(content) == self._length
        size = HEADER_SIZE + len(content)
        if hash_ in self._known or size > self.limit or time.monotonic() < self._paused_until:
            return False
        try:
            if self.num_bytes + size > self.limit:
                self._make_room(size)
            write_block(self._file(hash_), self._identity, hash_, content)
        except OSError as error:
            level = logging.DEBUG if self._failing else logging.WARNING
            _log.log(level, "KV blocks are not written to %s for now: %s", self._path, error)
            self._failing, self._paused_until = True, time.monotonic() + _PAUSE
            return False
        self._failing = False
        self._known.add(hash_)
        self.num_bytes += size
        return True

    def forget(self, hash_: bytes) -> None:
        """Say no more that a block is there; its file stays until it is discarded."""
        self._known.discard(hash_)

    def discard(self, hash_: bytes) -> None:
        """Remove a block, if it is there."""
        self._known.discard(hash_)
        with contextlib.suppress(OSError):
            self._file(hash_).unlink()
            self.num_bytes = max(self.num_bytes - HEADER_SIZE - self._length, 0)

    def _make_room(self, size: int) -> None:
        """Remove the least recently used files of all models until `size` bytes more fit."""
        files = sorted(self._files(), key=lambda file: file[2])
        total = sum(file[1] for file in files)
        target = min(int(self.limit * _KEPT_SHARE), self.limit - size)
        for entry, length, _ in files:
            if total <= target:
                break
            with contextlib.suppress(FileNotFoundError):  # another server was faster
                Path(entry.path).unlink()
            total -= length
        self.refresh()

    def _files(self) -> Iterator[tuple[os.DirEntry[str], int, int]]:
        """Yield each model's files with bytes and time of last use; nothing else is ours."""
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
