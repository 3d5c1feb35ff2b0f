"""Large files on their way to the disk: writing starts early, and without piling up in memory.

Left alone, the kernel keeps gigabytes of written pages for later. They cost fresh memory, push out
what others have cached, and make the flush at the end long.
"""

from __future__ import annotations

import json
import os
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from modelpack.artifacts.byte_ranges import ByteRanges
from modelpack.artifacts.descriptor import Descriptor
from modelpack.artifacts.digest import Digest
from modelpack.errors import SizeMismatchError
from modelpack.store.blobs import BLOB_MODE
from modelpack.store.file_copy import ALIGNMENT, DirectWriter, Hashing, read_and_hash
from modelpack.store.filesystem import (
    boot_id,
    delete_tree,
    read_own,
    translating,
    write_all,
    write_own,
)
from modelpack.store.locks import FileLock, try_lock
from modelpack.store.tree import Tree, label

_WINDOW: Final = 8 * 1024 * 1024
# A disk that keeps us waiting for longer than this is left to write later.
_BYTES_PER_SECOND: Final = 1e9
_GRACE_SECONDS: Final = 0.1


class WriteBehind:
    """Tells the kernel about a file that is written from `start` on: advice, never an error."""

    def __init__(self, file: int, start: int) -> None:
        self._file = file
        self._told = start
        self._patience = _GRACE_SECONDS
        self._active = hasattr(os, "posix_fadvise")

    def written(self, position: int) -> None:
        """Note that everything before `position` is written."""
        if not self._active or position - self._told < _WINDOW:
            return
        # The kernel starts to write what is dirty in the range; that keeps it cached.
        length = position - self._told
        started = time.monotonic()
        try:
            os.posix_fadvise(self._file, self._told, length, os.POSIX_FADV_DONTNEED)
        except OSError:
            self._active = False
        self._patience += length / _BYTES_PER_SECOND
        self._patience -= time.monotonic() - started
        if self._patience < 0:
            self._active = False
        self._told = position


_MAX_JOURNAL_BYTES = 16 * 1024 * 1024
_IMPORT_PREFIX, _IMPORT_SUFFIX = "import-", ".tmp"


class Partial:
    """A download: `ingest/<alg>-<hex>.part`, and beside it a journal that says of what.

    A part is written from its first byte on, or all over at once: then the file has its full size
    from the beginning, and the journal says which bytes of it are there (`present`). The content
    that is there when it is opened is hashed again, so a part that somebody or a crash spoiled
    shows at the end at the latest. Only the holder of its lock may open it.
    """

    def __init__(self, tree: Tree, descriptor: Descriptor) -> None:
        self.wanted = descriptor
        self.path = tree.partial(descriptor.digest)
        self._journal = self.path.with_suffix(".json")
        self._draft = self.path.with_suffix(".json.tmp")
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        with translating("open", self.path):
            try:
                self.file = os.open(self.path, flags, 0o644)
            except PermissionError:  # killed after `seal`, it is read-only
                self.path.chmod(0o644)
                self.file = os.open(self.path, flags)
        self._hasher = descriptor.digest.hasher()
        self._behind = WriteBehind(self.file, 0)
        self._direct: DirectWriter | None = None
        #: Bytes from the first on that are there, and hashed.
        self.length = 0
        #: What is there of a part that is written all over; None if it is written in order.
        self.scattered: ByteRanges | None = None

    @property
    def present(self) -> int:
        """How many bytes are there."""
        return self.length if self.scattered is None else self.scattered.total

    @staticmethod
    def lock(tree: Tree, digest: Digest) -> FileLock:
        """Return the lock that makes two processes download one blob once."""
        return FileLock(tree.ingest / f"{label(digest)}.lock")

    def resume(self, seen: Callable[[int], None]) -> None:
        """Take up what is there; `seen` is called with the bytes hashed so far."""
        with translating("read", self.path):
            if os.fstat(self.file).st_size > self.wanted.size:
                os.ftruncate(self.file, 0)
            self.scattered = self._read_scattered(os.fstat(self.file).st_size)
            most = None if self.scattered is None else self.scattered.prefix
            os.lseek(self.file, 0, os.SEEK_SET)
            self.length = read_and_hash(self.file, self._hasher, seen, most)
        self._behind = WriteBehind(self.file, self.length)

    def scatter(self) -> ByteRanges:
        """Be written all over from now on; return what is there, to be added to."""
        self._write_cached()
        if self.scattered is None:
            self.scattered = ByteRanges([(0, self.length)])
        self.journal()  # before the file grows: its size says nothing any more
        with translating("write", self.path):
            os.ftruncate(self.file, self.wanted.size)
        return self.scattered

    def gather(self) -> None:
        """Be written in order again; what is there after a gap is dropped."""
        if self.scattered is not None:
            with translating("truncate", self.path):
                os.ftruncate(self.file, self.length)
                os.lseek(self.file, self.length, os.SEEK_SET)
            self.scattered = None
            self.journal()

    def write_at(self, offset: int, view: memoryview) -> None:
        """Write bytes of a part that is written all over."""
        if offset + len(view) > self.wanted.size:
            raise self._wrong_size("more")
        with translating("write", self.path):
            while view:
                count = os.pwrite(self.file, view, offset)
                view, offset = view[count:], offset + count

    def catch_up(self, end: int, buffer: memoryview) -> None:
        """Hash what was written by `write_at` up to `end`, without a gap."""
        with translating("read", self.path):
            while self.length < end:
                count = os.preadv(self.file, [buffer[: end - self.length]], self.length)
                self._hasher.update(buffer[:count])
                self.length += count
        self._behind.written(self.length)

    def journal(self) -> None:
        """Say what this is, for whoever finds it; a full disk is no reason to stop here."""
        text: dict[str, object] = {
            "digest": str(self.wanted.digest),
            "size": self.wanted.size,
            "mediaType": self.wanted.media_type,
            "pid": os.getpid(),
            "boot": boot_id(),
        }
        if self.scattered is not None:
            text["present"] = self.scattered.ranges
        with suppress(OSError):
            write_own(self._draft, json.dumps(text).encode())
            self._draft.replace(self._journal)  # whole, whenever the process is killed

    def hashing(self) -> Hashing:
        """Return what hashes the bytes that are `write`n: every one has to go through both."""
        if self.length % ALIGNMENT == 0:
            self._direct = DirectWriter(self.file, self.wanted.size - self.length)
        return Hashing(self._hasher, self.wanted.size - self.length)

    def write(self, view: memoryview) -> None:
        """Write more bytes; raises `SizeMismatchError` if these are too many."""
        if self.length + len(view) > self.wanted.size:
            raise self._wrong_size("more")
        with translating("write", self.path):
            if self._direct is not None:
                self._direct.write(view)
            else:
                write_all(self.file, view)
        self.length += len(view)
        self._behind.written(self.length)

    def check(self) -> None:
        """Raise `SizeMismatchError` or `DigestMismatchError` unless this is what was wanted."""
        if self.length < self.wanted.size:
            raise self._wrong_size(str(self.length))
        self.wanted.digest.check_equal(Digest.of_hasher(self._hasher), "download")

    def restart(self) -> None:
        """Drop all content."""
        self._write_cached()
        with translating("truncate", self.path):
            os.ftruncate(self.file, 0)
            os.lseek(self.file, 0, os.SEEK_SET)
        self._hasher = self.wanted.digest.hasher()
        self.length = 0
        self._behind = WriteBehind(self.file, 0)
        self.scattered = None
        self.journal()

    def seal(self) -> None:
        """Have the content on the disk, ready to be renamed."""
        with translating("flush", self.path):
            os.fchmod(self.file, BLOB_MODE)
            os.utime(self.file)
            os.fsync(self.file)

    def discard(self) -> None:
        """Delete the part."""
        self.path.unlink(missing_ok=True)

    def close(self) -> None:
        """Close the file; the journal goes with the part."""
        os.close(self.file)
        if not self.path.exists():
            for path in (self._journal, self._draft):
                with suppress(OSError):
                    path.unlink()

    def _write_cached(self) -> None:
        if self._direct is not None:
            self._direct.give_up()
        self._direct = None

    def _read_scattered(self, size: int) -> ByteRanges | None:
        """Return what the journal says of a part that was written all over."""
        try:
            text = json.loads(read_own(self._journal, _MAX_JOURNAL_BYTES))
            if "present" not in text or text["digest"] != str(self.wanted.digest):
                return None
            ranges = [(int(start), int(end)) for start, end in text["present"]]
            return ByteRanges((min(start, size), min(end, size)) for start, end in ranges)
        except (OSError, ValueError, OverflowError, TypeError, KeyError, RecursionError):
            return None

    def _wrong_size(self, got: str) -> SizeMismatchError:
        return SizeMismatchError(
            f"blob {self.wanted.digest} has another size than its descriptor says: "
            f"expected {self.wanted.size} bytes, got {got}",
            expected=str(self.wanted.size),
            got=got,
        )


