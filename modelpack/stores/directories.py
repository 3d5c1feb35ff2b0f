"""Walking and deleting directories without recursion: whoever made one chose how deep it is."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from modelpack.stores.durability import random_name


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
