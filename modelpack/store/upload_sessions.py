"""The files of upload sessions in `ingest/uploads/`: their age, their size, their removal.

The embedded registry (`modelpack.registry_server.uploads`) writes them. Both it and a garbage
collection remove sessions that were abandoned.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Final

from modelpack.store.filesystem import delete_tree

#: Seconds after which an upload that received nothing is dropped.
EXPIRY: Final = 24 * 3600


def abandoned_uploads(directory: Path) -> Iterator[Path]:
    """Return what is in `directory` and received nothing for `EXPIRY`: sessions, and parts of one.

    A crash may have left a session half made, or a file.
    """
    for path in sorted(directory.glob("*")):
        with suppress(FileNotFoundError):  # it ends just now
            if idle_seconds(path) > EXPIRY:
                yield path


def idle_seconds(path: Path) -> float:
    """Return how long ago the session at `path` last received bytes; raises `FileNotFoundError`."""
    data = path / "data"
    try:
        found = data.stat()
    except (FileNotFoundError, NotADirectoryError):
        found = path.stat()
    return time.time() - found.st_mtime


def allocated_bytes(path: Path) -> int:
    """Return the bytes on the disk of all files of an upload."""
    files = path.iterdir() if path.is_dir() else [path]
    return sum(file.stat().st_blocks * 512 for file in files)


def remove_upload(path: Path) -> None:
    """Delete the session, or what is left of one."""
    if path.is_dir():
        delete_tree(path)
    else:
        path.unlink(missing_ok=True)
