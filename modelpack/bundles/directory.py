"""Make files below a directory safely, and make the directory appear complete or not at all.

A path is resolved again at each use, so another process with write access could put a symbolic
link into it. Here every name is resolved in an open directory, one component at a time, and links
are never followed (openat with O_NOFOLLOW).
"""

from __future__ import annotations

import errno
import os
import secrets
import shutil
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Self

from modelpack.artifacts.paths import checked_path, folded
from modelpack.errors import ConflictError, UnsafePathError, UsageError

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
_NEW_FILE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
# Errors for opening a link, a file, or nothing, as a directory.
_NO_DIRECTORY = frozenset({errno.ELOOP, errno.ENOTDIR, errno.ENOENT, errno.EMLINK})

DIRECTORY_MODE = 0o755
FILE_MODE = 0o644
EXECUTABLE_MODE = 0o755


class Folder:
    """An open directory; close it, or use it as a context. `path` is only for messages."""

    __slots__ = ("fd", "path")

    def __init__(self, fd: int, path: str) -> None:
        self.fd = fd
        self.path = path

    @classmethod
    def open(cls, path: Path) -> Folder:
        """Open the directory at `path`; links in it are followed, as the user chose the path."""
        return cls(os.open(path, _DIRECTORY), str(path))

    def duplicate(self) -> Folder:
        """Return the same directory, opened again; the caller closes both."""
        return Folder(os.dup(self.fd), self.path)

    def enter(self, name: str) -> Folder:
        """Open the directory `name`; raise `UnsafePathError` if it is not a directory."""
        path = f"{self.path}/{name}"
        try:
            return Folder(os.open(name, _DIRECTORY | os.O_NOFOLLOW, dir_fd=self.fd), path)
        except OSError as error:
            if error.errno not in _NO_DIRECTORY:
                raise
            why = os.strerror(error.errno)
            raise _planted(path, "the directory created there", why) from error

    def make(self, name: str, mode: int = DIRECTORY_MODE) -> Folder:
        """Make and open the new directory `name`."""
        with self._new(name):
            os.mkdir(name, 0o700, dir_fd=self.fd)
        made = self.enter(name)
        os.fchmod(made.fd, mode)  # independent of the umask
        return made

    def create(self, name: str, mode: int = FILE_MODE) -> int:
        """Make the new file `name`; return its descriptor, open for writing."""
        with self._new(name):
            fd = os.open(name, _NEW_FILE, 0o600, dir_fd=self.fd)
        os.fchmod(fd, mode)
        return fd

    def hard_link(self, path: Path, name: str) -> None:
        """Make `name` a hard link of the file at `path`."""
        with self._new(name):
            os.link(os.path.realpath(path), name, dst_dir_fd=self.fd, follow_symlinks=False)

    def symbolic_link(self, path: Path, name: str) -> None:
        """Make `name` a symbolic link to `path`."""
        with self._new(name):
            os.symlink(os.path.abspath(path), name, dir_fd=self.fd)

    def check_holds(self, name: str, folder: Folder) -> None:
        """Raise `UnsafePathError` unless `name` still is the directory `folder`."""
        status = self.status(name)
        if status is None or not os.path.samestat(status, os.fstat(folder.fd)):
            raise _planted(f"{self.path}/{name}", "the directory created there", "another")

    def status(self, name: str) -> os.stat_result | None:
        """Return the status of `name`, without following a link; None if it does not exist."""
        try:
            return os.stat(name, dir_fd=self.fd, follow_symlinks=False)
        except FileNotFoundError:
            return None

    @contextmanager
    def _new(self, name: str) -> Iterator[None]:
        try:
            yield
        except FileExistsError as error:
            raise _planted(f"{self.path}/{name}", "no entry", "an existing entry") from error

    def close(self) -> None:
        """Close the directory."""
        os.close(self.fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _planted(path: str, expected: str, got: str) -> UnsafePathError:
    return UnsafePathError(
        f"{path}: another process changed it: expected {expected}, got {got}",
        expected=expected,
        got=got,
        hint="unpack into a directory that nobody else writes to",
    )


#: Maximum number of components of a path, since tools that recurse into a bundle have limits.
MAX_DEPTH = 64


@dataclass(frozen=True, slots=True)
class _Node:
    path: str
    is_file: bool
    source: str


class Tree:
    """The files and directories made below `root`; `source` names a path's origin in errors."""

    def __init__(self, root: Folder) -> None:
        self._root = root
        self._nodes: dict[str, _Node] = {}
        #: Total bytes of all paths, which are kept in memory.
        self.path_bytes = 0

    def __len__(self) -> int:
        """Return the number of files and directories."""
        return len(self._nodes)

    def free_bytes(self) -> int:
        """Return the number of bytes available on the file system."""
        disk = os.statvfs(self._root.fd)
        return disk.f_bavail * disk.f_frsize

    def add_directory(self, path: str, source: str) -> None:
        """Make the directory `path` and its parents, unless they exist.

        Raises `UnsafePathError` for an existing file or another spelling of the same path.
        """
        self._walk(_parts(path, source), source).close()

    @contextmanager
    def place(self, path: str, source: str) -> Iterator[tuple[Folder, str]]:
        """Yield the directory and the name for the new file `path`.

        Raises `UnsafePathError` if `path` is unsafe, exists, or exists in another spelling.
        """
        *parents, name = _parts(path, source)
        with self._walk(parents, source) as folder:
            if node := self._nodes.get(folded(path)):
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
            f"{path!r} and {node.path!r} of {node.source} are the same path on file systems that "
            "ignore case or the composition of accents"
        )
    elif node.is_file and is_file:
        problem = f"{path!r} already exists, from {node.source}"
    else:
        here, there = ("a file", "a directory") if is_file else ("a directory", "a file")
        problem = f"{path!r} is {here} here and {there} in {node.source}"
    return UnsafePathError(f"{source}: {problem}", expected="different paths", got=path)


