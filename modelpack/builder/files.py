"""The files of a directory as layers: walk the directory, check each file, describe its metadata.

`walk` yields the files of a directory, `LayerFiles` turns a file into a `LayerFile`, and
`LayerMetadata` is the annotation `org.cncf.model.file.metadata+json` of its layer (CNCF model-spec,
docs/annotations.md; Docker Model Runner writes the same object).
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, Self

from modelpack.artifacts.json_document import checked_time, decode_object, encode_text, kind_of
from modelpack.artifacts.paths import path_problem
from modelpack.builder.classify import WEIGHT_TYPES
from modelpack.builder.request import PackageRequest
from modelpack.builder.times import local_time, source_time
from modelpack.errors import ManifestError, PackagingError
from modelpack.formats.reader import LFS_POINTER

_WHAT = "layer file metadata"
# The largest values of Go's types in model-spec's FileMetadata.
_BYTE, _UINT32, _INT64 = 2**8 - 1, 2**32 - 1, 2**63 - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerMetadata:
    """Name, permission bits, size in bytes and modification time (RFC 3339) of a layer's file."""

    name: str
    mode: int
    uid: int = 0
    gid: int = 0
    size: int
    mtime: str
    typeflag: int = 0

    @classmethod
    def parse(cls, text: str) -> LayerMetadata:
        """Return the metadata in the annotation `text`, a JSON object; raise `ManifestError`."""
        value = decode_object(text.encode(errors="surrogatepass"), _WHAT)
        return cls(
            name=_field(value, "name", str),
            mode=_number(value, "mode", _UINT32),
            size=_number(value, "size", _INT64),
            mtime=checked_time(_field(value, "mtime", str), f"{_WHAT}: mtime"),
            uid=_number(value, "uid", _UINT32),
            gid=_number(value, "gid", _UINT32),
            typeflag=_number(value, "typeflag", _BYTE),
        )

    def encode(self) -> str:
        """Return the JSON text, with the fields in the order of Docker Model Runner."""
        return encode_text(asdict(self))


def _field(value: dict[str, Any], key: str, kind: type) -> Any:
    if key not in value:
        raise ManifestError(f"has no {key!r}", path=_WHAT)
    if type(value[key]) is not kind:
        wanted = "a string" if kind is str else "a whole number"
        raise ManifestError(f"{key!r} is {kind_of(value[key])}, expected {wanted}", path=_WHAT)
    return value[key]


def _number(value: dict[str, Any], key: str, largest: int) -> int:
    number: int = _field(value, key, int)
    if not 0 <= number <= largest:
        raise ManifestError(f"{key!r} is {number}, expected 0 to {largest}", path=_WHAT)
    return number


