"""Open weight files for reads of byte ranges, and describe files that are not weight files.

No file is mapped or read whole: a parser reads ranges, and `WeightFile.bytes_read` counts them.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from typing import BinaryIO, Self

from modelpack.errors import ModelpackError, NotFoundError, SourceChangedError, WeightFormatError

#: The hint for a file that ends too early. `pull` skips a stored blob, so it repairs none.
CUT_SHORT = (
    "the file was probably cut short: fetch it again or, if it is in a store, run "
    "`modelpack fsck --repair`"
)

#: The bytes at the start of a file that are enough to recognise its kind.
HEAD_BYTES = 512

# Without O_NONBLOCK, opening a FIFO would wait for a writer; O_BINARY exists on Windows only.
_OPEN_FLAGS = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)

#: The start of a Git LFS pointer.
LFS_POINTER = b"version https://git-lfs.github.com/spec/"
_LFS_SIZE = re.compile(rb"^size (\d{1,20})$", re.MULTILINE)
_FOREIGN_STARTS: tuple[tuple[bytes, str], ...] = (
    (b"PK\x03\x04", "a ZIP archive"),
    (b"\x1f\x8b", "gzip data"),
    (b"\x28\xb5\x2f\xfd", "zstd data"),
    (b"\x89HDF", "an HDF5 file"),
    (b"\x80\x02", "a Python pickle"),
    (b"\x80\x04", "a Python pickle"),
    (b"lmgg", "a GGML file, which is older than GGUF"),
    (b"fmgg", "a GGMF file, which is older than GGUF"),
    (b"tjgg", "a GGJT file, which is older than GGUF"),
)


class WeightFile:
    """An open weight file with its path, its size and reads of ranges inside it.

    It wraps an open, seekable binary file; `WeightFile.open` opens one by path. As a context
    manager it closes the file.
    """

    def __init__(self, file: BinaryIO, *, path: str, size: int) -> None:
        self.path = path
        self.size = size
        self.bytes_read = 0
        self._file = file

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Self:
        """Open the regular file `path`.

        Raises `NotFoundError` if it does not exist and `ModelpackError` if it is not a regular
        file or cannot be opened. A FIFO does not block.
        """
        name = os.fspath(path)
        try:
            descriptor = os.open(name, _OPEN_FLAGS)
        except FileNotFoundError:
            raise NotFoundError(f"{name}: no such file") from None
        except OSError as error:
            raise ModelpackError(f"{name}: cannot be opened: {error.strerror}") from error
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            os.close(descriptor)
            kind = "a directory" if stat.S_ISDIR(status.st_mode) else "not a regular file"
            raise ModelpackError(f"{name}: is {kind}, expected a weight file")
        return cls(os.fdopen(descriptor, "rb", buffering=0), path=name, size=status.st_size)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def read(self, offset: int, length: int) -> bytes:
        """Return the `length` bytes at `offset`; raise `WeightFormatError` if the file is shorter.

        Raises `SourceChangedError` if the file shrinks during the read.
        """
        if offset + length > self.size:
            raise self.truncated(offset, offset + length)
        parts: list[bytes] = []
        missing = length
        try:
            self._file.seek(offset)
            while missing:
                part = self._file.read(missing)
                if not part:
                    raise SourceChangedError(f"{self.path}: the file shrank while it was read")
                parts.append(part)
                missing -= len(part)
        except OSError as error:
            raise ModelpackError(f"{self.path}: cannot be read: {error.strerror}") from error
        self.bytes_read += length
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def head(self) -> bytes:
        """Return the first bytes, at most `HEAD_BYTES`."""
        return self.read(0, min(self.size, HEAD_BYTES))

    def error(
        self, message: str, offset: int | None = None, *, hint: str | None = None
    ) -> WeightFormatError:
        """Return an error with `message` about this file at the byte `offset`."""
        return WeightFormatError(message, path=self.path, offset=offset, hint=hint)

    def truncated(self, offset: int, needed: int) -> WeightFormatError:
        """Return the error for a file that is shorter than the `needed` bytes."""
        return self.error(
            f"the file ends too early: expected at least {needed} bytes, got {self.size}",
            offset,
            hint=CUT_SHORT,
        )

    def foreign(self, expected: str) -> WeightFormatError:
        """Return the error for a file that is not `expected`, with the kind it appears to be."""
        head = self.head()
        if head.startswith(LFS_POINTER):
            size = _LFS_SIZE.search(head)
            real = f" of {int(size[1])} bytes" if size else ""
            return self.error(
                f"is a Git LFS pointer to a file{real}, not the file itself",
                0,
                hint="run `git lfs install && git lfs pull` in that checkout",
            )
        kind, hint = describe(head)
        return self.error(f"is {kind}, expected {expected}", 0, hint=hint)


def quoted(name: str) -> str:
    """Return `name` quoted for a message, shortened since a hostile file may have long names."""
    return repr(name) if len(name) <= 120 else f"{name[:100]!r}…"


def describe(head: bytes) -> tuple[str, str | None]:
    """Return the kind of a file that starts with `head`, and a hint or None."""
    if not head:
        return "an empty file", None
    for start, kind in _FOREIGN_STARTS:
        if head.startswith(start):
            return kind, None
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if text.startswith((b"<!doctype html", b"<html")):
        return "an HTML page", "check the URL: the server may have sent a login or an error page"
    if text.startswith((b"<?xml", b"<error")):
        return "an XML document", "check the URL: the server may have sent an error message"
    if text.startswith(b"{"):
        return "a JSON document", "check the URL: the server may have sent an error message"
    return f"of an unknown kind (it starts with {head[:8]!r})", None


#: The argument of the parsers: a path or an open file.
WeightSource = str | os.PathLike[str] | WeightFile


@contextmanager
def opened(source: WeightSource) -> Iterator[WeightFile]:
    """Yield `source` as a `WeightFile`; a file opened from a path is closed afterwards."""
    if isinstance(source, WeightFile):
        yield source
        return
    with WeightFile.open(source) as file:
        yield file
