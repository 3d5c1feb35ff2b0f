"""File system operations of stores: safe opening, durable writes, locks, deletion, free space.

Errors of the operating system become `StoreError` and `StorageFullError` here.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Final

from modelpack.errors import LockedError, StorageFullError, StoreError
from modelpack.progress import Stop

FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
_FORBIDDEN = frozenset({errno.EACCES, errno.EPERM, errno.EROFS})
_FREE_SPACE = "free some space, for example with `modelpack gc`, and run the same command again"
_NO_LOCKS = frozenset({errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL})


@contextmanager
def map_os_errors(action: str, path: Path | str) -> Iterator[None]:
    """Turn an `OSError` in the block into a `StoreError`: "cannot <action> <path>: ...".

    A full disk is a `StorageFullError`.
    """
    try:
        yield
    except OSError as error:
        why, hint = error.strerror or str(error), ""
        if error.errno in FULL:
            hint = _FREE_SPACE
        elif error.errno in _FORBIDDEN:
            hint = "check the owner of the store and whether its file system is writable"
        elif action == "lock" and error.errno in _NO_LOCKS:
            why = f"its file system does not support locks ({why})"
            hint = "keep the store on a local disk: without locks, two processes would damage it"
        kind = StorageFullError if error.errno in FULL else StoreError
        raise kind(f"cannot {action} {path}: {why}", hint=hint or None) from error


_DRAFT: Final = "tmp-"


@cache
def boot_id() -> str:
    """Return an id that stays the same until the machine is rebooted.

    Without an id from the system, every process gets its own: more is verified then, never less.
    """
    if sys.platform == "darwin":
        return _sysctl_boot_id() or f"unknown-{random_name()}"
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return f"unknown-{random_name()}"


def _sysctl_boot_id() -> str:
    import subprocess

    command = ["sysctl", "-n", "kern.bootsessionuuid"]
    try:
        output = subprocess.run(command, capture_output=True, check=True, timeout=10).stdout
    except (OSError, subprocess.SubprocessError):
        return ""
    return output.decode().strip()


def random_name() -> str:
    """Return a unique file name."""
    return os.urandom(16).hex()


def open_own(
    path: Path | str, flags: int = os.O_RDONLY, *, mode: int = 0o644, follow: bool = False
) -> int:
    """Open one of the store's own files; return its descriptor.

    A store may come from an untrusted source: raises `OSError`, without waiting, if the path is a
    FIFO, a device, a directory or, unless `follow`, a symbolic link.
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
        # `read(limit)` would allocate the whole limit, however short the file is.
        size = os.fstat(stream.fileno()).st_size
        if size > limit:
            raise OSError(errno.EFBIG, f"it has more than {limit} bytes", str(path))
        return stream.read(size + 1) or b""


def write_own(path: Path | str, content: bytes) -> None:
    """Write a small file in place, as `open_own` opens it; it is not flushed."""
    with open(open_own(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), "wb") as stream:
        stream.write(content)


def flush_file(path: Path) -> None:
    """Flush the bytes of the file `path` to the disk."""
    with open(open_own(path, follow=True), "rb") as stream:
        os.fsync(stream)


def flush_directory(path: Path) -> None:
    """Flush the names in the directory `path` to the disk."""
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
    """Return a path for a file that will be renamed to `name`; `gc` deletes abandoned ones."""
    return directory / f"{_DRAFT}{name}-{random_name()}"


def is_draft(path: Path) -> bool:
    """Return whether `draft` made the path."""
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
    """Write all of `view`: a system call may write only a part of it."""
    while view:
        view = view[os.write(descriptor, view) :]


