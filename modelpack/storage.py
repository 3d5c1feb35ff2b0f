"""The protocols that every source and target of a model fulfils.

A store on disk, a repository in a registry and a store in memory all fulfil `Source` and `Target`,
so pull, push and copy are one algorithm. A name is what the place itself understands: a tag or a
digest for a repository, a full reference or a digest for a store.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Protocol, runtime_checkable

from modelpack.artifacts.descriptor import Descriptor
from modelpack.artifacts.digest import Digest
from modelpack.artifacts.json_document import MAX_DOCUMENT_BYTES
from modelpack.errors import SizeMismatchError
from modelpack.progress import ProgressCallback, Stop, serialized


class BlobReader(Protocol):
    """A readable stream of a blob's bytes, not yet verified; closed by its context."""

    def readinto(self, buffer: memoryview, /) -> int:
        """Fill `buffer` from its start; return the number of bytes, 0 at the end."""
        ...


class BlobSource(Protocol):
    """A blob that can be opened any number of times, at any offset."""

    def open(self, offset: int = 0) -> AbstractContextManager[BlobReader]:
        """Return a stream of the blob's bytes from `offset` on; it may reconnect by itself."""
        ...


class SegmentSink(Protocol):
    """Where the parts of a blob go that come in any order; called by several threads at once."""

    def write(self, offset: int, view: memoryview) -> None:
        """Keep these bytes, which begin at `offset` of the blob."""
        ...


class SegmentsRefused(Exception):
    """A source turns out to give a blob from its first byte on only."""


@runtime_checkable
class SegmentedSource(Protocol):
    """A `BlobSource` whose parts may come over several connections at once."""

    @property
    def connections(self) -> int:
        """How many connections it would use; with one, reading on is as good."""
        ...

    def fetch_segments(
        self, segments: Sequence[tuple[int, int]], sink: SegmentSink, stop: Stop
    ) -> None:
        """Bring the bytes of all `segments` (start, end) to `sink`; they do not overlap.

        Returns when all are there; raises what reading the blob raises, or `SegmentsRefused`, once
        nothing comes any more.
        """
        ...


class Outcome(StrEnum):
    """What a target did to have a blob."""

    WRITTEN = "written"  # bytes were sent or stored
    EXISTED = "existed"  # it was there already
    MOUNTED = "mounted"  # the registry linked it from another repository


@dataclass(frozen=True, slots=True)
class Watch:
    """What a long call gets along: whom to tell, and when to stop."""

    report: ProgressCallback
    stop: Stop


@runtime_checkable
class Source(Protocol):
    """Where manifests and blobs are read from."""

    def resolve(self, name: str) -> Descriptor:
        """Return the descriptor of the manifest `name`; raise `NotFoundError`."""
        ...

    def fetch_manifest(self, descriptor: Descriptor) -> bytes:
        """Return a manifest's bytes, checked against size and digest."""
        ...

    def blob(self, descriptor: Descriptor) -> BlobSource:
        """Return the blob to read from; whether it exists shows when it is opened."""
        ...


@runtime_checkable
class ReferrerSource(Source, Protocol):
    """A source that knows what was said about a manifest: signatures, SBOMs, evaluations."""

    def referrers(self, subject: Digest, artifact_type: str | None = None) -> list[Descriptor]:
        """Return the manifests whose subject is this one, those of `artifact_type` if given.

        Each descriptor has the annotations and the type of its manifest; in a fixed order.
        """
        ...


@runtime_checkable
class Target(Source, Protocol):
    """Where manifests and blobs are written to: nothing shows before it is verified."""

    def has_blob(self, descriptor: Descriptor) -> bool:
        """Return whether the blob is there, with the right size."""
        ...

    def write_blob(self, descriptor: Descriptor, source: BlobSource, watch: Watch) -> Outcome:
        """Have the blob, reading it from `source` if need be.

        Raises `DigestMismatchError` or `SizeMismatchError` if the source's bytes are others.
        """
        ...

    def write_manifest(self, descriptor: Descriptor, raw: bytes, name: str | None = None) -> None:
        """Write a manifest whose blobs are all there and, with `name`, tag it."""
        ...


def watching(progress: ProgressCallback | None, stop: Stop | None = None) -> Watch:
    """Return the `Watch` of one call."""
    return Watch(serialized(progress), stop or Stop())


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


def read_blob(source: Source, descriptor: Descriptor, *, limit: int = MAX_DOCUMENT_BYTES) -> bytes:
    """Return a small blob's bytes, checked against size and digest.

    Raises `SizeMismatchError` if it is larger than `limit` bytes or not as long as its descriptor
    says, `DigestMismatchError` if it holds other bytes.
    """
    what = f"blob {descriptor.digest}"
    if descriptor.size > limit:
        raise SizeMismatchError(
            f"{what}: {descriptor.size} bytes are more than the {limit} that fit here",
            expected=f"at most {limit}",
            got=str(descriptor.size),
        )
    content = bytearray(descriptor.size + 1)  # one more, to notice what is too long
    filled = 0
    with source.blob(descriptor).open() as stream:
        view = memoryview(content)
        while filled < len(content) and (count := stream.readinto(view[filled:])):
            filled += count
    if filled != descriptor.size:
        got = f"{filled}" if filled < descriptor.size else f"more than {descriptor.size}"
        raise SizeMismatchError(
            f"{what}: expected {descriptor.size} bytes, got {got}",
            expected=str(descriptor.size),
            got=got,
        )
    result = bytes(content[:filled])
    descriptor.digest.check(result, what)
    return result
