"""MemoryStore: a store in memory, for tests and for models of a few bytes."""

from __future__ import annotations

import io
import threading
from contextlib import AbstractContextManager
from dataclasses import dataclass

from modelpack.artifacts.descriptor import Descriptor
from modelpack.artifacts.digest import Digest
from modelpack.artifacts.manifest import parse_manifest_or_index
from modelpack.artifacts.reference import DEFAULT_REGISTRY, Reference
from modelpack.errors import NotFoundError
from modelpack.progress import Action, Progress
from modelpack.storage import BlobReader, BlobSource, Outcome, Watch
from modelpack.store import lookup
from modelpack.store.lookup import Entry, StoredModel
from modelpack.store.manifests import successors


@dataclass(frozen=True, slots=True)
class MemoryBlob:
    """A blob of a `MemoryStore`; opening it raises `NotFoundError` if it is missing."""

    contents: dict[Digest, bytes]
    digest: Digest

    def open(self, offset: int = 0) -> AbstractContextManager[BlobReader]:
        """Return a stream from `offset` on; raises `NotFoundError`."""
        return io.BytesIO(_found(self.contents, self.digest)[offset:])


class MemoryStore:
    """A store in memory; implements `modelpack.storage.Target`, with names as in `LayoutStore`."""

    def __init__(self) -> None:
        self._blobs: dict[Digest, bytes] = {}
        self._manifests: dict[Digest, Descriptor] = {}
        self._tags: dict[Reference, Digest] = {}
        self._mutex = threading.Lock()

    def resolve(self, name: str) -> Descriptor:
        """Return the manifest called `name`; raises as `LayoutStore.resolve`."""
        return lookup.Names(self._entries()).find(name).entry.manifest

    def models(self) -> tuple[StoredModel, ...]:
        """Return all models, by name."""
        return lookup.models(self._entries())

    def fetch_manifest(self, descriptor: Descriptor) -> bytes:
        """Return the bytes of a manifest, verified by size and digest."""
        raw = _found(self._blobs, descriptor.digest)
        descriptor.check_size(len(raw), f"manifest {descriptor.digest}")
        return raw

    def blob(self, descriptor: Descriptor) -> BlobSource:
        """Return the blob as a source; opening it raises `NotFoundError` if it is missing."""
        return MemoryBlob(self._blobs, descriptor.digest)

    def has_blob(self, descriptor: Descriptor) -> bool:
        """Return whether the store has the blob, with the right size."""
        content = self._blobs.get(descriptor.digest)
        return content is not None and len(content) == descriptor.size

    def write_blob(self, descriptor: Descriptor, source: BlobSource, watch: Watch) -> Outcome:
        """Store the blob; raises `DigestMismatchError` or `SizeMismatchError`."""
        digest, size = descriptor.digest, descriptor.size
        name = descriptor.filepath or digest.short
        if self.has_blob(descriptor):
            watch.report(Progress(Action.SKIP, name, digest, size, size))
            return Outcome.EXISTED
        content = bytearray(size + 1)
        length = 0
        with source.open() as reader:
            while count := reader.readinto(memoryview(content)[length:]):
                watch.stop.check()
                length += count
                watch.report(Progress(Action.FETCH, name, digest, length, size))
        descriptor.check_size(length, f"blob {descriptor.digest}")
        digest.check(bytes(content[:length]), "blob")
        self._blobs[digest] = bytes(content[:length])
        return Outcome.WRITTEN

    def write_manifest(self, descriptor: Descriptor, raw: bytes, name: str | None = None) -> None:
        """Write a manifest whose blobs the store has, and tag it if there is a `name`."""
        descriptor.check_size(len(raw), f"manifest {descriptor.digest}")
        descriptor.digest.check(raw, "manifest")
        what = str(descriptor.digest)
        manifest = parse_manifest_or_index(raw, what, media_type=descriptor.media_type)
        reference = Reference.parse(name, default_registry=DEFAULT_REGISTRY) if name else None
        if reference is not None and reference.digest is not None:
            reference.digest.check(raw, str(reference))
        for needed in successors(manifest):
            if not self.has_blob(needed):
                raise NotFoundError(
                    f"manifest {what} needs {needed.digest}, which is not in the store"
                )
        with self._mutex:
            self._blobs[descriptor.digest] = raw
            self._manifests[descriptor.digest] = Entry(descriptor).manifest
            if reference is not None and reference.tag is not None:
                self._tags[reference.without_digest()] = descriptor.digest

    def _entries(self) -> tuple[Entry, ...]:
        with self._mutex:
            tagged = [Entry(self._manifests[d], str(ref), ref) for ref, d in self._tags.items()]
            bare = self._manifests.keys() - self._tags.values()
            return (*tagged, *(Entry(self._manifests[digest]) for digest in sorted(bare)))


def _found(contents: dict[Digest, bytes], digest: Digest) -> bytes:
    content = contents.get(digest)
    if content is None:
        raise NotFoundError(f"{digest} is not in the store")
    return content