def files_below(
    root: Path, *, skip_unreadable: bool = False
) -> Iterator[tuple[str, os.DirEntry[str]]]:
    """Yield everything but directories, with the path below `root`; links are not followed.

    Raises `OSError` for a directory that is unreadable or has too long a path, unless
    `skip_unreadable`.
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
    """Delete a directory and everything below it as far as possible, or a file.

    No other process may write to it. Directories are moved to the top before they are emptied, so
    that paths stay short.
    """
    if root.is_symlink() or not root.is_dir():
        return root.unlink(missing_ok=True)
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
    return None


def _emptied(directory: Path, root: Path) -> list[Path]:
    """Delete the files in a directory and move its directories into `root`; return those."""
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

    Requires a margin of 5 %, at most 64 MiB, for metadata.
    """
    if size <= 0:
        return
    disk = os.statvfs(folder)
    available = disk.f_bavail * disk.f_frsize
    needed = size + min(size // 20, _MOST_MARGIN)
    if needed > available:
        raise no_room(folder, needed, available, what)


def no_room(folder: Path, needed: int, available: int | None, what: str) -> StorageFullError:
    """Return the error with the bytes that are needed and available."""
    if available is None:
        disk = os.statvfs(folder)
        available = disk.f_bavail * disk.f_frsize
    return StorageFullError(
        f"no room for {what} in {folder}: need {shown(needed)}, have {shown(available)}",
        needed=needed,
        available=available,
        hint=f"{_FREE_SPACE}, which goes on where it stopped",
    )


def bytes_freed(paths: Iterable[Path]) -> int:
    """Return the bytes that deleting all these files and directories frees.

    A file with several names is freed only if all of them are deleted, and counts once.
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
    """Yield the status of each file below the paths; skip files that disappear."""
    for path in paths:
        if path.is_symlink() or not path.is_dir():
            with suppress(OSError):
                yield os.lstat(path)
            continue
        for _, entry in files_below(path, skip_unreadable=True):
            with suppress(OSError):
                yield entry.stat(follow_symlinks=False)


def shown(size: int) -> str:
    """Return a number of bytes for people: `1.50 GB`."""
    value = float(size)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.0f} B" if unit == "B" else f"{value:.2f} {unit}"
        value /= 1000
    return f"{value:.2f} TB"


# Seconds between two attempts, and in all.
_FIRST_PAUSE = 0.001
_LONGEST_PAUSE = 0.1
_PATIENCE = 60.0
_MAX_HOLDER_BYTES = 64


@dataclass(frozen=True, slots=True)
class FileLock:
    """An exclusive lock on the file `path`, which is created when needed."""

    path: Path

    @contextmanager
    def held(
        self,
        *,
        patience: float | None = _PATIENCE,
        stop: Stop | None = None,
        waiting: Callable[[str], None] | None = None,
        remove: bool = False,
    ) -> Iterator[None]:
        """Hold the lock in the block.

        Waits at most `patience` seconds (None: for ever), then raises `LockedError`; `stop` ends
        the wait early. `waiting` is called once with the name of the holder. `remove` deletes the
        file at the end; waiting processes then lock a new one.
        """
        descriptor = self._acquire(patience, stop, waiting)
        try:
            yield
        finally:
            if remove:
                self.path.unlink(missing_ok=True)
            os.close(descriptor)

    def is_free(self) -> bool:
        """Return whether no process holds the lock."""
        try:
            descriptor = open_own(self.path)
        except FileNotFoundError:
            return True
        try:
            return try_lock(descriptor)
        finally:
            os.close(descriptor)

    def _acquire(
        self,
        patience: float | None,
        stop: Stop | None,
        waiting: Callable[[str], None] | None,
    ) -> int:
        deadline = None if patience is None else time.monotonic() + patience
        pause = _FIRST_PAUSE
        while True:
            descriptor = self._try()
            if descriptor is not None:
                return descriptor
            if deadline is not None and time.monotonic() >= deadline:
                raise LockedError(
                    f"{self.path} is held by {self._holder()}",
                    hint="try again when it has finished",
                )
            if waiting is not None:
                waiting(self._holder())
                waiting = None
            if stop is not None:
                stop.wait(pause)
            else:
                time.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)

    def _try(self) -> int | None:
        with map_os_errors("lock", self.path):
            descriptor = open_own(self.path, os.O_RDWR | os.O_CREAT)
            try:
                if try_lock(descriptor) and self._is_current(descriptor):
                    with suppress(OSError):  # the id is for errors only: lock on a full disk too
                        os.ftruncate(descriptor, 0)
                        os.pwrite(descriptor, b"%d\n" % os.getpid(), 0)
                    return descriptor
            except BaseException:
                os.close(descriptor)
                raise
            os.close(descriptor)
            return None

    def _is_current(self, descriptor: int) -> bool:
        """Return whether `path` is still the locked file: its last holder may have removed it."""
        try:
            named = os.stat(self.path)
        except FileNotFoundError:
            return False
        return os.path.samestat(named, os.fstat(descriptor))

    def _holder(self) -> str:
        try:
            pid = read_own(self.path, _MAX_HOLDER_BYTES).decode(errors="replace").strip()
        except OSError:
            pid = ""
        return f"process {pid}" if pid.isdigit() else "another process"


def try_lock(descriptor: int) -> bool:
    """Try to lock the open file exclusively; return whether that succeeded."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
