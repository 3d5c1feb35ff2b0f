"""The files under `blobs/` of a store: find, read, publish and delete them."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

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
from modelpack.store.filesystem import (
    draft,
    flush_directory,
    map_os_errors,
    open_own,
    write_durably,
)
from modelpack.store.tree import Tree
from modelpack.store.verified_marks import VerifiedMarks

#: Permission bits of a blob's file.
BLOB_MODE = 0o444


@dataclass(frozen=True, slots=True)
class FileBlob:
    """A blob in a store, as a source; opening it raises `NotFoundError` if it is missing."""

    blobs: Blobs
    digest: Digest

    def open(self, offset: int = 0) -> AbstractContextManager[BlobReader]:
        """Return the open file at `offset`; raises `NotFoundError`."""
        path = self.blobs.path(self.digest)
        with map_os_errors("read", path):
            stream = io.FileIO(path)
            stream.seek(offset)
        return stream


class Blobs:
    """The blobs of one store; its `marks` tell which of them have to be verified again."""

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
            return path if self._marks.confirms(digest, path) else None

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
        path = self.find(descriptor.digest)
        return path is not None and path.stat().st_size == descriptor.size

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

    Raises `IntegrityError` if it has another digest, or more than `limit` bytes (without reading).
    """
    with (
        map_os_errors("read", path),
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
