"""What survives a power cut: flushing files and directories, and knowing one boot from the next."""

from __future__ import annotations

import os
import sys
from functools import cache
from pathlib import Path


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


def flush_file(path: Path) -> None:
    """Have the bytes of `path` on the disk itself."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
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
    staged = by_way_of / f"tmp-{path.name}-{random_name()}"
    try:
        write_durably(staged, content, mode=mode)
        os.replace(staged, path)
    except BaseException:
        staged.unlink(missing_ok=True)
        raise
    flush_directory(path.parent)


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
