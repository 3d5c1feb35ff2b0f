"""Directories held open, so that nobody can move them while files are made in them.

A path is looked up anew each time that it is used; whoever can write beside us may have put a
symbolic link on the way by then. Here every name is looked up in an open directory, one component
at a time, and a link is never followed (openat with O_NOFOLLOW).
"""

from __future__ import annotations

import errno
import os
import stat
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from modelpack.artifacts.paths import checked_path
from modelpack.errors import UnsafePathError

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
_NEW_FILE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
# What the systems say of a link, a file, or nothing, where a directory was.
_NO_DIRECTORY = frozenset({errno.ELOOP, errno.ENOTDIR, errno.ENOENT, errno.EMLINK})

DIRECTORY_MODE = 0o755
FILE_MODE = 0o644
EXECUTABLE_MODE = 0o755


class Folder:
    """An open directory; close it, or use it as a context. `path` is for messages only."""

    __slots__ = ("fd", "path")

    def __init__(self, fd: int, path: str) -> None:
        self.fd = fd
        self.path = path

    @classmethod
    def open(cls, path: Path) -> Folder:
        """Open the directory at `path`, whose links the caller chose and which are followed."""
        return cls(os.open(path, _DIRECTORY), str(path))

    def duplicate(self) -> Folder:
        """Return the same directory, to be closed on its own."""
        return Folder(os.dup(self.fd), self.path)

    def enter(self, name: str) -> Folder:
        """Open the directory `name` in this one; raise `UnsafePathError` if it is none."""
        path = f"{self.path}/{name}"
        try:
            return Folder(os.open(name, _DIRECTORY | os.O_NOFOLLOW, dir_fd=self.fd), path)
        except OSError as error:
            if error.errno not in _NO_DIRECTORY:
                raise
            why = os.strerror(error.errno)
            raise _planted(path, "the directory that was made there", why) from error

    def make(self, name: str, mode: int = DIRECTORY_MODE) -> Folder:
        """Make the directory `name`, which may not be there yet, and open it."""
        with self._new(name):
            os.mkdir(name, 0o700, dir_fd=self.fd)
        made = self.enter(name)
        os.fchmod(made.fd, mode)  # whatever the umask is
        return made

    def create(self, name: str, mode: int = FILE_MODE) -> int:
        """Make the file `name`, which may not be there yet; return its descriptor, for writing."""
        with self._new(name):
            fd = os.open(name, _NEW_FILE, 0o600, dir_fd=self.fd)
        os.fchmod(fd, mode)
        return fd

    def hard_link(self, path: Path, name: str) -> None:
        """Make `name` another name of the file that `path` leads to."""
        with self._new(name):
            os.link(os.path.realpath(path), name, dst_dir_fd=self.fd, follow_symlinks=False)

    def symbolic_link(self, path: Path, name: str) -> None:
        """Make `name` a link to `path`."""
        with self._new(name):
            os.symlink(os.path.abspath(path), name, dir_fd=self.fd)

    def check_holds(self, name: str, folder: Folder) -> None:
        """Raise `UnsafePathError` unless `name` still is `folder`."""
        status = self.status(name)
        if status is None or not os.path.samestat(status, os.fstat(folder.fd)):
            raise _planted(f"{self.path}/{name}", "the directory that was made there", "another")

    def status(self, name: str) -> os.stat_result | None:
        """Return what `name` is, a link not followed; None if there is no such name."""
        try:
            return os.stat(name, dir_fd=self.fd, follow_symlinks=False)
        except FileNotFoundError:
            return None

    @contextmanager
    def _new(self, name: str) -> Iterator[None]:
        try:
            yield
        except FileExistsError as error:
            raise _planted(f"{self.path}/{name}", "nothing", "something is there") from error

    def close(self) -> None:
        """Close the directory."""
        os.close(self.fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def is_directory(status: os.stat_result) -> bool:
    """Return whether this is a directory itself, not a link to one."""
    return stat.S_ISDIR(status.st_mode)


def _planted(path: str, expected: str, got: str) -> UnsafePathError:
    return UnsafePathError(
        f"{path}: expected {expected}, but somebody else changed it: {got}",
        expected=expected,
        got=got,
        hint="unpack into a directory that nobody else writes to",
    )


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
