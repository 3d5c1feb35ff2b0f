"""What survives a power cut: flushing files and directories, and knowing one boot from the next."""

from __future__ import annotations

import errno
import os
import stat
import sys
from functools import cache
from pathlib import Path
from typing import Final

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
