"""LayerFile: one file that becomes one layer, looked at but not read."""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

from modelpack.errors import PackagingError
from modelpack.layer_metadata import LayerMetadata
from modelpack.packaging.classify import WEIGHT_TYPES
from modelpack.packaging.request import PackageRequest
from modelpack.packaging.times import local_time, source_time
from modelpack.paths import path_problem

_KINDS = (
    (stat.S_ISDIR, "a directory"),
    (stat.S_ISFIFO, "a FIFO"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
    (stat.S_ISREG, "a file"),
)
_LFS_POINTER = b"version https://git-lfs.github.com/spec/"
_LFS_POINTER_MAX_BYTES = 1024


@dataclass(frozen=True, slots=True)
class LayerFile:
    """A file, the layer that it becomes, and what tells later whether it changed.

    `media_type` is Docker's; `filepath` is the slash path that the layer is annotated with.
    """

    path: Path
    media_type: str
    filepath: str
    metadata: LayerMetadata
    device: int
    inode: int
    mtime_ns: int
    size: int

    def with_type(self, media_type: str) -> LayerFile:
        """Return the same file as a layer of another type."""
        return replace(self, media_type=media_type)


@dataclass(frozen=True, slots=True)
class LayerFiles:
    """Makes `LayerFile`s: decides which modes and times are written.

    Without `preserve`, nothing that a copy, a `touch` or an umask changes gets into a layer.
    """

    preserve: bool
    mtime: str

    @classmethod
    def of(cls, request: PackageRequest, environ: Mapping[str, str]) -> Self:
        """Return the maker that `request` asks for."""
        return cls(request.preserve, source_time(environ))

    def at(self, path: Path, media_type: str, filepath: str | None = None) -> LayerFile:
        """Return the regular file `path` as a layer; a link is followed, and keeps its name.

        `filepath` is the path inside the model, the base name by default. Raises `PackagingError`
        for anything that is no readable regular file, or has a name that no model can hold.
        """
        filepath = path.name if filepath is None else filepath
        self._check_name(path, filepath)
        # A weight's own parser says more about what it is instead.
        status = opened_status(path, refuse_pointer=media_type not in WEIGHT_TYPES)
        metadata = LayerMetadata(
            name=filepath.rpartition("/")[2],
            mode=self._mode(status.st_mode),
            size=status.st_size,
            mtime=self._mtime(path, status.st_mtime_ns),
        )
        return LayerFile(
            path,
            media_type,
            filepath,
            metadata,
            status.st_dev,
            status.st_ino,
            status.st_mtime_ns,
            status.st_size,
        )

    def _check_name(self, path: Path, filepath: str) -> None:
        if self.preserve:
            return  # Docker Model Runner takes any name
        problem = path_problem(filepath)
        try:
            filepath.encode()
        except UnicodeEncodeError:
            problem = "it is not UTF-8"
        if problem:
            raise PackagingError(
                f"{shown(path)}: a model cannot hold a file of this name: {problem}",
                hint="rename the file",
            )

    def _mode(self, mode: int) -> int:
        if self.preserve:
            return mode & 0o777
        return 0o755 if mode & 0o111 else 0o644

    def _mtime(self, path: Path, nanoseconds: int) -> str:
        if not self.preserve:
            return self.mtime
        try:
            return local_time(nanoseconds)
        except ValueError as error:
            raise PackagingError(
                f"{shown(path)}: its modification time cannot be written: {error}"
            ) from None


def expanded(path: Path) -> Path:
    """Return `path` with `~` replaced by the home directory."""
    try:
        return path.expanduser()
    except RuntimeError as error:
        raise PackagingError(f"{shown(path)}: {error}") from None


def status_of(path: Path) -> os.stat_result:
    """Return the status of what `path` leads to; raise `PackagingError` if that is nothing."""
    try:
        return path.stat()
    except (OSError, ValueError) as error:
        raise unreadable(path, error) from None


def opened_status(path: Path, *, refuse_pointer: bool = False) -> os.stat_result:
    """Return the status of the regular file `path`, having made sure that it can be read.

    With `refuse_pointer`, a Git LFS pointer is an error too.
    """
    check_regular(path, status_of(path))
    try:
        # Should a FIFO have come in between, this does not wait for a writer.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise unreadable(path, error) from None
    try:
        status = os.fstat(descriptor)
        check_regular(path, status)
        if refuse_pointer and status.st_size <= _LFS_POINTER_MAX_BYTES:
            _check_no_pointer(path, os.read(descriptor, len(_LFS_POINTER)))
        return status
    finally:
        os.close(descriptor)


def head_of(path: Path, count: int) -> bytes:
    """Return the first bytes of the file `path`; raise `PackagingError` if it cannot be read."""
    try:
        with path.open("rb") as stream:
            return stream.read(count)
    except OSError as error:
        raise unreadable(path, error) from None


def check_regular(path: Path, status: os.stat_result) -> None:
    """Raise `PackagingError`, saying what `path` is, unless it is a regular file."""
    if not stat.S_ISREG(status.st_mode):
        raise PackagingError(f"{shown(path)} is {kind_of_file(status)}, expected a regular file")


def kind_of_file(status: os.stat_result) -> str:
    """Return what a path that is no regular file is, with its article."""
    return next((kind for is_kind, kind in _KINDS if is_kind(status.st_mode)), "no regular file")


def unreadable(path: Path, error: OSError | ValueError) -> PackagingError:
    """Return the error for a path that the system refuses to open or list."""
    if isinstance(error, FileNotFoundError):
        if os.path.islink(path):
            return PackagingError(
                f"{shown(path)} links to {shown(os.readlink(path))}: no such file"
            )
        hint = None if path.is_absolute() else f"looked in {os.getcwd()}"
        return PackagingError(f"{shown(path)}: no such file or directory", hint=hint)
    reason = error.strerror if isinstance(error, OSError) else str(error)
    return PackagingError(f"{shown(path)}: cannot be read: {reason}")


def shown(path: str | os.PathLike[str]) -> str:
    """Return `path` for people: what a terminal could trip over is escaped."""
    text = os.fspath(path).encode(errors="surrogateescape").decode(errors="backslashreplace")
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def _check_no_pointer(path: Path, head: bytes) -> None:
    if head == _LFS_POINTER:
        raise PackagingError(
            f"{shown(path)} is a Git LFS pointer, not the file itself",
            hint="run `git lfs install && git lfs pull` in that checkout",
        )
