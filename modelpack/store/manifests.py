"""The manifests of a store: read them, follow them to their blobs, write and list them.

`reachable` finds everything that manifests need: the mark phase of garbage collection. `Publisher`
gives a verified file its place under `blobs/` and adds it to the leases; `Manifests` writes
manifests and adds them to `index.json`, the last step of every pull, import and upload.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from modelpack.artifacts import media_types
from modelpack.artifacts.descriptor import Descriptor
from modelpack.artifacts.digest import Digest
from modelpack.artifacts.json_document import MAX_DOCUMENT_BYTES
from modelpack.artifacts.manifest import (
    Index,
    Manifest,
    parse_manifest_or_index,
    referrer_descriptor,
)
from modelpack.artifacts.reference import DEFAULT_REGISTRY, Reference
from modelpack.errors import (
    DigestMismatchError,
    FormatError,
    IntegrityError,
    InvalidDigestError,
    NotFoundError,
    StoreError,
)
from modelpack.storage import Outcome
from modelpack.store.blobs import BLOB_MODE, Blobs, StoredBlob, VerifiedMarks
from modelpack.store.filesystem import flush_file, map_os_errors
from modelpack.store.imports import StagedBlob
from modelpack.store.index import IndexDocument, IndexFile
from modelpack.store.leases import Leases
from modelpack.store.tree import Tree

_DIGEST = re.compile(rb"\b(?:sha256|blake3):[0-9a-f]{64}\b|\bsha512:[0-9a-f]{128}\b")


def read_manifest(blobs: Blobs, descriptor: Descriptor) -> Manifest | Index:
    """Return the stored manifest or index, verified.

    Raises `NotFoundError`, `IntegrityError` or `FormatError`.
    """
    return _parsed(blobs.read(descriptor.digest, "manifest"), descriptor)


def _parsed(raw: bytes, descriptor: Descriptor) -> Manifest | Index:
    return parse_manifest_or_index(raw, str(descriptor.digest), media_type=descriptor.media_type)


def successors(manifest: Manifest | Index) -> tuple[Descriptor, ...]:
    """Return the blobs or manifests that a manifest needs; its subject is not one of them."""
    return manifest.manifests if isinstance(manifest, Index) else manifest.unique_blobs


def reachable(blobs: Blobs, roots: Iterable[Descriptor]) -> set[Digest]:
    """Return the digests of the roots and of everything they need, directly or not.

    Raises `StoreError` if a manifest is damaged, since its needs are unknown. A missing manifest
    needs nothing.
    """
    found: set[Digest] = set()
    waiting = list(roots)
    while waiting:
        descriptor = waiting.pop()
        if descriptor.digest in found:
            continue
        found.add(descriptor.digest)
        if descriptor.media_type not in media_types.MANIFEST_AND_INDEX_TYPES:
            continue
        try:
            raw = blobs.read(descriptor.digest, "manifest")
        except (NotFoundError, IntegrityError) as error:
            if isinstance(error, NotFoundError) and not blobs.was_damaged(descriptor.digest):
                continue
            raise StoreError(
                f"cannot determine which blobs are needed: {error}",
                hint="run `modelpack fsck`, then pull the damaged model again or remove it",
            ) from error
        try:
            waiting.extend(successors(_parsed(raw, descriptor)))
        except (FormatError, InvalidDigestError):  # keep too much, not too little
            found.update(Digest.parse(match.decode()) for match in _DIGEST.findall(raw))
    return found


def referrers(
    blobs: Blobs, candidates: Iterable[Digest], subjects: set[Digest]
) -> list[Descriptor]:
    """Return the manifests among `candidates` whose subject is one of `subjects`."""
    found = []
    for digest in candidates:
        manifest = as_manifest(blobs, digest)
        if manifest and manifest.subject and manifest.subject.digest in subjects:
            found.append(manifest.descriptor)
    return found


def as_manifest(blobs: Blobs, digest: Digest) -> Manifest | Index | None:
    """Return the blob as a manifest or an index, or None if it is neither."""
    try:
        if blobs.size(digest) > MAX_DOCUMENT_BYTES:
            return None
        first = bytearray(1)
        with StoredBlob(blobs.path, digest).open() as stream:
            stream.readinto(memoryview(first))
        if first != b"{":
            return None
        return parse_manifest_or_index(blobs.read(digest, "manifest"), str(digest))
    except (NotFoundError, IntegrityError, FormatError):
        return None


@dataclass(frozen=True, slots=True)
class Publisher:
    """Publishes blobs in one store.

    Each method takes the store's lock, so that a garbage collection sees a blob either not at all
    or as needed.
    """

    tree: Tree
    blobs: Blobs
    marks: VerifiedMarks
    leases: Leases

    def keep(self, descriptor: Descriptor) -> bool:
        """Return whether the store has the blob; add it to the growing leases either way."""
        there = self.blobs.holds(descriptor)
        with self.tree.lock().held():
            return self._found(descriptor.digest, there=there)

    def touch(self, digest: Digest) -> bool:
        """Return whether the store has the blob; mark it as recently used."""
        path = self.blobs.find(digest)
        if path is None or self.tree.is_read_only():
            return path is not None
        with self.tree.lock().held():
            there = path.is_file()
            if there:
                self.marks.touch(digest, path)
        return there

    def publish(self, staged: StagedBlob) -> Outcome:
        """Make a staged file a blob, unless the store has the blob."""
        there = self.blobs.find(staged.digest) is not None
        with self.tree.lock().held():
            if self._found(staged.digest, there=there):
                return Outcome.EXISTED
            if staged.linked:
                staged.link()
                self.marks.mark_linked(staged.digest, staged.found)
            self.blobs.publish(staged.path, staged.digest, flushed=False)
        return Outcome.WRITTEN

    def take(self, path: Path, digest: Digest) -> Outcome:
        """Move a verified file of the same file system to its blob's path."""
        with map_os_errors("flush", path):
            path.chmod(BLOB_MODE)
            flush_file(path)
        there = self.blobs.find(digest) is not None
        with self.tree.lock().held():
            if self._found(digest, there=there):
                path.unlink()
                return Outcome.EXISTED
            self.blobs.publish(path, digest, flushed=True)
        return Outcome.WRITTEN

    def write(self, digest: Digest, content: bytes) -> None:
        """Write a small blob durably, unless the store has it."""
        with self.tree.lock().held():
            self.write_locked(digest, content)

    def write_locked(self, digest: Digest, content: bytes) -> None:
        """Do as `write`; the caller holds the store's lock."""
        if not self._found(digest, there=self.blobs.find(digest) is not None):
            self.blobs.write(digest, content)

    def _found(self, digest: Digest, *, there: bool) -> bool:
        """Add the blob to the growing leases; return whether its file (still) exists."""
        self.leases.note(digest)
        path = self.tree.blob(digest)
        if not there or not os.path.isfile(path):
            return False
        self.marks.touch(digest, path)
        return True


