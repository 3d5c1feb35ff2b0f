"""Read tar archives as a stream of files and directories, and unpack archive layers into a tree.

Every archive that Modelpack reads goes through `TarReader`: layers, image layouts and the archives
of `docker model package`. `tarfile` is only used for writing: it reads extended headers of any
length into memory, expands sparse files to any size and tolerates damage. `extract` unpacks one
layer within `TarLimits`.

Formats: POSIX.1-1988 ustar, POSIX.1-2001 pax and GNU, as tar, Go and Python write them. Links,
devices, FIFOs and sparse files are errors; they are never skipped.
"""

from __future__ import annotations

import gzip
import os
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Final, NoReturn, Protocol

from modelpack.artifacts.digest import Digest, new_hasher
from modelpack.artifacts.model import Archive, ModelFile
from modelpack.artifacts.paths import checked_path
from modelpack.bundles.directory import EXECUTABLE_MODE, FILE_MODE, Tree
from modelpack.bundles.links import open_blob
from modelpack.errors import (
    FormatError,
    IntegrityError,
    StorageFullError,
    UnsafePathError,
    UnsupportedError,
)
from modelpack.progress import Action, Progress
from modelpack.storage import Watch

if TYPE_CHECKING:
    from hashlib import _Hash

BLOCK = 512
_ZEROS = bytes(BLOCK)
_FILES = (b"0", b"\0", b"7")  # "7" is a contiguous file, here an ordinary one
_DIRECTORY = b"5"
_PAX, _PAX_GLOBAL, _GNU_NAME, _GNU_LINK = b"x", b"g", b"L", b"K"
_EXTENSIONS = (_PAX, _PAX_GLOBAL, _GNU_NAME, _GNU_LINK)
_REFUSED = {
    b"1": "a hard link",
    b"2": "a symbolic link",
    b"3": "a character device",
    b"4": "a block device",
    b"6": "a FIFO",
}
_OCTAL = re.compile(rb"[ \0]*([0-7]*)[ \0]*\Z")
_PAX_LENGTH = re.compile(rb"([1-9][0-9]{0,9}) ")
_DECIMAL = re.compile(rb"[0-9]{1,19}\Z")
_CHUNK = 256 * 1024
# The largest file size that any system supports.
_MAX_FILE_BYTES = (1 << 63) - 1
# Extended records that change how an entry is read. Other records (times, owners, comments) are not
# stored, so that a header full of records needs no memory beyond its bytes.
_USED_RECORDS = ("path", "size")
# Records of sparse files: GNU tar 0.0 to 1.0, star, Solaris tar.
_SPARSE_RECORDS = ("GNU.sparse.", "SCHILY.realsize", "SUN.holesdata")


class Readable(Protocol):
    """A stream of the archive's bytes."""

    def read(self, size: int, /) -> bytes:
        """Return up to `size` bytes, b"" at the end."""
        ...


#: How gzip, zstd and xz start; none is UTF-8, as the name of a first file is.
_COMPRESSED: Final = (b"\x1f\x8b", b"\x28\xb5\x2f\xfd", b"\xfd7zXZ")


@dataclass(frozen=True, slots=True)
class TarEntry:
    """A file or a directory, with its unchecked `name` in the archive; `size` is in bytes."""

    name: str
    is_directory: bool
    size: int
    executable: bool


@dataclass(frozen=True, slots=True)
class _Header:
    name: bytes
    kind: bytes
    size: int
    mode: int


