"""Files on their way into the store: everything is written here, and verified, before it shows."""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from modelpack.descriptor import Descriptor
from modelpack.digest import Digest
from modelpack.errors import SizeMismatchError
from modelpack.stores.blobs import BLOB_MODE
from modelpack.stores.copying import Hashing, read_and_hash
from modelpack.stores.durability import boot_id, write_all
from modelpack.stores.locks import FileLock, try_lock
from modelpack.stores.os_errors import translating
from modelpack.stores.tree import Tree, label
from modelpack.stores.write_behind import WriteBehind

_IMPORT_PREFIX, _IMPORT_SUFFIX = "import-", ".tmp"


class Partial:
    """A download: `ingest/<alg>-<hex>.part`, and beside it a journal that says of what.

    The content that is there when it is opened is hashed again, so a part that somebody or a crash
    spoiled shows at the end at the latest. Only the holder of its lock may open it.
    """

    def __init__(self, tree: Tree, descriptor: Descriptor) -> None:
        self.wanted = descriptor
        self.path = tree.ingest / f"{label(descriptor.digest)}.part"
        self._journal = self.path.with_suffix(".json")
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        with translating("open", self.path):
            try:
                self.file = os.open(self.path, flags, 0o644)
            except PermissionError:  # killed after `seal`, it is read-only
                self.path.chmod(0o644)
                self.file = os.open(self.path, flags)
        self._hasher = descriptor.digest.hasher()
        self._behind = WriteBehind(self.file, 0)
        self.length = 0

    @staticmethod
    def lock(tree: Tree, digest: Digest) -> FileLock:
        """Return the lock that makes two processes download one blob once."""
        return FileLock(tree.ingest / f"{label(digest)}.lock")

    def resume(self, seen: Callable[[int], None]) -> None:
        """Take up what is there; `seen` is called with the bytes hashed so far."""
        with translating("read", self.path):
            if os.fstat(self.file).st_size > self.wanted.size:
                os.ftruncate(self.file, 0)
            os.lseek(self.file, 0, os.SEEK_SET)
            self.length = read_and_hash(self.file, self._hasher, seen)
        self._behind = WriteBehind(self.file, self.length)

    def journal(self) -> None:
        """Say what this is, for whoever finds it; a full disk is no reason to stop here."""
        text = {
            "digest": str(self.wanted.digest),
            "size": self.wanted.size,
            "mediaType": self.wanted.media_type,
            "pid": os.getpid(),
            "boot": boot_id(),
        }
        with suppress(OSError):
            self._journal.write_text(json.dumps(text))

    def hashing(self) -> Hashing:
        """Return what hashes the bytes that are `write`n: every one has to go through both."""
        return Hashing(self._hasher, self.wanted.size - self.length)

    def write(self, view: memoryview) -> None:
        """Write more bytes; raises `SizeMismatchError` if these are too many."""
        if self.length + len(view) > self.wanted.size:
            raise self._wrong_size("more")
        with translating("write", self.path):
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
        with translating("truncate", self.path):
            os.ftruncate(self.file, 0)
            os.lseek(self.file, 0, os.SEEK_SET)
        self._hasher = self.wanted.digest.hasher()
        self.length = 0
        self._behind = WriteBehind(self.file, 0)

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
            self._journal.unlink(missing_ok=True)

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
