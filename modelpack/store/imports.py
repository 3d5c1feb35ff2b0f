"""Files of this machine and members of archives: hashed and copied into the store in one pass."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from modelpack.artifacts.descriptor import Descriptor
from modelpack.artifacts.digest import Digest, new_hasher
from modelpack.errors import (
    NotFoundError,
    PackagingError,
    SizeMismatchError,
    SourceChangedError,
    StorageFullError,
)
from modelpack.progress import Action, Progress
from modelpack.storage import BlobReader, Outcome, Watch
from modelpack.store.file_copy import Hashing, clone, copy_and_hash, filling, read_and_hash, reserve
from modelpack.store.filesystem import check_room, no_room, translating
from modelpack.store.staging import StagedImport, staged_import
from modelpack.store.tree import Tree


@dataclass(frozen=True, slots=True)
class ImportedFile:
    """A file as it was when it was read; `size` in bytes, `mtime_ns` since the epoch."""

    digest: Digest
    size: int
    outcome: Outcome
    device: int
    inode: int
    mtime_ns: int


@dataclass(frozen=True, slots=True)
class Read:
    """A file that was read as a whole; `staged` has its bytes unless the file will be `linked`."""

    path: Path
    digest: Digest
    found: os.stat_result
    staged: Path
    linked: bool

    def link(self) -> None:
        """Make `staged` a hard link of the file. The store's lock is held until it is published.

        Raises `SourceChangedError` if the name stands for another file by now.
        """
        new = self.staged.with_name(f"{self.staged.name}.link")
        with translating("link", self.path):
            os.link(os.path.realpath(self.path), new)
            os.replace(new, self.staged)
            if not os.path.samestat(self.found, self.staged.stat()):
                raise SourceChangedError(f"{self.path} was replaced while it was being read")


@dataclass(frozen=True, slots=True)
class Imports:
    """Reads files into the staging directory of one store; publishing them is up to the caller."""

    tree: Tree

    @contextmanager
    def reading(
        self, path: Path, name: str, watch: Watch, *, link: bool, algorithm: str = "sha256"
    ) -> Iterator[Read]:
        """Read the file and have it staged in the block; `name` is for progress reports.

        Raises `NotFoundError`, `StorageFullError`, and `SourceChangedError` if the file changed
        meanwhile.
        """
        source = _open(path)
        try:
            found = os.fstat(source)
            _check_regular(found, path)
            hasher = new_hasher(algorithm)
            seen = _reporter(name, found.st_size, watch)
            with staged_import(self.tree) as staged:
                linked = link and _can_link(path, staged, watch)
                if linked or (found.st_size and clone(source, staged.file)):
                    size = read_and_hash(source, hasher, seen)
                else:
                    self._make_room(staged, found.st_size, path)
                    hashing = Hashing(hasher, found.st_size)
                    try:
                        size = copy_and_hash(
                            filling(source), staged.file, staged.path, hashing, seen
                        )
                    except StorageFullError as error:
                        raise no_room(self.tree.ingest, found.st_size, None, str(path)) from error
                _check_unchanged(path, found, os.fstat(source), size)
                if not linked:
                    staged.seal()
                yield Read(path, Digest.of_hasher(hasher), found, staged.path, linked)
        finally:
            os.close(source)

    @contextmanager
    def receiving(self, descriptor: Descriptor, stream: BlobReader, watch: Watch) -> Iterator[Read]:
        """Read the blob from a stream that cannot be read again; it is staged in the block.

        Unlike a download, nothing of it stays if this fails, and its size, which is only a claim,
        reserves no space. Raises `DigestMismatchError`, `SizeMismatchError`, `StorageFullError`.
        """
        name, wanted = descriptor.filepath or descriptor.digest.short, descriptor.size
        check_room(self.tree.ingest, wanted, name)
        reported = _reporter(name, wanted, watch)

        def seen(completed: int) -> None:
            if completed > wanted:
                raise _wrong_size(descriptor, f"more than {wanted}")
            reported(completed)

        with staged_import(self.tree) as staged:
            hasher = descriptor.digest.hasher()
            hashing = Hashing(hasher, wanted)
            size = copy_and_hash(stream.readinto, staged.file, staged.path, hashing, seen)
            if size != wanted:
                raise _wrong_size(descriptor, str(size))
            digest = Digest.of_hasher(hasher)
            descriptor.digest.check_equal(digest, name)
            staged.seal()
            yield Read(staged.path, digest, os.fstat(staged.file), staged.path, linked=False)

    def _make_room(self, staged: StagedImport, size: int, path: Path) -> None:
        check_room(self.tree.ingest, size, str(path))
        try:
            reserve(staged.file, size)
        except OSError:
            raise no_room(self.tree.ingest, size, None, str(path)) from None


def _can_link(path: Path, staged: StagedImport, watch: Watch) -> bool:
    """Return whether the file can have a second name in the store; if not it will be copied."""
    trial = staged.path.with_name(f"{staged.path.name}.trial")
    try:
        os.link(os.path.realpath(path), trial)
    except OSError as error:
        why = f"{path} cannot be hard-linked ({error.strerror}): copying it"
        watch.report(Progress(Action.NOTE, path.name, message=why))
        return False
    trial.unlink(missing_ok=True)
    return True


def _open(path: Path) -> int:
    """Open for reading; never waits for the other end of a FIFO."""
    try:
        return os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        raise NotFoundError(f"there is no file {path}") from None
    except OSError as error:
        raise PackagingError(f"cannot read {path}: {error.strerror}") from error


def _check_regular(found: os.stat_result, path: Path) -> None:
    if not stat.S_ISREG(found.st_mode):
        raise PackagingError(f"{path} is not a regular file")


def _wrong_size(descriptor: Descriptor, got: str) -> SizeMismatchError:
    return SizeMismatchError(
        f"blob {descriptor.digest}: expected {descriptor.size} bytes, got {got}",
        expected=str(descriptor.size),
        got=got,
    )


def _reporter(name: str, size: int, watch: Watch) -> Callable[[int], None]:
    def seen(completed: int) -> None:
        watch.stop.check()
        watch.report(Progress(Action.IMPORT, name, None, completed, size))

    return seen


def _check_unchanged(path: Path, before: os.stat_result, after: os.stat_result, size: int) -> None:
    """Raise `SourceChangedError` unless the open file, and what has its name, are as before."""
    with translating("look at", path):
        try:
            named = os.stat(path)
        except FileNotFoundError:
            raise SourceChangedError(f"{path} was removed while it was being read") from None
    states = [(s.st_dev, s.st_ino, s.st_size, s.st_mtime_ns) for s in (before, after, named)]
    if size != before.st_size or states[0] != states[1] or states[0] != states[2]:
        raise SourceChangedError(
            f"{path} changed while it was being read: it had {before.st_size} bytes, "
            f"{size} were read and it has {named.st_size} now",
            expected=str(before.st_size),
            got=str(size),
            hint="run the command again when nobody writes to the file",
        )
