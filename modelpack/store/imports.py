"""Import files and streams: hash them and copy them into the store in one pass."""

from __future__ import annotations

import os
import stat
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from modelpack.artifacts.descriptor import Descriptor, size_mismatch
from modelpack.artifacts.digest import Digest, new_hasher
from modelpack.errors import (
    NotFoundError,
    PackagingError,
    SourceChangedError,
    StorageFullError,
)
from modelpack.progress import Action, Progress
from modelpack.storage import BlobReader, Outcome, Watch
from modelpack.store.blobs import BLOB_MODE
from modelpack.store.file_copy import (
    Hashing,
    clone,
    copy_and_hash,
    fill_from,
    read_and_hash,
    reserve,
)
from modelpack.store.filesystem import FileLock, check_room, map_os_errors, no_room, try_lock
from modelpack.store.tree import Tree

_PREFIX, _SUFFIX = "import-", ".tmp"


@dataclass(frozen=True, slots=True)
class ImportedFile:
    """An imported file as it was read; `size` in bytes, `mtime_ns` since the epoch."""

    digest: Digest
    size: int
    outcome: Outcome
    device: int
    inode: int
    mtime_ns: int


@dataclass(frozen=True, slots=True)
class StagedBlob:
    """A file or stream that was read and hashed, ready to be published.

    The temporary file `path` has its bytes, unless it is going to be `linked` to `source`.
    """

    source: Path
    digest: Digest
    found: os.stat_result
    path: Path
    linked: bool

    def link(self) -> None:
        """Make `path` a hard link of the source. The caller holds the store's lock.

        Raises `SourceChangedError` if the source was replaced since it was read.
        """
        new = self.path.with_name(f"{self.path.name}.link")
        with map_os_errors("link", self.source):
            os.link(os.path.realpath(self.source), new)
            os.replace(new, self.path)
            if not os.path.samestat(self.found, self.path.stat()):
                raise SourceChangedError(f"{self.source} was replaced while it was being read")


@contextmanager
def stage_file(
    tree: Tree, path: Path, name: str, watch: Watch, *, link: bool, algorithm: str = "sha256"
) -> Iterator[StagedBlob]:
    """Hash and stage a file for the block, in `ingest`; `name` is for progress reports.

    Raises `NotFoundError`, `StorageFullError`, and `SourceChangedError` if the file changed
    while it was read.
    """
    source = _open(path)
    try:
        found = os.fstat(source)
        if not stat.S_ISREG(found.st_mode):
            raise PackagingError(f"{path} is not a regular file")
        hasher = new_hasher(algorithm)
        seen = _reporter(name, found.st_size, watch)
        with ingest_file(tree) as (staged, file):
            linked = link and _can_link(path, staged, watch)
            if linked or (found.st_size and clone(source, file)):
                size = read_and_hash(source, hasher, seen)
            else:
                _make_room(tree, file, found.st_size, path)
                hashing = Hashing(hasher, found.st_size)
                try:
                    size = copy_and_hash(fill_from(source), file, staged, hashing, seen)
                except StorageFullError as error:
                    raise no_room(tree.ingest, found.st_size, None, str(path)) from error
            _check_unchanged(path, found, os.fstat(source), size)
            if not linked:
                os.fchmod(file, BLOB_MODE)  # the bytes are not flushed, see `blobs`
            yield StagedBlob(path, Digest.of_hasher(hasher), found, staged, linked)
    finally:
        os.close(source)