class TarReader:
    """Iterates over the entries of the archive in `stream`; `what` names it in errors.

    Raises `FormatError` for a damaged archive, `UnsafePathError` for a link or a device, and
    `UnsupportedError` for other kinds of entries. `max_header_bytes` limits the headers of one
    entry.
    """

    def __init__(self, stream: Readable, what: str, *, max_header_bytes: int) -> None:
        self._stream = stream
        self._what = what
        self._max_header_bytes = max_header_bytes
        self._offset = 0  # in the uncompressed archive
        self._left = 0  # of the data of the current entry
        self._padding = 0

    def __iter__(self) -> Iterator[TarEntry]:
        """Yield each entry; skip data that the caller has not read."""
        while True:
            self._skip(self._left + self._padding)
            entry = self._next_entry()
            if entry is None:
                return
            yield entry

    def read(self, size: int) -> bytes:
        """Return up to `size` bytes of the current entry's data, b"" at its end."""
        wanted = min(size, self._left)
        if not wanted:
            return b""
        data = self._stream.read(wanted)
        if not data:
            self._fail(f"it ends {self._left} bytes before the end of a file")
        self._offset += len(data)
        self._left -= len(data)
        return data

    def _next_entry(self) -> TarEntry | None:
        records: dict[str, bytes] = {}
        used = 0
        while True:
            header = self._header()
            if header is None:
                if records:
                    self._fail("it ends after an extended header")
                return None
            if header.kind not in _EXTENSIONS:
                return self._entry(header, records)
            used += BLOCK + header.size
            if used > self._max_header_bytes:
                self._fail(
                    f"the headers of one entry take more than {self._max_header_bytes} bytes"
                )
            payload = self._exactly(header.size)
            self._skip(-header.size % BLOCK)
            records |= self._extension(header.kind, payload)

    def _header(self) -> _Header | None:
        block = self._exactly(BLOCK)
        if block == _ZEROS:  # the caller reads the second zero block and the padding
            return None
        blank = block[:148] + b" " * 8 + block[156:]
        wrong = self._number(block[148:156], "checksum") - sum(blank)
        if wrong and wrong != -256 * sum(byte > 127 for byte in blank):  # old tars sum signed bytes
            self._fail("a header has the wrong checksum", at=self._offset - BLOCK)
        name = _text(block[:100])
        if block[257:263] == b"ustar\0" and block[345] != 0:
            name = _text(block[345:500]) + b"/" + name
        size = self._number(block[124:136], "size")
        return _Header(name, block[156:157], size, self._number(block[100:108], "mode"))

    def _entry(self, header: _Header, records: Mapping[str, bytes]) -> TarEntry:
        name = self._decoded(records.get("path", header.name))
        self._check_kind(name, header.kind, records)
        size = header.size
        if "size" in records:
            if not _DECIMAL.match(records["size"]):
                self._fail(f"{name!r} has the size {records['size'][:40]!r}")
            size = int(records["size"])
        if size > _MAX_FILE_BYTES:
            self._fail(f"{name[:200]!r} has the size {size}")
        is_directory = header.kind == _DIRECTORY or name.endswith("/")
        if is_directory and size:
            self._fail(f"the directory {name!r} has {size} bytes of data")
        self._left, self._padding = size, -size % BLOCK
        return TarEntry(name, is_directory, size, bool(header.mode & 0o111))

    def _check_kind(self, name: str, kind: bytes, records: Mapping[str, bytes]) -> None:
        shown = repr(name[:200])
        if kind in _REFUSED:
            raise UnsafePathError(
                f"{self._what}: {shown} is {_REFUSED[kind]}, "
                "and only files and directories are unpacked",
                expected="a file or a directory",
                got=_REFUSED[kind],
            )
        if kind == b"S" or any(key.startswith(_SPARSE_RECORDS) for key in records):
            raise UnsupportedError(f"{shown} is a sparse file", path=self._what)
        if kind not in (*_FILES, _DIRECTORY):
            raise UnsupportedError(f"{shown} has the unknown entry type {kind!r}", path=self._what)

    def _extension(self, kind: bytes, payload: bytes) -> dict[str, bytes]:
        """Return the records of an extended header that apply to the next entry."""
        if kind == _GNU_NAME:
            return {"path": _text(payload)}
        if kind == _GNU_LINK:
            return {}  # the next entry is a link, which is rejected
        records = self._pax_records(payload)
        if kind == _PAX:
            return records
        for key in records:
            if key in _USED_RECORDS or key.startswith(_SPARSE_RECORDS):
                raise UnsupportedError(
                    f"a global header sets {key!r} for all entries", path=self._what
                )
        return {}

    def _pax_records(self, payload: bytes) -> dict[str, bytes]:
        """Return the records that are used, each `"%d %s=%s\\n" % (its length, key, value)`."""
        records: dict[str, bytes] = {}
        position = 0
        while position < len(payload):
            length = _PAX_LENGTH.match(payload, position)
            end = position + int(length[1]) if length else 0
            record = payload[length.end() : end] if length else b""
            key, equals, value = record.partition(b"=")
            if not (length and key and equals and record.endswith(b"\n") and end <= len(payload)):
                self._fail("an extended header does not parse")
            name = self._decoded(key)
            if name in _USED_RECORDS or name.startswith(_SPARSE_RECORDS):
                records[name] = value[:-1]
            position = end
        return records

    def _number(self, field: bytes, name: str) -> int:
        if field[0] == 0x80:  # GNU: base 256 for large numbers
            return int.from_bytes(field[1:], "big")
        digits = _OCTAL.match(field)
        if digits is None:
            self._fail(f"a header has {field!r} as its {name}", at=self._offset - BLOCK)
        return int(digits[1] or b"0", 8)

    def _decoded(self, raw: bytes) -> str:
        try:
            return raw.decode()
        except UnicodeDecodeError:
            self._fail(f"the name {raw[:200]!r} is not UTF-8")

    def _exactly(self, size: int) -> bytes:
        parts = []
        while size:
            data = self._stream.read(size)
            if not data:
                self._fail("it ends inside a header, or without the blocks that mark its end")
            if not self._offset and data.startswith(_COMPRESSED):
                raise FormatError("is compressed: decompress it first", path=self._what)
            self._offset += len(data)
            size -= len(data)
            parts.append(data)
        return b"".join(parts)

    def _skip(self, size: int) -> None:
        while size:
            data = self._stream.read(min(size, _CHUNK))
            if not data:
                self._fail(f"it ends {size} bytes before the end of a file")
            self._offset += len(data)
            size -= len(data)
        self._left = self._padding = 0

    def _fail(self, problem: str, *, at: int | None = None) -> NoReturn:
        offset = self._offset if at is None else at
        raise FormatError(f"is not a valid tar archive: {problem}", path=self._what, offset=offset)


