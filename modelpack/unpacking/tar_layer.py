"""TarLayer: a tar archive of blobs that is never written down: it is read out of them.

Plain GNU tar, the same bytes for the same files: no owner, no time, directories before what is in
them.
"""

from __future__ import annotations

import tarfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Final

from modelpack.digest import Digest, new_hasher
from modelpack.small_blobs import BytesBlob
from modelpack.storage import BlobReader, BlobSource

_BLOCK: Final = 512
_CHUNK: Final = 1024 * 1024


@dataclass(frozen=True, slots=True)
class TarFile:
    """A file of `size` bytes that is to lie at `path` in an archive."""

    path: str
    size: int
    content: BlobSource


@dataclass(frozen=True, slots=True)
class _Piece:
    size: int
    content: BlobSource


@dataclass(frozen=True, slots=True)
class TarLayer:
    """An archive of files; fulfils `BlobSource`. `size` is in bytes."""

    size: int
    _pieces: tuple[_Piece, ...] = field(repr=False)

    @classmethod
    def of(cls, files: Iterable[TarFile]) -> TarLayer:
        """Return the archive of these files, in their order."""
        pieces: list[_Piece] = []
        made: set[str] = set()

        def add(content: bytes) -> None:
            pieces.append(_Piece(len(content), BytesBlob(content)))

        for file in files:
            for directory in _above(file.path):
                if directory not in made:
                    made.add(directory)
                    add(_header(f"{directory}/", 0, tarfile.DIRTYPE, 0o755))
            add(_header(file.path, file.size, tarfile.REGTYPE, 0o644))
            pieces.append(_Piece(file.size, file.content))
            add(bytes(-file.size % _BLOCK))
        add(bytes(2 * _BLOCK))
        return cls(sum(piece.size for piece in pieces), tuple(pieces))

    @contextmanager
    def open(self, offset: int = 0) -> Iterator[BlobReader]:
        """Yield the archive's bytes from `offset` on."""
        reader = _Reader(self._pieces, offset)
        try:
            yield reader
        finally:
            reader.close()

    def digest(self, seen: Callable[[int], None]) -> Digest:
        """Return the digest, having read all files; `seen` is told how many bytes were."""
        hasher, buffer, done = new_hasher(), memoryview(bytearray(_CHUNK)), 0
        with self.open() as reader:
            while count := reader.readinto(buffer):
                hasher.update(buffer[:count])
                done += count
                seen(done)
        return Digest.of_hasher(hasher)


class _Reader:
    """Reads piece after piece; a piece that is shorter than it should be ends the archive."""

    def __init__(self, pieces: Sequence[_Piece], offset: int) -> None:
        self._left = list(reversed(pieces))
        self._skip = offset
        self._open = ExitStack()  # the file that is being read
        self._reader: BlobReader | None = None
        self._missing = 0

    def readinto(self, buffer: memoryview, /) -> int:
        """Fill `buffer` from its start; return the number of bytes, 0 at the end."""
        while self._reader is None or not self._missing:
            if not self._next():
                return 0
        count = self._reader.readinto(buffer[: self._missing])
        self._missing = self._missing - count if count else 0
        if not count:
            self._left.clear()
        return count

    def close(self) -> None:
        """Close the file that is being read."""
        self._open.close()
        self._reader = None

    def _next(self) -> bool:
        self.close()
        while self._left:
            piece = self._left.pop()
            if self._skip >= piece.size:
                self._skip -= piece.size
                continue
            self._reader = self._open.enter_context(piece.content.open(self._skip))
            self._missing, self._skip = piece.size - self._skip, 0
            return True
        return False


def _above(path: str) -> list[str]:
    parts = path.split("/")[:-1]
    return ["/".join(parts[: count + 1]) for count in range(len(parts))]


def _header(path: str, size: int, kind: bytes, mode: int) -> bytes:
    entry = tarfile.TarInfo(path)
    entry.size, entry.type, entry.mode = size, kind, mode
    return entry.tobuf(tarfile.GNU_FORMAT)
