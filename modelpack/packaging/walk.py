"""The files of a directory, in the order in which they become layers.

The order is Docker Model Runner's: depth first, the entries of a directory by the bytes of their
names, a subdirectory at its own place. (Sorted whole paths would be another order.)
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from modelpack.errors import PackagingError
from modelpack.packaging.files import kind_of_file, shown, unreadable
from modelpack.packaging.symlinks import LinkRule

#: Links to directories can multiply without end; no manifest has room for so many files anyway.
MAX_ENTRIES: Final = 100_000


@dataclass(frozen=True, slots=True)
class Skipped:
    """A file or directory that is left out; `path` is relative to the packaged directory."""

    path: str
    reason: str


@dataclass(frozen=True, slots=True)
class Found:
    """A regular file; `filepath` is its slash path relative to the packaged directory."""

    path: Path
    filepath: str


def walk(root: Path, *, follow_symlinks: bool) -> Iterator[Found | Skipped]:
    """Yield what is in the directory `root`, in the order of layers.

    Raises `PackagingError`, naming the path, for what cannot be read, for links that must not or
    cannot be followed, and for anything that is neither a file nor a directory.
    """
    return _Walk(root, LinkRule.for_directory(root, follow_all=follow_symlinks)).run()


class _Walk:
    def __init__(self, root: Path, links: LinkRule) -> None:
        self._root = root
        self._links = links
        self._entries = 0
        # The directories from the root to where we are: one that comes again is a loop. A stack
        # rather than recursion, because paths can be deeper than Python's calls.
        self._open: list[tuple[str, Iterator[os.DirEntry[str]], tuple[int, int]]] = []

    def run(self) -> Iterator[Found | Skipped]:
        self._descend(str(self._root), "")
        while self._open:
            prefix, entries, _ = self._open[-1]
            entry = next(entries, None)
            if entry is None:
                self._open.pop()
                continue
            self._count()
            found = self._look(entry, prefix + entry.name)
            if found is not None:
                yield found

    def _look(self, entry: os.DirEntry[str], relative: str) -> Found | Skipped | None:
        if entry.name.startswith("."):
            return Skipped(relative, "its name starts with a dot")
        try:
            if entry.is_symlink():
                self._links.check(entry.path)
            status = entry.stat()
        except OSError as error:
            raise unreadable(Path(entry.path), error) from None
        if stat.S_ISREG(status.st_mode):
            return Found(Path(entry.path), relative)
        if not stat.S_ISDIR(status.st_mode):
            raise PackagingError(
                f"{shown(entry.path)} is {kind_of_file(status)}, expected a file or a directory"
            )
        if entry.name == "__pycache__":
            return Skipped(relative, "Python byte code")
        self._descend(entry.path, relative + "/")
        return None

    def _descend(self, path: str, prefix: str) -> None:
        try:
            status = os.stat(path)
            with os.scandir(path) as scan:
                entries = sorted(scan, key=lambda entry: os.fsencode(entry.name))
        except OSError as error:
            raise unreadable(Path(path), error) from None
        identity = (status.st_dev, status.st_ino)
        if any(identity == above for _, _, above in self._open):
            raise PackagingError(
                f"{shown(path)} is a symbolic link to {shown(os.path.realpath(path))}, a directory "
                "that it lies in: following it would never end"
            )
        self._open.append((prefix, iter(entries), identity))

    def _count(self) -> None:
        self._entries += 1
        if self._entries > MAX_ENTRIES:
            raise PackagingError(f"{shown(self._root)} has more than {MAX_ENTRIES} entries")
