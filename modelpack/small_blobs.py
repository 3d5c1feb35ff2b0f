"""Blobs that are here already: in memory, or in a file."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from modelpack.storage import BlobReader


@dataclass(frozen=True, slots=True)
class BytesBlob:
    """A blob in memory; fulfils `BlobSource`."""

    content: bytes = field(repr=False)

    @contextmanager
    def open(self, offset: int = 0) -> Iterator[BlobReader]:
        """Yield a stream of the bytes from `offset` on."""
        yield io.BytesIO(self.content[offset:])


@dataclass(frozen=True, slots=True)
class FileBlob:
    """A blob in a file; fulfils `BlobSource`."""

    path: Path

    @contextmanager
    def open(self, offset: int = 0) -> Iterator[BlobReader]:
        """Yield a stream of the bytes from `offset` on."""
        with self.path.open("rb", buffering=0) as file:
            file.seek(offset)
            yield file