@dataclass(frozen=True, slots=True)
class Manifests:
    """The manifests of one store."""

    tree: Tree
    blobs: Blobs
    index: IndexFile
    publisher: Publisher

    def write(
        self,
        descriptor: Descriptor,
        raw: bytes,
        name: str | None,
        *,
        origin: str | None,
        partial: bool,
    ) -> None:
        """Do as `LayoutStore.write_manifest`."""
        descriptor.check_size(len(raw), f"manifest {descriptor.digest}")
        descriptor.digest.check(raw, "manifest")
        manifest = parse_manifest_or_index(
            raw, str(descriptor.digest), media_type=descriptor.media_type
        )
        listed = _listed(descriptor, manifest)
        reference = _tag_named(name, descriptor.digest)
        needed = successors(manifest)
        vital = (manifest.config,) if partial and isinstance(manifest, Manifest) else needed
        self.tree.prepare()
        # Check without the lock first: verifying a blob may take long.
        self._check_complete(listed, vital)
        with self.tree.lock().held():
            self._check_complete(listed, vital)
            self.publisher.write_locked(descriptor.digest, raw)
            document = self._with_listed(self.index.read(), listed, manifest)
            if reference is not None:
                document = document.with_tag(listed, reference)
            lacks = partial and not all(map(self.blobs.holds, needed))
            mark = "true" if lacks else None
            document = document.annotated(descriptor.digest, media_types.PARTIAL, mark)
            if origin is not None:
                document = document.annotated(listed.digest, media_types.ORIGIN, origin, reference)
            self.index.write(document)

    def list_stored(self, named: Sequence[tuple[Descriptor, str | None]]) -> None:
        """Do as `LayoutStore.list_manifests`."""
        entries = []
        for descriptor, name in named:
            manifest = read_manifest(self.blobs, descriptor)
            listed = _listed(descriptor, manifest)
            self._check_complete(listed, successors(manifest))
            entries.append((listed, manifest, _tag_named(name, descriptor.digest)))
        with self.tree.lock().held():
            document = self.index.read()
            for listed, manifest, reference in entries:
                self._check_complete(listed, successors(manifest))
                document = self._with_listed(document, listed, manifest)
                if reference is not None:
                    document = document.with_tag(listed, reference)
                document = document.annotated(listed.digest, media_types.PARTIAL, None)
            self.index.write(document)

    def missing(self, descriptor: Descriptor) -> tuple[Descriptor, ...]:
        """Return the missing layers of a partial model, nothing for any other model."""
        if not any(e.is_partial for e in self.index.read().entries_of(descriptor.digest)):
            return ()
        needed = successors(read_manifest(self.blobs, descriptor))
        return tuple(blob for blob in needed if not self.blobs.holds(blob))

    def referrers(self, subject: Digest, artifact_type: str | None) -> list[Descriptor]:
        """Return the listed manifests whose subject is `subject`, sorted by digest."""
        found = {}
        seen: set[tuple[Digest, str]] = set()
        for entry in self.index.read().entries:
            if entry.name is not None and entry.descriptor.artifact_type is None:
                continue
            key = (entry.digest, entry.descriptor.media_type)
            if key in seen or key[1] not in media_types.MANIFEST_AND_INDEX_TYPES:
                continue
            seen.add(key)
            try:
                document = read_manifest(self.blobs, entry.manifest)
            except (NotFoundError, IntegrityError, FormatError):
                continue
            if document.subject is not None and document.subject.digest == subject:
                listed = referrer_descriptor(entry.manifest, document)
                if artifact_type in (None, listed.artifact_type):
                    found[entry.digest] = listed
        return [found[digest] for digest in sorted(found)]

    def unlisted(self, name: str) -> Descriptor | None:
        """Return the manifest with the digest `name`, also if only an image index lists it."""
        try:
            digest = Digest.parse(name)
        except InvalidDigestError:
            return None
        manifest = as_manifest(self.blobs, digest)
        if manifest is None:
            return None
        return replace(manifest.descriptor, digest=digest)

    def _with_listed(
        self, document: IndexDocument, listed: Descriptor, manifest: Manifest | Index
    ) -> IndexDocument:
        """Return a document with the manifest; what an index lists lives and dies with the index.

        Referrers stay listed, since only listed manifests are searched for them.
        """
        if isinstance(manifest, Index):
            for child in document.bare({child.digest for child in manifest.manifests}):
                found = as_manifest(self.blobs, child.digest)
                if found is not None and found.subject is None:
                    document = document.without_manifest(child.digest)
        return document.with_manifest(listed)

    def _check_complete(self, listed: Descriptor, needed: Iterable[Descriptor]) -> None:
        for descriptor in needed:
            if not self.blobs.holds(descriptor):
                raise NotFoundError(
                    f"manifest {listed.digest} needs {descriptor.digest} ({descriptor.size} bytes, "
                    f"{descriptor.media_type}), which is not in the store {self.tree.root}",
                    hint="write the blobs before the manifest",
                )


def check_names(reference: Reference, digest: Digest) -> None:
    """Raise `DigestMismatchError` if `reference` has another digest."""
    if reference.digest is not None and reference.digest != digest:
        raise DigestMismatchError(
            f"{reference} cannot name {digest}", expected=str(reference.digest), got=str(digest)
        )


def _listed(descriptor: Descriptor, manifest: Manifest | Index) -> Descriptor:
    """Return the index entry of a manifest; a referrer keeps a type that is not a model's."""
    is_referrer = manifest.subject is not None
    shown = referrer_descriptor(descriptor, manifest) if is_referrer else manifest
    return replace(descriptor, annotations={}, artifact_type=shown.artifact_type, platform=None)


def _tag_named(name: str | None, digest: Digest) -> Reference | None:
    """Return the tagged reference in `name`, or None; a digest in it must be the manifest's."""
    if name is None:
        return None
    reference = Reference.parse(name, default_registry=DEFAULT_REGISTRY)
    check_names(reference, digest)
    return reference.without_digest() if reference.tag else None