def _text(field: bytes) -> bytes:
    return field.partition(b"\0")[0]


@dataclass(frozen=True, slots=True)
class TarLimits:
    """Limits of archives; the defaults are far above what models need.

    An archive may expand to `ratio` times the size of its blob, or to `free_bytes` if that is
    more, but never beyond `max_bytes`. A zstd frame may use `max_window_bytes` of memory.

    All archives of a model together have this budget for the sum of their blobs. They share
    `max_entries`, the number of files and directories including those implied by a path, and
    `max_path_bytes`, the bytes of all paths.
    """

    max_bytes: int = 1 << 40
    ratio: int = 200
    free_bytes: int = 64 << 20
    max_entries: int = 100_000
    max_path_bytes: int = 8 << 20
    max_header_bytes: int = 1 << 20
    max_window_bytes: int = 128 << 20  # the default limit of the zstd program

    def budget(self, blob_size: int) -> int:
        """Return the number of bytes that a blob of this size may expand to."""
        return min(self.max_bytes, max(self.free_bytes, self.ratio * blob_size))


class Allowance:
    """The remaining budget of a model's archives, whose blobs have these `sizes`.

    `others` is the number of the model's files and directories that are not from archives.
    """

    def __init__(self, limits: TarLimits, sizes: Iterable[int], *, others: int) -> None:
        self.limits = limits
        self.others = others
        self._left = limits.budget(sum(sizes))

    def of(self, blob_size: int) -> int:
        """Return the number of bytes that the next archive may expand to."""
        return min(self._left, self.limits.budget(blob_size))

    def spend(self, count: int) -> None:
        """Subtract the bytes that an archive expanded to."""
        self._left -= count


class Content:
    """A stream of an archive's decompressed bytes; `what` names the archive in errors.

    The decompressor's window limits the memory, whatever the blob contains.
    """

    def __init__(
        self,
        blob: BinaryIO,
        archive: Archive,
        what: str,
        *,
        limit: int,
        max_window_bytes: int,
        hasher: _Hash | None = None,
        on_read: Callable[[], None],
    ) -> None:
        self._stream, self._errors = _decompressed(blob, archive, max_window_bytes)
        self._what = what
        self._limit = limit
        self._hasher = hasher
        self._on_read = on_read
        #: Number of bytes read.
        self.count = 0

    def read(self, size: int, /) -> bytes:
        """Return up to `size` bytes, b"" at the end.

        Raises `FormatError` if they do not decompress, `IntegrityError` beyond the limit.
        """
        try:
            # One byte more than the limit is enough to detect an excess.
            data = self._stream.read(min(size, self._limit - self.count + 1))
        except self._errors as error:
            raise FormatError(
                f"does not decompress: {error}", path=self._what, offset=self.count
            ) from error
        self.count += len(data)
        if self.count > self._limit:
            raise over_limit(self._what, f"{self._limit} bytes")
        if self._hasher:
            self._hasher.update(data)
        self._on_read()
        return data


def over_limit(what: str, limit: str) -> IntegrityError:
    """Return the error for an archive that expands beyond its limit."""
    return IntegrityError(
        f"{what}: expands to more than {limit}, the limit for an archive of its size",
        expected=f"at most {limit}",
        got="more",
        hint="do not use this model: the archive looks like a decompression bomb",
    )


