"""Room on the disk, asked for before a long write rather than after it."""

from __future__ import annotations

import os
from pathlib import Path

from modelpack.errors import StorageFullError

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


def shown(size: int) -> str:
    """Return a number of bytes as people read it: `1.50 GB`."""
    value = float(size)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.0f} B" if unit == "B" else f"{value:.2f} {unit}"
        value /= 1000
    return f"{value:.2f} TB"
