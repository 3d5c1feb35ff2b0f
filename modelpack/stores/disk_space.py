"""Room on the disk, asked for before a long write rather than after it."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path

from modelpack.errors import StorageFullError
from modelpack.stores.directories import files_below

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
