"""What the operating system refuses, said in Modelpack's own errors."""

from __future__ import annotations

import errno
import os
import stat
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Final

from modelpack.errors import StorageFullError, StoreError

FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
_FORBIDDEN = frozenset({errno.EACCES, errno.EPERM, errno.EROFS})
_NO_LOCKS = frozenset({errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL})


@contextmanager
def translating(doing: str, path: Path | str) -> Iterator[None]:
    """Turn an `OSError` inside the block into a `StoreError`: "cannot <doing> <path>: ..."."""
    try:
        yield
    except OSError as error:
        raise translated(error, doing, path) from error


def translated(error: OSError, doing: str, path: Path | str) -> StoreError:
    """Return the `StoreError` (a `StorageFullError` where the disk is full) for `error`."""
    why = error.strerror or str(error)
    if error.errno in FULL:
        return StorageFullError(
            f"cannot {doing} {path}: {why}",
            hint="free some space (`modelpack gc` may help) and run the same command again",
        )
    hint = None
    if doing == "lock" and error.errno in _NO_LOCKS:
        why = f"its file system has no locks ({why})"
        hint = "keep the store elsewhere, on a local disk: two processes would damage it there"
    if error.errno in _FORBIDDEN:
        hint = "check who owns the store and whether its file system is writable"
    return StoreError(f"cannot {doing} {path}: {why}", hint=hint)


_DRAFT: Final = "tmp-"


@cache
def boot_id() -> str:
    """Return a text that stays the same until the machine starts again.

    Where the system tells none, every process gets its own: then more is verified, never less.
    """
    if sys.platform == "darwin":
        return _told_by_sysctl() or f"unknown-{random_name()}"
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return f"unknown-{random_name()}"


def _told_by_sysctl() -> str:
    import subprocess

    command = ["sysctl", "-n", "kern.bootsessionuuid"]
    try:
        told = subprocess.run(command, capture_output=True, check=True, timeout=10).stdout
    except (OSError, subprocess.SubprocessError):
        return ""
    return told.decode().strip()


def random_name() -> str:
    """Return a text that nothing else is called."""
    return os.urandom(16).hex()


def open_own(
    path: Path | str, flags: int = os.O_RDONLY, *, mode: int = 0o644, follow: bool = False
) -> int:
    """Open a file that the store keeps for itself; return its descriptor.

    A store may come from a stranger: a symbolic link in place of the file, unless `follow`, a FIFO,
    a device or a directory is an `OSError`, and nothing is waited for.
    """
    flags |= os.O_NONBLOCK | os.O_CLOEXEC | (0 if follow else os.O_NOFOLLOW)
    descriptor = os.open(path, flags, mode)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EBADF, "it is not a regular file", str(path))
    return descriptor


def read_own(path: Path | str, limit: int, *, follow: bool = False) -> bytes:
    """Return the bytes of a file that `open_own` opens; raise `OSError` if they exceed `limit`."""
    with open(open_own(path, follow=follow), "rb", buffering=0) as stream:
        # A buffer of the size asked for is allocated at once, however short the file is.
        size = os.fstat(stream.fileno()).st_size
        if size > limit:
            raise OSError(errno.EFBIG, f"it has more than {limit} bytes", str(path))
        return stream.read(size + 1) or b""


