"""LayoutStore: models on this machine, in an OCI image layout that other tools read in place.

This class only joins the parts; each has a file of its own: `tree` (directories), `blobs` (what is
verified), `downloads` and `imports` (how blobs come in), `publishing` (when they show), `trust`
(which need another look), `index` and `lookup` (names), `leases`, `gc`, `removal`, `fsck`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from pathlib import Path

from modelpack.descriptor import Descriptor
from modelpack.digest import Digest
from modelpack.errors import (
    DigestMismatchError,
    IntegrityError,
    NotFoundError,
    SizeMismatchError,
    UsageError,
)
from modelpack.manifest import parse_manifest_or_index
from modelpack.progress import Action, Progress
from modelpack.reference import DEFAULT_REGISTRY, Reference
from modelpack.storage import BlobSource, Outcome, Watch
from modelpack.stores import lookup
from modelpack.stores.blobs import Blobs, FileBlob
from modelpack.stores.downloads import Downloads
from modelpack.stores.fsck import Checker, FsckReport
from modelpack.stores.gc import Collector, GcReport
from modelpack.stores.imports import ImportedFile, Imports
from modelpack.stores.index import IndexDocument, IndexFile
from modelpack.stores.leases import Leases
from modelpack.stores.lookup import StoredModel
from modelpack.stores.publishing import Publisher
from modelpack.stores.reachability import as_manifest, successors
from modelpack.stores.removal import Removal, Remover
from modelpack.stores.tree import open_tree
from modelpack.stores.trust import Trust


def default_store_root() -> Path:
    """Return $MODELPACK_STORE, else `modelpack/store` where the system keeps users' data."""
    configured = os.environ.get("MODELPACK_STORE")
    if configured:
        return Path(configured).expanduser()
    from platformdirs import user_data_path

    return user_data_path("modelpack") / "store"