@dataclass(slots=True)
class StagedImport:
    """A new file `ingest/import-<id>.tmp`; `file` is open for writing."""

    path: Path
    file: int

    def seal(self) -> None:
        """Set the mode of a blob; the bytes are not flushed, see `trust`."""
        os.fchmod(self.file, BLOB_MODE)


@contextmanager
def staged_import(tree: Tree) -> Iterator[StagedImport]:
    """Make a file for an import; it is gone after the block unless it got another name.

    It is locked, so that a collection tells it from what a killed process left behind.
    """
    path = tree.ingest / f"{_IMPORT_PREFIX}{uuid.uuid4().hex}{_IMPORT_SUFFIX}"
    with translating("write to", tree.ingest), tree.lock().held():
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        file = os.open(path, flags, 0o600)
        try_lock(file)
    try:
        yield StagedImport(path, file)
    finally:
        path.unlink(missing_ok=True)
        os.close(file)


def is_staged_import(path: Path) -> bool:
    """Return whether the file is one of `staged_import`."""
    return path.name.startswith(_IMPORT_PREFIX)


#: Seconds after which an upload that received nothing is dropped.
EXPIRY: Final = 24 * 3600


def abandoned_uploads(directory: Path) -> Iterator[Path]:
    """Return what is in `directory` and received nothing for `EXPIRY`: sessions, and parts of one.

    A crash may have left a session half made, or a file.
    """
    for path in sorted(directory.glob("*")):
        with suppress(FileNotFoundError):  # it ends just now
            if idle_seconds(path) > EXPIRY:
                yield path


def idle_seconds(path: Path) -> float:
    """Return how long ago the session at `path` last received bytes; raises `FileNotFoundError`."""
    data = path / "data"
    try:
        found = data.stat()
    except (FileNotFoundError, NotADirectoryError):
        found = path.stat()
    return time.time() - found.st_mtime


def allocated_bytes(path: Path) -> int:
    """Return the bytes on the disk of all files of an upload."""
    files = path.iterdir() if path.is_dir() else [path]
    return sum(file.stat().st_blocks * 512 for file in files)


def remove_upload(path: Path) -> None:
    """Delete the session, or what is left of one."""
    if path.is_dir():
        delete_tree(path)
    else:
        path.unlink(missing_ok=True)
