"""The files of one bundle, made below one open directory, each path at most once."""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from modelpack.errors import UnsafePathError
from modelpack.paths import checked_path
from modelpack.unpacking.dirfd import Folder

#: Directories above a file, at most. Tools that recurse over the result have limits too.
MAX_DEPTH = 64


def folded(path: str) -> str:
    """Return `path` such that paths that some file system takes for one are equal.

    macOS ignores case, and how accents are composed (Unicode "canonical caseless matching").
    """
    once = unicodedata.normalize("NFD", path).casefold()
    return unicodedata.normalize("NFD", once)


@dataclass(frozen=True, slots=True)
class _Node:
    path: str
    is_file: bool
    source: str


class Tree:
    """What has been made below `root`; `source` names, in errors, where a path comes from."""

    def __init__(self, root: Folder) -> None:
        self._root = root
        self._nodes: dict[str, _Node] = {}
        #: Bytes of the paths of all files and directories: each is held in memory.
        self.path_bytes = 0

    def __len__(self) -> int:
        """Return how many files and directories were made."""
        return len(self._nodes)

    def free_bytes(self) -> int:
        """Return how many bytes the file system has left for us."""
        disk = os.statvfs(self._root.fd)
        return disk.f_bavail * disk.f_frsize

    def add_directory(self, path: str, source: str) -> None:
        """Have the directory `path` and those above it.

        Raises `UnsafePathError` if a file is there, or another spelling of the same path.
        """
        self._walk(_parts(path, source), source).close()

    @contextmanager
    def place(self, path: str, source: str) -> Iterator[tuple[Folder, str]]:
        """Give the directory and the name to make the file `path` with; the file is new.

        Raises `UnsafePathError` if `path` is unsafe or taken, by a directory or by another
        spelling of it too.
        """
        *parents, name = _parts(path, source)
        with self._walk(parents, source) as folder:
            node = self._nodes.get(folded(path))
            if node:
                raise _collision(path, source, node, is_file=True)
            yield folder, name
            self._note(_Node(path, True, source))

    def _note(self, node: _Node) -> None:
        self._nodes[folded(node.path)] = node
        self.path_bytes += len(node.path.encode())

    def _walk(self, parts: list[str], source: str) -> Folder:
        folder = self._root.duplicate()
        path = ""
        for name in parts:
            path = f"{path}/{name}" if path else name
            with folder:
                folder = self._step(folder, path, name, source)
        return folder

    def _step(self, folder: Folder, path: str, name: str, source: str) -> Folder:
        node = self._nodes.get(folded(path))
        if node is None:
            made = folder.make(name)
            self._note(_Node(path, False, source))
            return made
        if node.is_file or node.path != path:
            raise _collision(path, source, node, is_file=False)
        return folder.enter(name)


def _parts(path: str, source: str) -> list[str]:
    parts = checked_path(path).split("/")
    if len(parts) > MAX_DEPTH:
        raise UnsafePathError(
            f"{source}: path {path[:200]!r} has {len(parts)} components, more than {MAX_DEPTH}",
            expected=f"at most {MAX_DEPTH}",
            got=str(len(parts)),
        )
    return parts


def _collision(path: str, source: str, node: _Node, *, is_file: bool) -> UnsafePathError:
    if node.path != path:
        problem = (
            f"{path!r} and {node.path!r} of {node.source} are one path where case and the "
            "composition of accents do not count"
        )
    elif node.is_file and is_file:
        problem = f"{path!r} was made already, from {node.source}"
    else:
        here, there = ("a file", "a directory") if is_file else ("a directory", "a file")
        problem = f"{path!r} is {here} here and {there} in {node.source}"
    return UnsafePathError(f"{source}: {problem}", expected="different paths", got=path)