_TAKEN = frozenset({errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR})
# (function, flag) that exchange two names in one step.
_EXCHANGE = {"linux": ("renameat2", 2), "darwin": ("renameatx_np", 2)}


def absolute(directory: Path) -> Path:
    """Return the absolute path, with links resolved in all but the last component.

    Raises `UsageError` for the root of the file system.
    """
    if directory.name in ("", ".."):
        directory = Path(os.path.realpath(directory))
    if not directory.name:
        raise UsageError(f"{directory} cannot be replaced", hint="name a new directory")
    return Path(os.path.realpath(directory.parent)) / directory.name


@contextmanager
def new_directory(directory: Path, *, overwrite: bool) -> Iterator[Folder]:
    """Yield an empty directory that is renamed to `directory` at the end of the block.

    After an exception, it is removed with its content and with parents that were made for it. An
    existing directory that is not empty is replaced only if `overwrite`, and removed after that.
    Raises `ConflictError`, `UsageError`.
    """
    directory = absolute(directory)
    missing = _missing(directory.parent)
    temporary = f".modelpack-{secrets.token_hex(8)}.partial"
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        with Folder.open(directory.parent) as parent:
            _check_free(parent, directory, overwrite=overwrite)
            try:
                with parent.make(temporary, 0o700) as folder:
                    yield folder
                    os.fchmod(folder.fd, DIRECTORY_MODE)
                replaced = _publish(parent, temporary, directory, overwrite=overwrite)
            except BaseException:
                shutil.rmtree(temporary, ignore_errors=True, dir_fd=parent.fd)
                raise
            if replaced:
                shutil.rmtree(temporary, dir_fd=parent.fd)
    except BaseException:
        for path in missing:
            with suppress(OSError):  # it was not made, or another process uses it
                os.rmdir(path)
        raise


def _missing(path: Path) -> list[Path]:
    """Return those of the path and its parents that do not exist, the deepest first."""
    return list(takewhile(lambda parent: not parent.exists(), (path, *path.parents)))


def _check_free(parent: Folder, directory: Path, *, overwrite: bool) -> None:
    status = parent.status(directory.name)
    if status is None:
        return
    if not stat.S_ISDIR(status.st_mode):
        raise ConflictError(
            f"{directory} exists and is not a directory",
            hint="name a new directory or, for a symbolic link, its target",
        )
    if any(os.path.samestat(status, here) for here in _current_directories()):
        raise UsageError(
            f"{directory} contains the current directory and cannot be replaced",
            hint="name a directory inside the current one, or change to another directory first",
        )
    with parent.enter(directory.name) as existing:
        if os.listdir(existing.fd) and not overwrite:
            raise _taken(directory)


def _current_directories() -> list[os.stat_result]:
    """Return the status of the current directory and of those of its parents that can be read."""
    found = [os.stat(".")]
    with suppress(FileNotFoundError):  # it was deleted
        for parent in Path.cwd().parents:
            with suppress(OSError):
                found.append(parent.stat())
    return found


def _publish(parent: Folder, temporary: str, directory: Path, *, overwrite: bool) -> bool:
    """Rename `temporary`; return whether the old directory is now called `temporary`."""
    try:
        # This replaces an empty directory.
        _rename(parent, temporary, directory.name)
    except OSError as error:
        if error.errno not in _TAKEN:
            raise
        status = parent.status(directory.name)
        if not overwrite or status is None or not stat.S_ISDIR(status.st_mode):
            raise _taken(directory) from error
        _exchange(parent, temporary, directory.name)
        return True
    return False


def _exchange(parent: Folder, temporary: str, name: str) -> None:
    """Swap the two names, in one step if the system can."""
    import ctypes

    function, flag = _EXCHANGE.get(sys.platform, ("", 0))
    swap = getattr(ctypes.CDLL(None), function, None)
    if swap and not swap(parent.fd, os.fsencode(temporary), parent.fd, os.fsencode(name), flag):
        return
    aside = f"{temporary}.old"
    _rename(parent, name, aside)
    try:
        _rename(parent, temporary, name)
    except BaseException:
        _rename(parent, aside, name)
        raise
    _rename(parent, aside, temporary)


def _rename(parent: Folder, old: str, new: str) -> None:
    os.rename(old, new, src_dir_fd=parent.fd, dst_dir_fd=parent.fd)


def _taken(directory: Path) -> ConflictError:
    return ConflictError(
        f"{directory} exists and is not empty",
        hint="name a new directory, or give --force to replace everything in this one",
    )
