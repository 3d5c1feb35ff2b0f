"""A directory that appears under its name complete, or not at all."""

from __future__ import annotations

import errno
import os
import secrets
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import takewhile
from pathlib import Path

from modelpack.errors import ConflictError, UsageError
from modelpack.unpacking.dirfd import DIRECTORY_MODE, Folder, is_directory

_TAKEN = frozenset({errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR})
# (function, flag) that exchange two names in one step.
_EXCHANGE = {"linux": ("renameat2", 2), "darwin": ("renameatx_np", 2)}


def absolute(directory: Path) -> Path:
    """Return the absolute path, links above the last component resolved.

    Raises `UsageError` for the root of the file system.
    """
    if directory.name in ("", ".."):
        directory = Path(os.path.realpath(directory))
    if not directory.name:
        raise UsageError(f"{directory} cannot be replaced", hint="name a new directory")
    return Path(os.path.realpath(directory.parent)) / directory.name


@contextmanager
def new_directory(directory: Path, *, overwrite: bool) -> Iterator[Folder]:
    """Give an empty directory that is renamed to `directory` when the block is left well.

    Left by an exception, it is removed with all that is in it, and so are directories above that
    were made for it. An existing directory that is not empty is only replaced if `overwrite`; it
    is removed once the new one stands in its place. Raises `ConflictError`, `UsageError`.
    """
    directory = absolute(directory)
    missing = _missing(directory.parent)
    temporary = f".modelpack-{secrets.token_hex(8)}.partial"
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        with Folder.open(directory.parent) as parent:
            _check_free(parent, directory, overwrite=overwrite)
            try:
                with parent.make(temporary, 0o700) as folder:
                    yield folder
                    os.fchmod(folder.fd, DIRECTORY_MODE)
                replaced = _publish(parent, temporary, directory, overwrite=overwrite)
            except BaseException:
                shutil.rmtree(temporary, ignore_errors=True, dir_fd=parent.fd)
                raise
            if replaced:
                shutil.rmtree(temporary, dir_fd=parent.fd)
    except BaseException:
        for path in missing:
            with suppress(OSError):  # not made after all, or somebody else uses it by now
                os.rmdir(path)
        raise


def _missing(path: Path) -> list[Path]:
    """Return which of the path and its parents are not there, the deepest first."""
    return list(takewhile(lambda parent: not parent.exists(), (path, *path.parents)))


def _check_free(parent: Folder, directory: Path, *, overwrite: bool) -> None:
    status = parent.status(directory.name)
    if status is None:
        return
    if not is_directory(status):
        raise ConflictError(
            f"{directory} is there already, and it is not a directory",
            hint="name a new directory; for a symbolic link, the directory that it leads to",
        )
    if os.path.samestat(status, os.stat(".")):
        raise UsageError(
            f"{directory} is the current directory, which a new one would replace",
            hint="name a directory inside it, or change to another one first",
        )
    with parent.enter(directory.name) as existing:
        if os.listdir(existing.fd) and not overwrite:
            raise _taken(directory)


def _publish(parent: Folder, temporary: str, directory: Path, *, overwrite: bool) -> bool:
    """Rename; return whether what was there before is now at `temporary`."""
    try:
        # An empty directory is replaced by this.
        _rename(parent, temporary, directory.name)
    except OSError as error:
        if error.errno not in _TAKEN:
            raise
        status = parent.status(directory.name)
        if not overwrite or status is None or not is_directory(status):
            raise _taken(directory) from error
        _exchange(parent, temporary, directory.name)
        return True
    return False


def _exchange(parent: Folder, temporary: str, name: str) -> None:
    """Swap the two names, in one step where the system can."""
    if _exchanged(parent, temporary, name):
        return
    aside = f"{temporary}.old"
    _rename(parent, name, aside)
    try:
        _rename(parent, temporary, name)
    except BaseException:
        _rename(parent, aside, name)
        raise
    _rename(parent, aside, temporary)


def _exchanged(parent: Folder, one: str, other: str) -> bool:
    import ctypes

    function, flag = _EXCHANGE.get(sys.platform, ("", 0))
    library = ctypes.CDLL(None, use_errno=True)
    if not function or not hasattr(library, function):
        return False
    call = getattr(library, function)
    failed = call(parent.fd, os.fsencode(one), parent.fd, os.fsencode(other), flag)
    return not failed


def _rename(parent: Folder, old: str, new: str) -> None:
    os.rename(old, new, src_dir_fd=parent.fd, dst_dir_fd=parent.fd)


def _taken(directory: Path) -> ConflictError:
    return ConflictError(
        f"{directory} is there already and not empty",
        hint="name a new directory, or ask to replace this one",
    )
