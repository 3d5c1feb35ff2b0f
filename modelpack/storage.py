"""The protocols that every source and target of a model fulfils.

A store on disk, a repository in a registry and a store in memory all fulfil `Source` and `Target`,
so pull, push and copy are one algorithm. A name is what the place itself understands: a tag or a
digest for a repository, a full reference or a digest for a store.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol, runtime_checkable

from modelpack.descriptor import Descriptor
from modelpack.digest import Digest
from modelpack.progress import ProgressCallback, Stop


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


class Mounter(Protocol):
    """A target that can link a blob from another repository of the same registry."""

    def mount_blob(self, descriptor: Descriptor, source: Source) -> bool:
        """Link the blob from `source` if it lives in the same registry; return whether it did."""
        ...