def write_own(path: Path | str, content: bytes) -> None:
    """Write a small file in place, as `open_own` opens it; it is not flushed."""
    descriptor = open_own(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    try:
        write_all(descriptor, memoryview(content))
    finally:
        os.close(descriptor)


def flush_file(path: Path) -> None:
    """Have the bytes of `path` on the disk itself."""
    descriptor = open_own(path, follow=True)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def flush_directory(path: Path) -> None:
    """Have the names in the directory `path` on the disk itself."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomically(path: Path, content: bytes, *, by_way_of: Path, mode: int = 0o644) -> None:
    """Replace the file `path` as a whole, durably.

    Readers see the old bytes or the new ones. `by_way_of` is a directory on the same file system.
    """
    staged = draft(by_way_of, path.name)
    try:
        write_durably(staged, content, mode=mode)
        os.replace(staged, path)
    except BaseException:
        staged.unlink(missing_ok=True)
        raise
    flush_directory(path.parent)


def draft(directory: Path, name: str) -> Path:
    """Return where to write what is to be renamed to `name`; a collection deletes old ones."""
    return directory / f"{_DRAFT}{name}-{random_name()}"


def is_draft(path: Path) -> bool:
    """Return whether the file is one of `draft`."""
    return path.name.startswith(_DRAFT)


def write_durably(path: Path, content: bytes, *, mode: int) -> None:
    """Write the new file `path` and flush it; its permission bits are exactly `mode`."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        write_all(descriptor, memoryview(content))
        os.fchmod(descriptor, mode)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_all(descriptor: int, view: memoryview) -> None:
    """Write all of `view`; a system call may take only a part of it."""
    while view:
        view = view[os.write(descriptor, view) :]


def files_below(
    root: Path, *, skip_unreadable: bool = False
) -> Iterator[tuple[str, os.DirEntry[str]]]:
    """Yield all that is not a directory, with its path below `root`; links are not followed.

    Raises `OSError` for a directory that cannot be read, or whose path is too long, unless those
    are skipped.
    """
    waiting = [(os.fspath(root), "")]
    while waiting:
        directory, prefix = waiting.pop()
        try:
            found = os.scandir(directory)
        except OSError:
            if skip_unreadable:
                continue
            raise
        with found:
            for entry in found:
                if entry.is_dir(follow_symlinks=False):
                    waiting.append((entry.path, f"{prefix}{entry.name}/"))
                else:
                    yield f"{prefix}{entry.name}", entry


def delete_tree(root: Path) -> None:
    """Delete a directory and all below it, as far as that is possible; nobody else writes to it.

    Directories are moved to the top before they are emptied, so that paths stay short.
    """
    waiting = [root]
    while waiting:
        directory = waiting.pop()
        with suppress(OSError):
            waiting += _emptied(directory, root)
        if directory != root:
            with suppress(OSError):
                os.rmdir(directory)
    with suppress(OSError):
        os.rmdir(root)


def _emptied(directory: Path, root: Path) -> list[Path]:
    """Delete the files in a directory, and move its directories into `root`; return them."""
    moved = []
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        with os.scandir(descriptor) as entries:
            found = list(entries)
        for entry in found:
            with suppress(OSError):
                if not entry.is_dir(follow_symlinks=False):
                    os.unlink(entry.name, dir_fd=descriptor)
                elif directory == root:
                    moved.append(root / entry.name)
                else:
                    target = root / random_name()
                    os.rename(entry.name, target, src_dir_fd=descriptor)
                    moved.append(target)
    finally:
        os.close(descriptor)
    return moved


_MOST_MARGIN = 64 * 1024 * 1024


def check_room(folder: Path, size: int, what: str) -> None:
    """Raise `StorageFullError` unless `size` more bytes fit on the file system of `folder`.

    A margin of 5 %, 64 MiB at most, is asked for besides: metadata needs room too.
    """
    if size <= 0:
        return
    disk = os.statvfs(folder)
    available = disk.f_bavail * disk.f_frsize
    needed = size + min(size // 20, _MOST_MARGIN)
    if needed > available:
        raise no_room(folder, needed, available, what)


def no_room(folder: Path, needed: int, available: int | None, what: str) -> StorageFullError:
    """Return the error that says what is needed and what is there, in bytes."""
    if available is None:
        disk = os.statvfs(folder)
        available = disk.f_bavail * disk.f_frsize
    return StorageFullError(
        f"no room for {what} in {folder}: need {shown(needed)}, have {shown(available)}",
        needed=needed,
        available=available,
        hint="free some space (`modelpack gc` may help) and run the same command again; "
        "what was downloaded so far is kept",
    )


def bytes_freed(paths: Iterable[Path]) -> int:
    """Return the bytes that deleting these files and directories frees, all together.

    A file with several names is freed with the last of them, and counts once.
    """
    names: Counter[tuple[int, int]] = Counter()
    found: dict[tuple[int, int], os.stat_result] = {}
    for status in _statuses(paths):
        key = (status.st_dev, status.st_ino)
        names[key] += 1
        found[key] = status
    return sum(status.st_size for key, status in found.items() if status.st_nlink <= names[key])


def bytes_used(*paths: Path) -> int:
    """Return the bytes of these files and directories; a file with several names counts once."""
    found = {(status.st_dev, status.st_ino): status.st_size for status in _statuses(paths)}
    return sum(found.values())


def _statuses(paths: Iterable[Path]) -> Iterator[os.stat_result]:
    """Return the status of each file below the paths; what vanishes meanwhile is left out."""
    for path in paths:
        if path.is_symlink() or not path.is_dir():
            with suppress(OSError):
                yield os.lstat(path)
            continue
        for _, entry in files_below(path, skip_unreadable=True):
            with suppress(OSError):
                yield entry.stat(follow_symlinks=False)


def shown(size: int) -> str:
    """Return a number of bytes as people read it: `1.50 GB`."""
    value = float(size)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.0f} B" if unit == "B" else f"{value:.2f} {unit}"
        value /= 1000
    return f"{value:.2f} TB"
