"""Place a blob in a bundle: as a hard link, a symbolic link, a reflink or a copy."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import BinaryIO

from modelpack.artifacts.descriptor import Descriptor
from modelpack.artifacts.digest import Digest
from modelpack.artifacts.model import ModelFile
from modelpack.bundles.directory import FILE_MODE, Folder
from modelpack.errors import NotFoundError, SizeMismatchError, StoreError
from modelpack.progress import Action, Progress
from modelpack.storage import Watch

# O_NONBLOCK: do not wait for the writer of a FIFO.
_READ = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK
_BUFFER_BYTES = 256 * 1024


@contextmanager
def open_blob(path: Path, descriptor: Descriptor) -> Iterator[BinaryIO]:
    """Open the blob at `path` for reading; the store verified it, but it may be damaged since.

    Raises `NotFoundError` if it is missing, `SizeMismatchError` if its size differs from the
    descriptor, `StoreError` if it is not a file.
    """
    try:
        fd = os.open(path, _READ)
    except FileNotFoundError:
        raise NotFoundError(
            f"blob {descriptor.digest} is not in the store: no such file: {path}",
            hint="pull the model again",
        ) from None
    with os.fdopen(fd, "rb", buffering=_BUFFER_BYTES) as blob:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise StoreError(f"blob {descriptor.digest} is not a file: {path}")
        if status.st_size != descriptor.size:
            raise SizeMismatchError(
                f"blob {descriptor.digest} has {status.st_size} bytes, "
                f"expected {descriptor.size}: {path}",
                expected=str(descriptor.size),
                got=str(status.st_size),
                hint="check the store with `modelpack fsck`",
            )
        yield blob


_FICLONE = 0x40049409  # linux/fs.h
_ON_MACOS: bool = sys.platform == "darwin"
_CHUNK = 1024 * 1024
# Errors of a file system or kernel that cannot share the blob: try the next kind of link.
_CANNOT = frozenset({
    errno.EXDEV, errno.EPERM, errno.EACCES, errno.EMLINK, errno.EINVAL,
    errno.ENOSYS, errno.ENOTTY, errno.ENOTSUP, errno.EOPNOTSUPP,
})  # fmt: skip


class LinkMode(StrEnum):
    """The kind of link for a bundle's files. AUTO: a hard link, else a reflink, else a copy."""

    AUTO = "auto"
    HARDLINK = "hardlink"
    SYMLINK = "symlink"
    REFLINK = "reflink"
    COPY = "copy"


class Placement(StrEnum):
    """How a file of a bundle was made.

    A hard link is the store's file under another name: writing to it would damage the store, which
    the mode 0444 of its blobs prevents, except for root. A symbolic link breaks when the blob is
    removed from the store; the others do not.
    """

    HARDLINK = "hardlink"
    SYMLINK = "symlink"
    REFLINK = "reflink"
    COPY = "copy"
    EXTRACTED = "extracted"


_AUTO = (Placement.HARDLINK, Placement.REFLINK, Placement.COPY)


def put(
    file: ModelFile,
    path: Path,
    folder: Folder,
    name: str,
    mode: LinkMode,
    watch: Watch,
    notes: list[str],
) -> Placement:
    """Place the blob at `path` as `name` in `folder`; return the kind of placement.

    Adds to `notes`, once, why files are copied instead of linked.

    Raises `NotFoundError` or `SizeMismatchError` if the blob is lost or truncated, `StoreError` if
    the file system does not support `mode`, and `DigestMismatchError` if a copied blob is damaged.
    """
    problem: OSError | None = None
    with open_blob(path, file.descriptor) as blob:
        for placement in _AUTO if mode is LinkMode.AUTO else (Placement(mode),):
            try:
                _PLACE[placement](file, path, blob, folder, name, watch)
            except OSError as error:
                if error.errno not in _CANNOT or placement in (Placement.SYMLINK, Placement.COPY):
                    raise
                problem = problem or error
            else:
                if problem is not None and placement is Placement.COPY:
                    why = f"files are copied: hard links to the store failed ({problem.strerror})"
                    notes += [why] if why not in notes else []
                return placement
    raise StoreError(
        f"cannot make {folder.path}/{name} a {mode} of {path}: "
        f"{problem.strerror if problem else 'unknown'}",
        hint="use another kind of link, or a directory on the file system of the store",
    ) from problem


def _hard_link(
    _file: ModelFile, path: Path, blob: BinaryIO, folder: Folder, name: str, _watch: Watch
) -> None:
    folder.hard_link(path, name)
    made = folder.status(name)
    if made is None or not os.path.samestat(made, os.fstat(blob.fileno())):
        raise StoreError(f"{path} was replaced while it was linked", hint="try again")


def _symbolic_link(
    _file: ModelFile, path: Path, _blob: BinaryIO, folder: Folder, name: str, _watch: Watch
) -> None:
    folder.symbolic_link(path, name)


def _reflink(
    _file: ModelFile, _path: Path, blob: BinaryIO, folder: Folder, name: str, _watch: Watch
) -> None:
    if _ON_MACOS:
        _clone_on_macos(blob.fileno(), folder, name)
        return
    target = folder.create(name)
    try:
        fcntl.ioctl(target, _FICLONE, blob.fileno())
    except OSError:
        os.unlink(name, dir_fd=folder.fd)
        raise
    finally:
        os.close(target)


def _clone_on_macos(source: int, folder: Folder, name: str) -> None:
    import ctypes

    library = ctypes.CDLL(None, use_errno=True)
    if library.fclonefileat(source, folder.fd, os.fsencode(name), 0):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    clone = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=folder.fd)
    try:
        os.fchmod(clone, FILE_MODE)  # a blob is read-only
    finally:
        os.close(clone)


def _copy(
    file: ModelFile, _path: Path, blob: BinaryIO, folder: Folder, name: str, watch: Watch
) -> None:
    digest, size = file.descriptor.digest, file.descriptor.size
    hasher = digest.hasher()
    with os.fdopen(folder.create(name), "wb") as target:
        completed = 0
        while data := blob.read(_CHUNK):
            watch.stop.check()
            target.write(data)
            hasher.update(data)
            completed += len(data)
            watch.report(Progress(Action.UNPACK, name, digest, completed, size))
    digest.check_equal(Digest.of_hasher(hasher), f"blob {digest}")


_PLACE = {
    Placement.HARDLINK: _hard_link,
    Placement.SYMLINK: _symbolic_link,
    Placement.REFLINK: _reflink,
    Placement.COPY: _copy,
}
