"""The bytes of an archive layer before compression: counted, limited and hashed on the way."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, BinaryIO

from modelpack.errors import FormatError, IntegrityError
from modelpack.model import Archive
from modelpack.unpacking.tarstream import Readable

if TYPE_CHECKING:
    from hashlib import _Hash

_CHUNK = 256 * 1024


@dataclass(frozen=True, slots=True)
class TarLimits:
    """What an archive may cost; the defaults are far above what models need.

    An archive may expand to `ratio` times the size of its blob, or to `free_bytes` if that is
    more, but never beyond `max_bytes`. A zstd frame may ask for `max_window_bytes` of memory.

    All archives of a model together have that budget for the sum of their blobs, and share what
    follows: `max_entries` counts files and directories, those too that are only implied by a path,
    and `max_path_bytes` the bytes of their paths.
    """

    max_bytes: int = 1 << 40
    ratio: int = 200
    free_bytes: int = 64 << 20
    max_entries: int = 100_000
    max_path_bytes: int = 8 << 20
    max_header_bytes: int = 1 << 20
    max_window_bytes: int = 128 << 20  # what the zstd program takes without being asked twice

    def budget(self, blob_size: int) -> int:
        """Return how many bytes a blob of this size may expand to."""
        return min(self.max_bytes, max(self.free_bytes, self.ratio * blob_size))


class Allowance:
    """What the archives of one model may still expand to; `sizes` are those of their blobs.

    `others` files and directories of the model are not from archives.
    """

    def __init__(self, limits: TarLimits, sizes: Iterable[int], *, others: int) -> None:
        self.limits = limits
        self.others = others
        self._left = limits.budget(sum(sizes))

    def of(self, blob_size: int) -> int:
        """Return how many bytes the next archive may expand to."""
        return min(self._left, self.limits.budget(blob_size))

    def spend(self, count: int) -> None:
        """Count the bytes that an archive expanded to."""
        self._left -= count


class Content:
    """Reads an archive before compression; `what` names it in errors.

    Memory is bounded by the decompressor's window, whatever the blob holds.
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
        #: Bytes that were read.
        self.count = 0

    def read(self, size: int, /) -> bytes:
        """Return up to `size` bytes, none at the end.

        Raises `FormatError` if they do not decompress, `IntegrityError` beyond the limit.
        """
        try:
            # One byte more than the limit is enough to know.
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

    def drain(self) -> None:
        """Read to the end."""
        while self.read(_CHUNK):
            pass


def over_limit(what: str, limit: str) -> IntegrityError:
    """Return the error of an archive that expands to more than it may."""
    return IntegrityError(
        f"{what}: expands to more than {limit}, the limit for an archive of its size",
        expected=f"at most {limit}",
        got="more",
        hint="it looks like a decompression bomb",
    )


def _decompressed(
    blob: BinaryIO, archive: Archive, max_window_bytes: int
) -> tuple[Readable, tuple[type[Exception], ...]]:
    """Return the tar stream inside `blob`, and what reading it raises where it is damaged."""
    match archive:
        case Archive.TAR:
            return blob, ()
        case Archive.TAR_GZIP:
            errors = (EOFError, zlib.error, gzip.BadGzipFile)
            return gzip.GzipFile(fileobj=blob, mode="rb"), errors
        case Archive.TAR_ZSTD:
            # Its reader takes the end of a cut frame for the end of the content, which the
            # reader of the tar notices: the blocks that mark the end are not there.
            import zstandard

            decompressor = zstandard.ZstdDecompressor(max_window_size=max_window_bytes)
            stream = decompressor.stream_reader(blob, read_across_frames=True, closefd=False)
            return stream, (zstandard.ZstdError,)