_KINDS = (
    (stat.S_ISDIR, "a directory"),
    (stat.S_ISFIFO, "a FIFO"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
    (stat.S_ISREG, "a file"),
)

_LFS_POINTER_MAX_BYTES = 1024


@dataclass(frozen=True, slots=True)
class LayerFile:
    """A file and its layer, with the size, time and inode that detect a later change.

    `media_type` is Docker's; `filepath` is the slash path in the layer's annotation.
    """

    path: Path
    media_type: str
    filepath: str
    metadata: LayerMetadata
    device: int
    inode: int
    mtime_ns: int
    size: int


@dataclass(frozen=True, slots=True)
class LayerFiles:
    """Creates `LayerFile`s, with the modes and times of the request.

    Without `preserve`, a layer does not depend on anything that a copy, `touch` or umask changes.
    """

    preserve: bool
    mtime: str

    @classmethod
    def of(cls, request: PackageRequest, environ: Mapping[str, str]) -> Self:
        """Return the `LayerFiles` for `request`."""
        return cls(request.preserve, source_time(environ))

    def at(self, path: Path, media_type: str, filepath: str | None = None) -> LayerFile:
        """Return the regular file `path` as a layer; a link is followed, but keeps its name.

        `filepath` is the path inside the model, by default the base name. Raises `PackagingError`
        if `path` is not a readable regular file, or if its name is not valid in a model.
        """
        filepath = path.name if filepath is None else filepath
        self._check_name(path, filepath)
        # For weights, the parser of the format reports a pointer with more details.
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
            return  # Docker Model Runner accepts any name
        problem = path_problem(filepath)
        try:
            filepath.encode()
        except UnicodeEncodeError:
            problem = "it is not UTF-8"
        if problem:
            raise PackagingError(
                f"{shown(path)}: the name is not valid in a model: {problem}",
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
    """Return the status of `path`, following links; raise `PackagingError` if there is none."""
    try:
        return path.stat()
    except (OSError, ValueError) as error:
        raise unreadable(path, error) from error


def opened_status(path: Path, *, refuse_pointer: bool = False) -> os.stat_result:
    """Open the regular file `path`, which checks that it can be read, and return its status.

    Raises `PackagingError` otherwise; with `refuse_pointer`, also for a Git LFS pointer.
    """
    check_regular(path, status_of(path))
    try:
        # O_NONBLOCK: if a FIFO has replaced the file, do not wait for a writer.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise unreadable(path, error) from error
    try:
        status = os.fstat(descriptor)
        check_regular(path, status)
        is_small = status.st_size <= _LFS_POINTER_MAX_BYTES
        if refuse_pointer and is_small and os.read(descriptor, len(LFS_POINTER)) == LFS_POINTER:
            raise PackagingError(
                f"{shown(path)} is a Git LFS pointer, not the file itself",
                hint="run `git lfs install && git lfs pull` in that checkout",
            )
        return status
    finally:
        os.close(descriptor)


def head_of(path: Path, count: int) -> bytes:
    """Return the first bytes of the file `path`; raise `PackagingError` if it cannot be read."""
    try:
        with path.open("rb") as stream:
            return stream.read(count)
    except OSError as error:
        raise unreadable(path, error) from error


def check_regular(path: Path, status: os.stat_result) -> None:
    """Raise `PackagingError` with the kind of `path` unless it is a regular file."""
    if not stat.S_ISREG(status.st_mode):
        raise PackagingError(f"{shown(path)} is {kind_of_file(status)}, expected a regular file")


def kind_of_file(status: os.stat_result) -> str:
    """Return the kind of a file with its article, for error messages."""
    kinds = (kind for is_kind, kind in _KINDS if is_kind(status.st_mode))
    return next(kinds, "not a regular file")


def unreadable(path: Path, error: OSError | ValueError) -> PackagingError:
    """Return the error for a path that cannot be opened or listed."""
    if isinstance(error, FileNotFoundError):
        if os.path.islink(path):
            return PackagingError(
                f"{shown(path)} links to {shown(os.readlink(path))}: no such file"
            )
        hint = None if path.is_absolute() else f"check the path, relative to {os.getcwd()}"
        return PackagingError(f"{shown(path)}: no such file or directory", hint=hint)
    reason = error.strerror if isinstance(error, OSError) else str(error)
    return PackagingError(f"{shown(path)}: cannot be read: {reason}")


def shown(path: str | os.PathLike[str]) -> str:
    """Return `path` for a message, with unprintable characters escaped."""
    text = os.fspath(path).encode(errors="surrogateescape").decode(errors="backslashreplace")
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def _check_link(link: str, allowed: Iterable[str]) -> None:
    """Raise `PackagingError` unless the link's target is in one of the real paths `allowed`."""
    try:
        target = os.path.realpath(link, strict=True)
    except OSError as error:
        raise PackagingError(
            f"{shown(link)} is a symbolic link to {shown(os.readlink(link))}, which "
            f"cannot be followed: {error.strerror}"
        ) from None
    if not any(Path(target).is_relative_to(place) for place in allowed):
        raise PackagingError(
            f"{shown(link)} is a symbolic link to {shown(target)}, outside the directory",
            hint="if that file belongs to the model, use --follow-symlinks, or copy it here",
        )


def hub_blobs(real: str) -> str | None:
    """Return the blobs directory of the Hugging Face cache repository that contains `real`.

    The result is None if the real path `real` is not in such a cache.
    """
    parts = Path(real).parts
    for i in range(len(parts) - 2, 0, -1):
        if parts[i] == "snapshots" and parts[i - 1].startswith("models--"):
            return os.path.join(*parts[:i], "blobs")
    return None


#: A limit, since links to directories can multiply without end; a manifest has room for fewer.
MAX_ENTRIES: Final = 100_000


@dataclass(frozen=True, slots=True)
class Skipped:
    """An entry left out of a model; `path` is relative to the packaged directory."""

    path: str
    reason: str


@dataclass(frozen=True, slots=True)
class Found:
    """A regular file; `filepath` is its slash path relative to the packaged directory."""

    path: Path
    filepath: str


def walk(root: Path, *, follow_symlinks: bool) -> Iterator[Found | Skipped]:
    """Yield the files of the directory `root` and the skipped entries, in the order of layers.

    Raises `PackagingError` with the path for entries that cannot be read, for links that must not
    or cannot be followed, and for entries that are neither files nor directories.
    """
    real = os.path.realpath(root)
    blobs = hub_blobs(real)
    allowed = (os.sep,) if follow_symlinks else (real,) if blobs is None else (real, blobs)
    return _Walk(root, allowed).run()


class _Walk:
    def __init__(self, root: Path, allowed: tuple[str, ...]) -> None:
        self._root = root
        self._allowed = allowed
        # The open directories from the root down: one that occurs twice is a loop. This is a stack
        # instead of recursion, because paths can be deeper than Python's call stack.
        self._open: list[tuple[str, Iterator[os.DirEntry[str]], tuple[int, int]]] = []

    def run(self) -> Iterator[Found | Skipped]:
        self._descend(str(self._root), "")
        count = 0
        while self._open:
            prefix, entries, _ = self._open[-1]
            entry = next(entries, None)
            if entry is None:
                self._open.pop()
                continue
            count += 1
            if count > MAX_ENTRIES:
                raise PackagingError(f"{shown(self._root)} has more than {MAX_ENTRIES} entries")
            found = self._look(entry, prefix + entry.name)
            if found is not None:
                yield found

    def _look(self, entry: os.DirEntry[str], relative: str) -> Found | Skipped | None:
        if entry.name.startswith("."):
            return Skipped(relative, "its name starts with a dot")
        try:
            if entry.is_symlink():
                _check_link(entry.path, self._allowed)
            status = entry.stat()
        except OSError as error:
            raise unreadable(Path(entry.path), error) from error
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
            raise unreadable(Path(path), error) from error
        identity = (status.st_dev, status.st_ino)
        if any(identity == above for _, _, above in self._open):
            raise PackagingError(
                f"{shown(path)} is a symbolic link to {shown(os.path.realpath(path))}, a directory "
                "above it: following it would never end"
            )
        self._open.append((prefix, iter(entries), identity))