class LayoutStore:
    """A store of models in the directory `root`; fulfils `modelpack.storage.Target`.

    Its names are references (`docker.io/ai/x:latest`), digests, short ids and unique prefixes of
    ids. Any number of threads and processes may use one store at once; readers take no locks.
    """

    def __init__(self, root: str | Path | None = None, *, create: bool = True) -> None:
        """Open the store, or make one in an absent or empty directory if `create`.

        None means `default_store_root`. Raises `StoreError` where there is something else.
        """
        where = default_store_root() if root is None else Path(root).expanduser()
        self._tree = open_tree(where, create=create)
        self.root: Path = self._tree.root
        self._trust = Trust(self._tree)
        self._blobs = Blobs(self._tree, self._trust)
        self._index = IndexFile(self._tree)
        self._leases = Leases(self._tree)
        self._publisher = Publisher(self._tree, self._blobs, self._trust, self._leases)
        self._downloads = Downloads(self._tree, self._blobs)
        self._imports = Imports(self._tree)

    # Source

    def resolve(self, name: str) -> Descriptor:
        """Return the manifest that `name` means; a tag wins over an id that looks the same.

        Raises `NotFoundError`, `AmbiguousError`, `InvalidReferenceError`, and `IntegrityError` if a
        tag and a digest in `name` disagree.
        """
        try:
            return self._index.read().names.find(name).entry.manifest
        except NotFoundError:
            child = self._unlisted(name)
            if child is None:
                raise
            return child

    def fetch_manifest(self, descriptor: Descriptor) -> bytes:
        """Return a manifest's bytes, checked against size and digest."""
        raw = self._blobs.read(descriptor.digest, "manifest")
        _check_size(descriptor, len(raw), "manifest")
        return raw

    def blob(self, descriptor: Descriptor) -> BlobSource:
        """Return the blob to read from; whether it exists shows when it is opened."""
        return FileBlob(self._blobs, descriptor.digest)

    # Target

    def has_blob(self, descriptor: Descriptor) -> bool:
        """Return whether the blob is there, with the right size."""
        return self._blobs.holds(descriptor)

    def write_blob(self, descriptor: Descriptor, source: BlobSource, watch: Watch) -> Outcome:
        """Have the blob, reading from `source` what is missing; what was fetched before is kept.

        Raises `DigestMismatchError`, `SizeMismatchError`, `StorageFullError`, or what the source
        raises.
        """
        self._tree.prepare()
        outcome = Outcome.EXISTED
        if not self._publisher.keep(descriptor):
            outcome = self._downloads.fetch(descriptor, source, watch)
        if outcome is Outcome.EXISTED:
            watch.report(_skipped(descriptor))
        return outcome

    def write_manifest(self, descriptor: Descriptor, raw: bytes, name: str | None = None) -> None:
        """Write a manifest and, with `name`, a full reference, tag it; the index comes last.

        Raises `NotFoundError` if a blob of it is missing, `IntegrityError` if `raw` is not what
        the descriptor says, `ManifestError` if it does not parse.
        """
        _check_size(descriptor, len(raw), "manifest")
        descriptor.digest.check(raw, "manifest")
        manifest = parse_manifest_or_index(
            raw, str(descriptor.digest), media_type=descriptor.media_type
        )
        listed = Descriptor(
            descriptor.media_type,
            descriptor.digest,
            descriptor.size,
            artifact_type=manifest.artifact_type,
        )
        reference = _tag_named(name, descriptor.digest)
        self._tree.prepare()
        # Once without the lock, since a blob may need to be verified, and once with it.
        self._check_whole(listed, successors(manifest))
        with self._tree.lock().held():
            self._check_whole(listed, successors(manifest))
            self._publisher.write_locked(descriptor.digest, raw)
            document = self._index.read().with_manifest(listed)
            if reference is not None:
                document = document.with_tag(listed, reference)
            self._index.write(document)

    # Files

    def blob_path(self, digest: Digest) -> Path:
        """Return the path of a blob, to read only; raises `NotFoundError`."""
        return self._blobs.path(digest)

    def write_bytes(self, content: bytes, media_type: str) -> Descriptor:
        """Store a small blob, and return its descriptor."""
        descriptor = Descriptor(media_type, Digest.of(content), len(content))
        self._tree.prepare()
        self._publisher.write(descriptor.digest, content)
        return descriptor

    def import_file(self, path: Path, watch: Watch, *, link: bool = False) -> ImportedFile:
        """Hash a file and copy it into the store, reading each byte once.

        Where the file system can share blocks, nothing is copied. `link` makes a hard link
        instead: it costs no space, but whoever changes the file changes the blob. The store
        notices that at the next use, by size and time, and then drops the blob.

        The copy is not flushed to the disk; after a power cut it is verified before its first use.
        Raises `NotFoundError`, `PackagingError`, `StorageFullError`, `SourceChangedError`.
        """
        self._tree.prepare()
        with self._imports.reading(path, path.name, watch, link=link) as read:
            outcome = self._publisher.publish(read)
            found = read.found
        return ImportedFile(
            read.digest, found.st_size, outcome, found.st_dev, found.st_ino, found.st_mtime_ns
        )

    def adopt_file(
        self, path: Path, descriptor: Descriptor, watch: Watch, *, link: bool
    ) -> Outcome:
        """Have the blob, from a file that should be it; as `import_file`, but verified.

        Raises `DigestMismatchError` or `SizeMismatchError` if the file is something else.
        """
        self._tree.prepare()
        if self._publisher.keep(descriptor):
            watch.report(_skipped(descriptor))
            return Outcome.EXISTED
        algorithm, name = descriptor.digest.algorithm, _shown(descriptor)
        with self._imports.reading(path, name, watch, link=link, algorithm=algorithm) as read:
            _check_size(descriptor, read.found.st_size, str(path))
            descriptor.digest.check_equal(read.digest, str(path))
            return self._publisher.publish(read)

    def take_file(self, path: Path, digest: Digest) -> Outcome:
        """Move a file of the same file system into the store; the caller has verified it.

        `path` is gone afterwards. The bytes are flushed to the disk.
        """
        self._tree.prepare()
        return self._publisher.take(path, digest)

    # Models

    def models(self) -> tuple[StoredModel, ...]:
        """Return all models, by name; reads nothing but the index."""
        return lookup.models(self._index.read().entries)

    def get(self, name: str) -> StoredModel:
        """Return the model that `name` means, with all its names; raises as `resolve`."""
        document = self._index.read()
        return lookup.model(document.entries, document.names.find(name).entry.digest)

    def tag(self, name: str, reference: Reference) -> Descriptor:
        """Give the model `name` another name, taking it from the model that had it.

        Raises as `resolve`, and `UsageError` if `reference` has no tag.
        """
        if reference.tag is None:
            raise UsageError(f"{reference} has no tag", hint="write NAME:TAG")
        self._tree.prepare()
        with self._tree.lock().held():
            document = self._index.read()
            descriptor = document.names.find(name).entry.manifest
            _check_same(reference, descriptor.digest)
            self._index.write(document.with_tag(descriptor, reference.without_digest()))
        return descriptor

    def remove(self, name: str, *, force: bool = False) -> Removal:
        """Remove a name; with its last name, or by its id, the model and what only it needs.

        Raises as `resolve`, and `ConflictError` (unless `force`) for the id of a model with
        several names, and `LockedError` for a model that a lease keeps.
        """
        return Remover(self._tree, self._blobs, self._index, self._leases).remove(name, force=force)

    def touch_blob(self, digest: Digest) -> bool:
        """Return whether the blob is there; a collection counts it as recent from now on."""
        return self._publisher.touch(digest)

    def delete_blob(self, digest: Digest) -> bool:
        """Delete a blob that no listed manifest needs; return whether it was there.

        Raises `ConflictError` if one needs it, `LockedError` if a lease keeps it.
        """
        return Remover(self._tree, self._blobs, self._index, self._leases).delete_blob(digest)

    def index(self) -> IndexDocument:
        """Return what `index.json` says now."""
        return self._index.read()

    def change_index(self, change: Callable[[IndexDocument], IndexDocument]) -> None:
        """Replace the index by what `change` makes of it; nobody else changes it meanwhile.

        Every manifest that it lists must be there, as after `write_manifest`.
        """
        self._tree.prepare()
        with self._tree.lock().held():
            document = self._index.read()
            changed = change(document)
            if changed is not document:
                self._index.write(changed)

    # Upkeep

    def lease(
        self, digests: Iterable[Digest], *, growing: bool = True
    ) -> AbstractContextManager[None]:
        """Keep these blobs from being deleted in the block, by any process.

        A `growing` lease also keeps what this object writes, or finds there, in the block: so the
        parts of a model are safe until its manifest is written.
        """
        return self._leases.hold(digests, growing=growing)

    def gc(self, *, dry_run: bool = False, grace_seconds: float = 3600) -> GcReport:
        """Delete the blobs that no model and no lease needs, if unused for `grace_seconds`."""
        collector = Collector(self._tree, self._blobs, self._trust, self._index, self._leases)
        return collector.collect(dry_run=dry_run, grace_seconds=grace_seconds)

    def fsck(self, *, fast: bool = False, watch: Watch) -> FsckReport:
        """Check everything; `fast` looks at sizes and manifests only. Damaged blobs are set aside.

        The report says which models are hit.
        """
        return Checker(self._tree, self._blobs, self._trust, self._index).check(
            fast=fast, watch=watch
        )

    def _unlisted(self, name: str) -> Descriptor | None:
        """Return a manifest that only an index leads to; such a one has no name but its digest."""
        try:
            digest = Digest.parse(name)
        except IntegrityError:
            return None
        manifest = as_manifest(self._blobs, digest)
        if manifest is None:
            return None
        return Descriptor(
            manifest.media_type, digest, len(manifest.raw), artifact_type=manifest.artifact_type
        )

    def _check_whole(self, listed: Descriptor, needed: Iterable[Descriptor]) -> None:
        for descriptor in needed:
            if not self._blobs.holds(descriptor):
                raise NotFoundError(
                    f"manifest {listed.digest} needs {descriptor.digest} ({descriptor.size} bytes, "
                    f"{descriptor.media_type}), which is not in the store {self.root}",
                    hint="write the blobs first",
                )


def _check_size(descriptor: Descriptor, got: int, what: str) -> None:
    if got != descriptor.size:
        raise SizeMismatchError(
            f"{what}: {descriptor.digest} should have {descriptor.size} bytes, got {got}",
            expected=str(descriptor.size),
            got=str(got),
        )


def _tag_named(name: str | None, digest: Digest) -> Reference | None:
    """Return the tag to write, if `name` has one; a digest in it must be the manifest's."""
    if name is None:
        return None
    reference = Reference.parse(name, default_registry=DEFAULT_REGISTRY)
    _check_same(reference, digest)
    return reference.without_digest() if reference.tag else None


def _check_same(reference: Reference, digest: Digest) -> None:
    if reference.digest is not None and reference.digest != digest:
        raise DigestMismatchError(
            f"{reference} cannot name {digest}", expected=str(reference.digest), got=str(digest)
        )


def _skipped(descriptor: Descriptor) -> Progress:
    size, name = descriptor.size, _shown(descriptor)
    return Progress(Action.SKIP, name, descriptor.digest, size, size)


def _shown(descriptor: Descriptor) -> str:
    return descriptor.filepath or descriptor.digest.short