def _decompressed(
    blob: BinaryIO, archive: Archive, max_window_bytes: int
) -> tuple[Readable, tuple[type[Exception], ...]]:
    """Return the tar stream in `blob`, and the exceptions that damaged data raises."""
    match archive:
        case Archive.TAR:
            return blob, ()
        case Archive.TAR_GZIP:
            errors = (EOFError, zlib.error, gzip.BadGzipFile)
            return gzip.GzipFile(fileobj=blob, mode="rb"), errors
        case Archive.TAR_ZSTD:
            # The zstd reader treats the end of a truncated frame as the end of the content. The
            # tar reader then detects that the end blocks are missing.
            import zstandard

            decompressor = zstandard.ZstdDecompressor(max_window_size=max_window_bytes)
            stream = decompressor.stream_reader(blob, read_across_frames=True, closefd=False)
            return stream, (zstandard.ZstdError,)


_REPORT_BYTES = 4 * 1024 * 1024
# Bytes to leave free on the disk for other programs.
_RESERVE_BYTES = 64 * 1024 * 1024


def extract(
    layer: ModelFile, path: Path, tree: Tree, allowance: Allowance, watch: Watch, what: str
) -> tuple[tuple[str, Digest], ...]:
    """Unpack the archive at `path` into `tree`; return the path and digest of each file.

    Owners, times and all permissions except the executable bit are ignored. Raises `FormatError`
    for a damaged archive, `UnsafePathError` for a link, a device, or an unsafe or duplicate path,
    `UnsupportedError` for a sparse file, `IntegrityError` beyond a limit, `StorageFullError` if
    the disk is full, `DigestMismatchError` if the content does not match `layer.diff_id`.
    """
    assert layer.archive is not None, f"{what} is one raw file"
    hasher = layer.diff_id.hasher() if layer.diff_id else None
    digest, size = layer.descriptor.digest, layer.descriptor.size
    limit = allowance.of(size)
    reported = 0
    with open_blob(path, layer.descriptor) as blob:

        def on_read() -> None:
            nonlocal reported
            watch.stop.check()
            position = blob.tell()
            if position - reported >= _REPORT_BYTES and position < size:
                reported = position
                watch.report(Progress(Action.UNPACK, what, digest, position, size))

        content = Content(
            blob,
            layer.archive,
            what,
            limit=limit,
            max_window_bytes=allowance.limits.max_window_bytes,
            hasher=hasher,
            on_read=on_read,
        )
        reader = TarReader(content, what, max_header_bytes=allowance.limits.max_header_bytes)
        files = _unpack(reader, tree, allowance, limit, what)
        while content.read(_CHUNK):
            pass  # the digest covers the padding, too
    allowance.spend(content.count)
    if layer.diff_id and hasher:
        layer.diff_id.check_equal(Digest.of_hasher(hasher), f"{what}, uncompressed")
    watch.report(Progress(Action.UNPACK, what, digest, size, size))
    return files


def _unpack(
    reader: TarReader, tree: Tree, allowance: Allowance, limit: int, what: str
) -> tuple[tuple[str, Digest], ...]:
    files: list[tuple[str, Digest]] = []
    limits = allowance.limits
    budget, room = limit, tree.free_bytes() - _RESERVE_BYTES
    for number, entry in enumerate(reader, start=1):
        path = _member_path(entry)
        # The archive may claim a wrong size, but no more bytes than that are read.
        if entry.size > budget:
            raise over_limit(what, f"{limit} bytes")
        if entry.size > room:
            raise StorageFullError(
                f"not enough space to unpack {entry.name[:200]!r} of {what}: "
                f"need {entry.size} bytes, have {max(room, 0)}",
                needed=entry.size,
                available=max(room, 0),
                hint="free some space and run the same command again",
            )
        budget -= entry.size
        room -= entry.size
        if not entry.is_directory:
            files.append((path, _write_file(path, entry, reader, tree, what)))
        elif path:
            tree.add_directory(path, what)
        if max(number, len(tree) - allowance.others) > limits.max_entries:
            raise over_limit(what, f"{limits.max_entries} files and directories")
        if tree.path_bytes > limits.max_path_bytes:
            raise over_limit(what, f"{limits.max_path_bytes} bytes of paths")
    return tuple(files)


def _member_path(entry: TarEntry) -> str:
    """Return the checked path of an entry, "" for the root directory of the archive."""
    path = entry.name
    while path.startswith("./"):  # `tar -c .` writes such names
        path = path[2:]
    if entry.is_directory:
        if path in ("", "."):
            return ""
        path = path.removesuffix("/")
    return checked_path(path)


def _write_file(path: str, entry: TarEntry, reader: TarReader, tree: Tree, what: str) -> Digest:
    mode = EXECUTABLE_MODE if entry.executable else FILE_MODE
    hasher = new_hasher()
    with (
        tree.place(path, what) as (folder, name),
        os.fdopen(folder.create(name, mode), "wb") as target,
    ):
        while data := reader.read(_CHUNK):
            target.write(data)
            hasher.update(data)
    return Digest.of_hasher(hasher)
