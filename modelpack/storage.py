"""The protocols that every source and target of models implements.

A store on disk, a repository in a registry and a store in memory implement `Source` and `Target`,
so pull, push and copy are one algorithm. A name is a tag or a digest in a repository, and a full
reference or a digest in a store.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Protocol, runtime_checkable

from modelpack.artifacts.descriptor import Descriptor, size_mismatch
from modelpack.artifacts.digest import Digest
from modelpack.artifacts.json_document import MAX_DOCUMENT_BYTES
from modelpack.errors import PackagingError, SizeMismatchError
from modelpack.progress import ProgressCallback, Stop, serialized


class BlobReader(Protocol):
    """A readable stream of a blob's unverified bytes; its context manager closes it."""

    def readinto(self, buffer: memoryview, /) -> int:
        """Read into `buffer` from its start; return the number of bytes, 0 at the end."""
        ...


def fill(reader: BlobReader, buffer: memoryview) -> int:
    """Read until `buffer` is full or the stream ends; return the number of bytes."""
    filled = 0
    while filled < len(buffer) and (count := reader.readinto(buffer[filled:])):
        filled += count
    return filled


class BlobSource(Protocol):
    """A blob that can be opened any number of times, at any offset."""

    def open(self, offset: int = 0) -> AbstractContextManager[BlobReader]:
        """Return a stream of the blob's bytes from `offset` on; it may reconnect after errors."""
        ...


class SegmentSink(Protocol):
    """Receives the parts of a blob in any order; several threads call it at once."""

    def write(self, offset: int, view: memoryview) -> None:
        """Write these bytes at `offset` of the blob."""
        ...


class SegmentsRefused(Exception):
    """The source cannot send ranges of a blob, only the whole blob."""


@runtime_checkable
class SegmentedSource(Protocol):
    """A `BlobSource` that can fetch parts over several connections at once."""

    @property
    def connections(self) -> int:
        """The number of connections to use; one if more would not be faster."""
        ...

    def fetch_segments(
        self, segments: Sequence[tuple[int, int]], sink: SegmentSink, stop: Stop
    ) -> None:
        """Write the bytes of all `segments` (start, end), which do not overlap, to `sink`.

        Returns when all are written. Raises the errors of reading the blob or `SegmentsRefused`,
        after which nothing more is written.
        """
        ...


class Outcome(StrEnum):
    """The result of writing a blob to a target."""

    WRITTEN = "written"  # bytes were sent or stored
    EXISTED = "existed"  # the target already had the blob
    MOUNTED = "mounted"  # the registry linked it from another repository


@dataclass(frozen=True, slots=True)
class Watch:
    """The progress callback and the stop request of a long call."""

    report: ProgressCallback
    stop: Stop


@runtime_checkable
class Source(Protocol):
    """A place to read manifests and blobs from."""

    def resolve(self, name: str) -> Descriptor:
        """Return the descriptor of the manifest `name`; raise `NotFoundError` if it is missing."""
        ...

    def fetch_manifest(self, descriptor: Descriptor) -> bytes:
        """Return a manifest's bytes, verified by size and digest."""
        ...

    def blob(self, descriptor: Descriptor) -> BlobSource:
        """Return the blob as a source; opening it raises `NotFoundError` if it does not exist."""
        ...


@runtime_checkable
class ReferrerSource(Source, Protocol):
    """A source that can list the referrers of a manifest: signatures, SBOMs, evaluations."""

    def referrers(self, subject: Digest, artifact_type: str | None = None) -> list[Descriptor]:
        """Return the manifests with this subject in a fixed order, optionally of one type.

        Each descriptor has the annotations and the artifact type of its manifest.
        """
        ...


@runtime_checkable
class Target(Source, Protocol):
    """A place to write manifests and blobs to; they become visible only after verification."""

    def has_blob(self, descriptor: Descriptor) -> bool:
        """Return whether the target has the blob, with the right size."""
        ...

    def write_blob(self, descriptor: Descriptor, source: BlobSource, watch: Watch) -> Outcome:
        """Write the blob from `source` unless the target has it or can mount it.

        Raises `DigestMismatchError` or `SizeMismatchError` if the bytes of the source are wrong.
        """
        ...

    def write_manifest(self, descriptor: Descriptor, raw: bytes, name: str | None = None) -> None:
        """Write a manifest after all its blobs; with `name`, tag it."""
        ...


@runtime_checkable
class PlacedTarget(Target, Protocol):
    """A store that records which repositories have its blobs, so that a push can mount them."""

    def places(self, digest: Digest) -> Sequence[str]:
        """Return the repositories (`registry/repository`) that had the blob, the latest first."""
        ...

    def note_place(self, digests: Iterable[Digest], place: str) -> None:
        """Record that the repository `place` has these blobs."""
        ...


def watching(progress: ProgressCallback | None, stop: Stop | None = None) -> Watch:
    """Return the `Watch` for a call; the callback never runs in two threads at once."""
    return Watch(serialized(progress), stop or Stop())


@dataclass(frozen=True, slots=True)
class BytesBlob:
    """A blob in memory; implements `BlobSource`."""

    content: bytes = field(repr=False)

    @contextmanager
    def open(self, offset: int = 0) -> Iterator[BlobReader]:
        """Yield a stream of the bytes from `offset` on."""
        yield io.BytesIO(self.content[offset:])


@dataclass(frozen=True, slots=True)
class FileBlob:
    """A blob in a file; implements `BlobSource`."""

    path: Path

    @contextmanager
    def open(self, offset: int = 0) -> Iterator[BlobReader]:
        """Yield a stream of the bytes from `offset` on; raises `PackagingError`."""
        try:
            file = self.path.open("rb", buffering=0)
        except OSError as error:
            raise PackagingError(f"{self.path}: cannot be read: {error.strerror}") from error
        with file:
            file.seek(offset)
            yield file


def read_blob(source: Source, descriptor: Descriptor, *, limit: int = MAX_DOCUMENT_BYTES) -> bytes:
    """Return the bytes of a small blob, verified by size and digest.

    Raises `SizeMismatchError` if it exceeds `limit` bytes or differs from the size in its
    descriptor, `DigestMismatchError` if its content does not match the digest.
    """
    what = f"blob {descriptor.digest}"
    if descriptor.size > limit:
        raise SizeMismatchError(
            f"{what}: is {descriptor.size} bytes, more than the limit of {limit}",
            expected=f"at most {limit}",
            got=str(descriptor.size),
        )
    content = bytearray(descriptor.size + 1)  # one more byte, to detect content that is too long
    with source.blob(descriptor).open() as stream:
        filled = fill(stream, memoryview(content))
    if filled != descriptor.size:
        got = f"{filled}" if filled < descriptor.size else f"more than {descriptor.size}"
        raise size_mismatch(what, descriptor.size, got)
    result = bytes(content[:filled])
    descriptor.digest.check(result, what)
    return result
