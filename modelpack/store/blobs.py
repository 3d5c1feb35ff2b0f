"""The files under `blobs/` of a store: find, read, publish and delete them, and their marks.

A blob is verified before it gets its name, and its file is trusted from then on. There are two
exceptions, each recorded in a small file, a mark:

- Imported blobs are not flushed to the disk: that would take longer than hashing and copying them.
  The mark `ingest/unflushed/<alg>-<hex>` has the id of the boot in which the blob was written.
  After a reboot, the blob is hashed before its first use.
- Hard-linked blobs can be changed through the other name of the file. The mark
  `ingest/linked/<alg>-<hex>` has the size and modification time at which the blob was verified;
  the blob is hashed again when they differ.

A damaged blob is moved to `quarantine/` and counts as missing.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from modelpack.artifacts.descriptor import Descriptor
from modelpack.artifacts.digest import Digest
from modelpack.artifacts.json_document import MAX_DOCUMENT_BYTES
from modelpack.errors import (
    InvalidDigestError,
    NotFoundError,
    SizeMismatchError,
    UnsafePathError,
)
from modelpack.storage import BlobReader
from modelpack.store.file_copy import hash_file
from modelpack.store.filesystem import (
    boot_id,
    draft,
    flush_directory,
    flush_file,
    map_os_errors,
    open_own,
    read_own,
    write_durably,
    write_own,
)
from modelpack.store.tree import Tree, label, labelled_digest

if TYPE_CHECKING:
    from logging import Logger

_MAX_MARK_BYTES = 4096
# Bytes that one garbage collection or check flushes.
_FLUSH_LIMIT = 16 * 1024**3


class VerifiedMarks:
    """The marks of one store."""

    def __init__(self, tree: Tree) -> None:
        self._tree = tree
        self._unflushed, self._linked = str(tree.unflushed), str(tree.linked)
        # The state in which this process verified blobs whose marks it cannot write.
        self._vouched: dict[Digest, str] = {}

    def mark_unflushed(self, digest: Digest) -> None:
        """Mark a blob, before it gets its name, as one that a power cut may damage.

        The mark is not flushed either: journalling file systems keep the order of names, and an
        empty mark counts as one of another boot.
        """
        self._mark(self._tree.unflushed, digest, boot_id())

    def mark_linked(self, digest: Digest, found: os.stat_result) -> None:
        """Mark a blob as a hard link that was verified when its status was `found`."""
        self._mark(self._tree.linked, digest, _stamp(found))

    def forget(self, digest: Digest) -> None:
        """Remove the marks of a blob that was deleted, or flushed and not linked."""
        for folder in (self._tree.unflushed, self._tree.linked):
            (folder / label(digest)).unlink(missing_ok=True)

    def is_linked(self, digest: Digest) -> bool:
        """Return whether the blob is marked as a hard link."""
        return (self._tree.linked / label(digest)).exists()

    def last_used(self, digest: Digest, path: Path) -> float:
        """Return when the blob was last stored or used, in seconds since the epoch."""
        return self._clock(digest, path).stat().st_mtime

    def touch(self, digest: Digest, path: Path) -> None:
        """Set `last_used` to now; for a hard link, change only the times of its mark."""
        with suppress(OSError):
            os.utime(self._clock(digest, path))

    def confirms(self, digest: Digest, path: Path) -> bool:
        """Return whether the blob at `path` is usable; hash it if a mark is out of date.

        A damaged blob is moved to quarantine.
        """
        doubts = self._doubts(digest, path)
        if not doubts or self._vouched.get(digest) == _stamp(path.stat()):
            return True
        _log().info("verifying blob %s before its first use", digest)
        found = path.stat()  # before the bytes are read: they may change while they are
        if hash_file(path, digest.algorithm) != digest:
            self.put_in_quarantine(digest, path, found)
            return path.is_file() and self.confirms(digest, path)
        try:
            for mark in doubts:
                if mark.parent == self._tree.linked:
                    write_own(mark, _stamp(found).encode())
                else:
                    mark.unlink(missing_ok=True)
        except OSError:  # a read-only store can still be read
            self._vouched[digest] = _stamp(found)
        return True

    def put_in_quarantine(self, digest: Digest, path: Path, found: os.stat_result) -> None:
        """Move a damaged blob, the file whose status was `found`, to quarantine."""
        self._tree.check_inside()
        self._tree.quarantine.mkdir(exist_ok=True)
        # Hashing takes long: another process may have moved the file, and stored the blob again.
        with suppress(FileNotFoundError):
            if os.path.samestat(path.stat(), found):
                _log().warning("blob %s is damaged: moved to %s", digest, self._tree.quarantine)
                os.replace(path, self._tree.quarantine / label(digest))
                self.forget(digest)

    def was_damaged(self, digest: Digest) -> bool:
        """Return whether a damaged copy of the blob is in quarantine."""
        return (self._tree.quarantine / label(digest)).exists()

    def drop_quarantined(self, digest: Digest) -> None:
        """Delete the quarantined copy of a blob."""
        (self._tree.quarantine / label(digest)).unlink(missing_ok=True)

    def settle(self, blobs: Iterable[tuple[Digest, Path]], *, limit: int = _FLUSH_LIMIT) -> None:
        """Flush blobs that this boot wrote, at most `limit` bytes, and remove their marks."""
        for digest, path in blobs:
            mark = self._tree.unflushed / label(digest)
            with suppress(OSError):
                if _read(mark) != boot_id():
                    continue
                found = path.stat()
                limit -= found.st_size
                if limit < 0:
                    return
                flush_file(path)
                if _state(path.stat()) == _state(found):  # not removed and imported again
                    mark.unlink()

    def stale_marks(self) -> list[Path]:
        """Return the marks of blobs that no longer exist."""
        return [
            mark
            for folder in (self._tree.unflushed, self._tree.linked)
            if folder.is_dir()
            for mark in folder.iterdir()
            if (digest := labelled_digest(mark.name)) is None
            or not self._tree.blob(digest).exists()
        ]

    def _mark(self, folder: Path, digest: Digest, text: str) -> None:
        mark = folder / label(digest)
        with map_os_errors("write", mark):
            folder.mkdir(parents=True, exist_ok=True)
            write_own(mark, text.encode())

    def _clock(self, digest: Digest, path: Path) -> Path:
        mark = self._tree.linked / label(digest)
        return mark if mark.is_file() and not mark.is_symlink() else path

    def _doubts(self, digest: Digest, path: Path) -> list[Path]:
        """Return the marks that are out of date; this must be fast, as most blobs have none."""
        doubts = []
        for folder in (self._unflushed, self._linked):
            mark = f"{folder}/{label(digest)}"
            if os.path.exists(mark):
                with suppress(FileNotFoundError):  # removed by another process
                    current = boot_id() if folder is self._unflushed else _stamp(path.stat())
                    if _read(mark) != current:
                        doubts.append(Path(mark))
        return doubts


def _read(mark: Path | str) -> str:
    """Return the text of a mark; "" if it is unreadable, which counts as out of date."""
    try:
        return read_own(mark, _MAX_MARK_BYTES).decode(errors="replace")
    except FileNotFoundError:
        raise
    except OSError:
        return ""


def _stamp(found: os.stat_result) -> str:
    return f"{found.st_size} {found.st_mtime_ns}"


def _state(found: os.stat_result) -> tuple[int, ...]:
    """Return what differs between a file and another one, which may have its inode."""
    return found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def _log() -> Logger:
    import logging  # imported here to keep the start of commands fast

    return logging.getLogger(__name__)


#: Permission bits of a blob's file.
BLOB_MODE = 0o444


@contextmanager
def not_removed(digest: Digest) -> Iterator[None]:
    """Turn the error of a missing file into a `NotFoundError`: another process has removed it."""
    try:
        yield
    except FileNotFoundError:
        raise NotFoundError(f"blob {digest} was removed before it was read") from None


@dataclass(frozen=True, slots=True)
class StoredBlob:
    """A blob in a store, as a source; `find` returns its file or raises `NotFoundError`."""

    find: Callable[[Digest], Path]
    digest: Digest

    def open(self, offset: int = 0) -> AbstractContextManager[BlobReader]:
        """Return the open file at `offset`; raises `NotFoundError`."""
        path = self.find(self.digest)
        with map_os_errors("read", path), not_removed(self.digest):
            stream = io.FileIO(path)
            stream.seek(offset)
        return stream


class Blobs:
    """The blobs of one store; `marks` records which of them must be verified again."""

    def __init__(self, tree: Tree, marks: VerifiedMarks) -> None:
        self._tree = tree
        self._marks = marks

    def find(self, digest: Digest) -> Path | None:
        """Return the path of a usable blob, or None; verify it first if a mark asks for it."""
        path = self._tree.blob(digest)
        with map_os_errors("read", path):
            if not path.is_file():
                return None
            if path.is_symlink() and not self._tree.holds(path):
                raise UnsafePathError(
                    f"{path} points outside the store, to {os.path.realpath(path)}",
                    got=os.path.realpath(path),
                )
            try:
                return path if self._marks.confirms(digest, path) else None
            except FileNotFoundError:  # another process has removed it
                return None

    def path(self, digest: Digest) -> Path:
        """Return the path of a usable blob; raises `NotFoundError`."""
        path = self.find(digest)
        if path is None:
            damaged = self.was_damaged(digest)
            raise NotFoundError(
                f"blob {digest} is not in the store {self._tree.root}"
                + (": its file was damaged and moved to quarantine" if damaged else ""),
                hint="pull or package the model again" if damaged else None,
            )
        return path

    def was_damaged(self, digest: Digest) -> bool:
        """Return whether a damaged copy of the blob is in quarantine."""
        return self._marks.was_damaged(digest)

    def holds(self, descriptor: Descriptor) -> bool:
        """Return whether there is a usable blob with the size of its descriptor."""
        return (
            self.find(descriptor.digest) is not None
            and self.size(descriptor.digest) == descriptor.size
        )

    def size(self, digest: Digest) -> int:
        """Return the size of a blob's file, usable or not; 0 if there is none."""
        try:
            return self._tree.blob(digest).stat().st_size
        except FileNotFoundError:
            return 0

    def read(self, digest: Digest, what: str, *, limit: int = MAX_DOCUMENT_BYTES) -> bytes:
        """Return the verified content of a small blob; `what` names it in errors."""
        return read_verified(self.path(digest), digest, what, limit=limit)

    def digests(self) -> Iterator[Digest]:
        """Yield the digest of every file that is named like a blob."""
        for path in self._files():
            if (digest := _named(path)) is not None:
                yield digest

    def strays(self) -> list[Path]:
        """Return the other files under `blobs/`; some tools fail on them."""
        return [path for path in self._files() if _named(path) is None]

    def publish(self, staged: Path, digest: Digest, *, flushed: bool) -> None:
        """Rename a verified file to its blob's path. The caller holds the store's lock.

        Unless its bytes are `flushed` to the disk, mark the blob for verification after a crash.
        """
        final = self._tree.blob(digest)
        with map_os_errors("publish", final):
            final.parent.mkdir(parents=True, exist_ok=True)
            if not flushed:
                self._marks.mark_unflushed(digest)
            os.replace(staged, final)
            if flushed:
                flush_directory(final.parent)
                self._marks.forget(digest)
            self._marks.drop_quarantined(digest)

    def write(self, digest: Digest, content: bytes) -> None:
        """Write a small blob durably. The caller holds the store's lock."""
        staged = draft(self._tree.ingest, digest.encoded)
        with map_os_errors("write", staged):
            try:
                write_durably(staged, content, mode=BLOB_MODE)
                self.publish(staged, digest, flushed=True)
            finally:
                staged.unlink(missing_ok=True)

    def delete(self, digest: Digest) -> None:
        """Delete a blob and its marks. The caller holds the store's lock."""
        path = self._tree.blob(digest)
        with map_os_errors("delete", path):
            path.unlink(missing_ok=True)
            self._marks.forget(digest)

    def _files(self) -> Iterator[Path]:
        with map_os_errors("list", self._tree.blobs):
            if not self._tree.blobs.is_dir():
                return
            for folder in sorted(self._tree.blobs.iterdir()):
                if folder.is_dir():
                    yield from sorted(folder.iterdir())
                else:
                    yield folder


def read_verified(
    path: Path, digest: Digest, what: str, *, limit: int = MAX_DOCUMENT_BYTES
) -> bytes:
    """Return the verified content of a small blob's file; `what` names it in errors.

    Raises `IntegrityError` if it has another digest, or more than `limit` bytes (without reading),
    and `NotFoundError` if there is no such file.
    """
    with (
        map_os_errors("read", path),
        not_removed(digest),
        open(open_own(path, follow=True), "rb", buffering=0) as stream,
    ):
        size = os.fstat(stream.fileno()).st_size
        if size > limit:
            raise SizeMismatchError(
                f"{what}: {path} has {size} bytes, more than the limit of {limit}",
                expected=str(limit),
                got=str(size),
            )
        content = stream.read(size + 1) or b""
    digest.check(content, f"{what} ({path})")
    return content


def _named(path: Path) -> Digest | None:
    try:
        return Digest.parse(f"{path.parent.name}:{path.name}")
    except InvalidDigestError:
        return None