@contextmanager
def stage_stream(
    tree: Tree, descriptor: Descriptor, stream: BlobReader, watch: Watch
) -> Iterator[StagedBlob]:
    """Hash and stage a blob for the block, from a stream that can be read only once.

    Unlike a download, a failure keeps nothing, and the claimed size reserves no space. Raises
    `DigestMismatchError`, `SizeMismatchError`, `StorageFullError`.
    """
    name, wanted = descriptor.filepath or descriptor.digest.short, descriptor.size
    check_room(tree.ingest, wanted, name)
    reported = _reporter(name, wanted, watch)

    def seen(completed: int) -> None:
        if completed > wanted:
            raise size_mismatch(f"blob {descriptor.digest}", descriptor.size, f"more than {wanted}")
        reported(completed)

    with ingest_file(tree) as (staged, file):
        hasher = descriptor.digest.hasher()
        hashing = Hashing(hasher, wanted)
        size = copy_and_hash(stream.readinto, file, staged, hashing, seen)
        if size != wanted:
            raise size_mismatch(f"blob {descriptor.digest}", descriptor.size, size)
        digest = Digest.of_hasher(hasher)
        descriptor.digest.check_equal(digest, name)
        os.fchmod(file, BLOB_MODE)
        yield StagedBlob(staged, digest, os.fstat(file), staged, linked=False)


def _make_room(tree: Tree, file: int, size: int, path: Path) -> None:
    check_room(tree.ingest, size, str(path))
    try:
        reserve(file, size)
    except OSError:
        raise no_room(tree.ingest, size, None, str(path)) from None


@contextmanager
def ingest_file(tree: Tree) -> Iterator[tuple[Path, int]]:
    """Open the temporary file `ingest/import-<id>.tmp`; delete it at the end unless it was renamed.

    It is locked, so that `sweep` and `gc` can tell it from the file of a killed process.
    """
    path = tree.ingest / f"{_PREFIX}{uuid.uuid4().hex}{_SUFFIX}"
    with map_os_errors("write to", tree.ingest), tree.lock().held():
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        file = os.open(path, flags, 0o600)
        try_lock(file)
    try:
        yield path, file
    finally:
        path.unlink(missing_ok=True)
        os.close(file)


def sweep(tree: Tree) -> None:
    """Delete the files of imports whose processes were killed: they may be as large as a model."""
    if any(tree.ingest.glob(f"{_PREFIX}*")):
        with tree.lock().held():
            for path in tree.ingest.glob(f"{_PREFIX}*"):
                with suppress(OSError):  # a file that cannot be locked stays, for `gc` to report
                    if FileLock(path).is_free():
                        path.unlink()


def is_ingest_file(path: Path) -> bool:
    """Return whether `ingest_file` made the file."""
    return path.name.startswith(_PREFIX)


def _can_link(path: Path, staged: Path, watch: Watch) -> bool:
    """Return whether the file can be hard-linked into the store; report that it cannot."""
    trial = staged.with_name(f"{staged.name}.trial")
    try:
        os.link(os.path.realpath(path), trial)
    except OSError as error:
        why = f"cannot hard-link {path}: {error.strerror}; copying it"
        watch.report(Progress(Action.NOTE, path.name, message=why))
        return False
    trial.unlink(missing_ok=True)
    return True


def _open(path: Path) -> int:
    """Open a file for reading, without waiting for the other end of a FIFO."""
    try:
        return os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        raise NotFoundError(f"no such file: {path}") from None
    except OSError as error:
        raise PackagingError(f"cannot read {path}: {error.strerror}") from error


def _reporter(name: str, size: int, watch: Watch) -> Callable[[int], None]:
    def seen(completed: int) -> None:
        watch.stop.check()
        watch.report(Progress(Action.IMPORT, name, None, completed, size))

    return seen


def _check_unchanged(path: Path, before: os.stat_result, after: os.stat_result, size: int) -> None:
    """Raise `SourceChangedError` if the open file changed or its path has another file."""
    with map_os_errors("read", path):
        try:
            named = os.stat(path)
        except FileNotFoundError:
            raise SourceChangedError(f"{path} was removed while it was being read") from None
    states = {(s.st_dev, s.st_ino, s.st_size, s.st_mtime_ns) for s in (before, after, named)}
    if size != before.st_size or len(states) > 1:
        raise SourceChangedError(
            f"{path} changed while it was being read: it had {before.st_size} bytes, "
            f"{size} were read, and it has {named.st_size} now",
            expected=str(before.st_size),
            got=str(size),
            hint="run the command again when no process writes to the file",
        )
