"""LayoutStore: the store of models on this machine, in an OCI image layout.

Start here: every command and the embedded registry use a store through this class. `tree` lists the
files of a store, and the other modules of this package each do one of the tasks below.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from modelpack.artifacts import media_types
from modelpack.artifacts.descriptor import Descriptor
from modelpack.artifacts.digest import Digest
from modelpack.artifacts.reference import Reference
from modelpack.errors import NotFoundError, StoreError, UsageError
from modelpack.progress import Action, Progress
from modelpack.storage import BlobReader, BlobSource, Outcome, Watch
from modelpack.store import lookup
from modelpack.store.blob_places import BlobPlaces
from modelpack.store.blobs import Blobs, StoredBlob, VerifiedMarks
from modelpack.store.filesystem import read_own, write_atomically
from modelpack.store.index import IndexDocument, IndexFile
from modelpack.store.leases import Leases
from modelpack.store.lookup import StoredModel
from modelpack.store.manifests import Manifests, Publisher, check_names
from modelpack.store.tree import Tree, open_tree

# Commands that only read should start fast: other modules are imported when they are used.
if TYPE_CHECKING:
    from modelpack.store.deletion import GcReport, Removal, Remover
    from modelpack.store.fsck import FsckReport
    from modelpack.store.imports import ImportedFile
    from modelpack.store.kept_bundles import KeptBundles

#: The version of `ingest/listing.json`; increase it when the facts change their meaning or order.
LISTING_VERSION: Final = 1
_MAX_LISTING_BYTES: Final = 256 * 1024 * 1024
#: The default age in seconds up to which `gc` keeps unused blobs.
GRACE_SECONDS: Final = 3600


def default_store_root() -> Path:
    """Return $MODELPACK_STORE, or `modelpack/store` in the user's data directory."""
    configured = os.environ.get("MODELPACK_STORE")
    if configured:
        return Path(configured).expanduser()
    from platformdirs import user_data_path

    return user_data_path("modelpack") / "store"


class LayoutStore:
    """A store of models in the directory `root`; implements `modelpack.storage.Target`.

    A name is a reference (`docker.io/ai/x:latest`), a digest, a short id or a unique prefix of an
    id. Any number of threads and processes may use one store at once; readers take no locks.
    """

    def __init__(
        self, root: str | Path | None = None, *, create: bool = True, lazy: bool = False
    ) -> None:
        """Open the store at `root` (default: `default_store_root()`).

        With `create`, make a store in an absent or empty directory: at once or, if `lazy`, at the
        first write. Raises `StoreError` for any other directory.
        """
        where = default_store_root() if root is None else Path(root).expanduser()
        self._tree = open_tree(where, create=create, lazy=lazy)
        self.root: Path = self._tree.root
        self._marks = VerifiedMarks(self._tree)
        self._blobs = Blobs(self._tree, self._marks)
        self._index = IndexFile(self._tree)
        self._leases = Leases(self._tree)
        self._publisher = Publisher(self._tree, self._blobs, self._marks, self._leases)
        self._manifests = Manifests(self._tree, self._blobs, self._index, self._publisher)

    # Source

    def resolve(self, name: str) -> Descriptor:
        """Return the descriptor of the manifest called `name`; a tag wins over an equal id.

        Raises `NotFoundError`, `AmbiguousError`, `InvalidReferenceError`, and `IntegrityError` if
        the tag and the digest in `name` disagree.
        """
        try:
            return self._index.read().find(name).entry.manifest
        except NotFoundError:
            child = self._manifests.unlisted(name)
            if child is None:
                raise
            return child

    def fetch_manifest(self, descriptor: Descriptor) -> bytes:
        """Return the bytes of a manifest, verified by size and digest."""
        raw = self._blobs.read(descriptor.digest, "manifest")
        descriptor.check_size(len(raw), f"manifest {descriptor.digest}")
        return raw

    def blob(self, descriptor: Descriptor) -> BlobSource:
        """Return the blob as a source; opening it raises `NotFoundError` if it is missing."""
        return StoredBlob(self._blobs.path, descriptor.digest)

    # Target

    def has_blob(self, descriptor: Descriptor) -> bool:
        """Return whether the store has the blob, with the right size."""
        return self._blobs.holds(descriptor)

    def write_blob(self, descriptor: Descriptor, source: BlobSource, watch: Watch) -> Outcome:
        """Store the blob, resuming a partial download; read only missing bytes from `source`.

        Raises `DigestMismatchError`, `SizeMismatchError`, `StorageFullError`, or what the source
        raises.
        """
        self._prepare()
        outcome = Outcome.EXISTED
        if not self._publisher.keep(descriptor):
            from modelpack.store.downloads import Downloads

            outcome = Downloads(self._tree, self._blobs).fetch(descriptor, source, watch)
        if outcome is Outcome.EXISTED:
            watch.report(_skipped(descriptor))
        return outcome

    def receive_blob(self, descriptor: Descriptor, stream: BlobReader, watch: Watch) -> Outcome:
        """Store the blob from a stream that can be read once; keep nothing if that fails.

        The stream of a blob that the store has is not read. Raises `DigestMismatchError`,
        `SizeMismatchError`, `StorageFullError`, or what the stream raises.
        """
        from modelpack.store.imports import stage_stream

        self._prepare()
        if self._publisher.keep(descriptor):
            watch.report(_skipped(descriptor))
            return Outcome.EXISTED
        with stage_stream(self._tree, descriptor, stream, watch) as staged:
            return self._publisher.publish(staged)

    def list_manifests(self, named: Sequence[tuple[Descriptor, str | None]]) -> None:
        """Add stored manifests, each with a name or None, to the index in one change.

        Raises as `write_manifest`, and then changes nothing.
        """
        self._manifests.list_stored(named)

    def write_manifest(
        self,
        descriptor: Descriptor,
        raw: bytes,
        name: str | None = None,
        *,
        origin: str | None = None,
        partial: bool = False,
    ) -> None:
        """Write a manifest and tag it `name`, a full reference; write the index last.

        `origin` is the repository (`registry/repository`) to record as its source. A `partial`
        manifest may lack layers; it stays marked as partial until a call without `partial`.

        Raises `NotFoundError` if one of its blobs is missing, `IntegrityError` if `raw` does not
        match the descriptor, `ManifestError` if it does not parse.
        """
        self._manifests.write(descriptor, raw, name, origin=origin, partial=partial)

    def missing(self, model: str | Descriptor) -> tuple[Descriptor, ...]:
        """Return the missing layers of a partial model, nothing for any other model.

        `model` is a name (raises as `resolve`) or the manifest's descriptor.
        """
        descriptor = self.resolve(model) if isinstance(model, str) else model
        return self._manifests.missing(descriptor)

    def referrers(self, subject: Digest, artifact_type: str | None = None) -> list[Descriptor]:
        """Return the listed manifests with this subject, filtered by `artifact_type` if given.

        A tagged manifest is considered only if it has an artifact type, so that not every model
        has to be read.
        """
        return self._manifests.referrers(subject, artifact_type)

    def places(self, digest: Digest) -> list[str]:
        """Return the repositories (`registry/repository`) that had the blob, the latest first."""
        return BlobPlaces(self._tree).of(digest)

    def note_place(self, digests: Iterable[Digest], place: str) -> None:
        """Record that the repository `place` has these blobs, for `places`."""
        BlobPlaces(self._tree).note(digests, place)

    # Files

    def blob_path(self, digest: Digest) -> Path:
        """Return the path of a blob, for reading only; raises `NotFoundError`."""
        return self._blobs.path(digest)

    def partial_path(self, digest: Digest) -> Path:
        """Return the path of the blob's partial download, for reading only: it is not verified."""
        return self._tree.partial(digest)

    def write_bytes(self, content: bytes, media_type: str, algorithm: str = "sha256") -> Descriptor:
        """Store a small blob and return its descriptor."""
        descriptor = Descriptor(media_type, Digest.of(content, algorithm), len(content))
        self._tree.prepare()
        self._publisher.write(descriptor.digest, content)
        return descriptor

    def import_file(self, path: Path, watch: Watch, *, link: bool = False) -> ImportedFile:
        """Hash a file and copy it into the store, reading each byte once.

        Nothing is copied where the file system can share blocks. `link` makes a hard link instead:
        it takes no space, but a change of the file changes the blob. The store detects that by size
        and time at the next use, and moves the blob to quarantine.

        The copy is not flushed to the disk: it is verified before its first use after a reboot.
        Raises `NotFoundError`, `PackagingError`, `StorageFullError`, `SourceChangedError`.
        """
        from modelpack.store.imports import ImportedFile, stage_file

        self._prepare()
        with stage_file(self._tree, path, path.name, watch, link=link) as staged:
            outcome = self._publisher.publish(staged)
            found = staged.found
        return ImportedFile(
            staged.digest, found.st_size, outcome, found.st_dev, found.st_ino, found.st_mtime_ns
        )

    def adopt_file(
        self, path: Path, descriptor: Descriptor, watch: Watch, *, link: bool
    ) -> Outcome:
        """Import a file as the blob `descriptor`, as `import_file` does, but verified.

        Raises `DigestMismatchError` or `SizeMismatchError` if the file does not match.
        """
        from modelpack.store.imports import stage_file

        self._prepare()
        if self._publisher.keep(descriptor):
            watch.report(_skipped(descriptor))
            return Outcome.EXISTED
        algorithm, name = descriptor.digest.algorithm, _shown(descriptor)
        with stage_file(self._tree, path, name, watch, link=link, algorithm=algorithm) as staged:
            descriptor.check_size(staged.found.st_size, str(path))
            descriptor.digest.check_equal(staged.digest, str(path))
            return self._publisher.publish(staged)

    def check_outside(self, path: Path) -> None:
        """Raise `UsageError` if writing or replacing `path` would change the store."""
        root, path = self.root.resolve(), path.resolve()
        if path == root:
            relation = "is"
        elif path.is_relative_to(root):
            relation = "is inside"
        elif root.is_relative_to(path):
            relation = "contains"
        else:
            return
        raise UsageError(f"{path} {relation} the store {root}", hint="choose another place")

    def note_links(self, digests: Iterable[Digest]) -> None:
        """Mark blobs that have hard links elsewhere, through which they can be changed.

        The store detects a change at the next use, by size and time, as after `import_file`. Does
        nothing in a read-only store.
        """
        found = set(digests)
        if found and not self._tree.is_read_only():
            with suppress(StoreError):
                self._tree.prepare()
                self.bundles.note_links(found)

    def take_file(self, path: Path, digest: Digest) -> Outcome:
        """Move a verified file of the same file system into the store as the blob `digest`.

        Flushes the bytes to the disk. `path` no longer exists afterwards.
        """
        self._prepare()
        return self._publisher.take(path, digest)

    # Models

    def models(self) -> tuple[StoredModel, ...]:
        """Return all models, sorted by name; reads only the index."""
        return lookup.models(self._index.read().entries)

    def indexes(self) -> tuple[StoredModel, ...]:
        """Return all image indexes, sorted by name."""
        return lookup.models(self._index.read().entries, media_types.INDEX_TYPES)

    def get(self, name: str) -> StoredModel:
        """Return the model called `name`, with all its names; raises as `resolve`."""
        document = self._index.read()
        return lookup.model(document.entries, document.find(name).entry.digest)

    def tag(self, name: str, reference: Reference) -> Descriptor:
        """Tag the model `name` as `reference`; a model that had this tag loses it.

        Raises as `resolve`, and `UsageError` if `reference` has no tag.
        """
        if reference.tag is None:
            raise UsageError(f"{reference} has no tag", hint="write NAME:TAG")
        self._tree.prepare()
        with self._tree.lock().held():
            document = self._index.read()
            descriptor = document.find(name).entry.manifest
            check_names(reference, descriptor.digest)
            self._index.write(document.with_tag(descriptor, reference.without_digest()))
        return descriptor

    def remove(self, name: str, *, force: bool = False) -> Removal:
        """Remove a name; with the last name, or by id, the model and the blobs only it needs.

        Raises as `resolve`. Unless `force`, raises `ConflictError` for the id of a model with
        several names, and `LockedError` for a model that a lease keeps.
        """
        return self._remover().remove(name, force=force)

    def prune(self, *, dry_run: bool = False) -> Removal:
        """Remove the models that no name and no lease reaches, and the blobs only they need.

        What an image index with a name lists stays, and so do referrers of what stays. Raises
        `StoreError` if a manifest that stays is damaged.
        """
        return self._remover().prune(dry_run=dry_run)

    @property
    def listing_cache(self) -> ListingCache:
        """The cached facts that `modelpack list` shows of each model."""
        return ListingCache(self._tree)

    def has_file(self, digest: Digest) -> bool:
        """Return whether the blob's file exists, without checking its marks."""
        return os.path.isfile(f"{self.root}/blobs/{digest.algorithm}/{digest.encoded}")

    def modified_at(self, digest: Digest) -> float | None:
        """Return when a blob was stored or last reused, in seconds since 1970; None without it."""
        try:
            return os.stat(f"{self.root}/blobs/{digest.algorithm}/{digest.encoded}").st_mtime
        except OSError:
            return None

    def touch_blob(self, digest: Digest) -> bool:
        """Return whether the store has the blob; restart its grace period for `gc`."""
        return self._publisher.touch(digest)

    def delete_blob(self, digest: Digest) -> bool:
        """Delete a blob that no listed manifest needs; return whether it existed.

        Raises `ConflictError` if one needs it, `LockedError` if a lease keeps it.
        """
        return self._remover().delete_blob(digest)

    def discard_blobs(self, digests: Collection[Digest]) -> None:
        """Delete the blobs that no listed manifest needs and no lease keeps."""
        self._remover().discard(digests)

    def index(self) -> IndexDocument:
        """Return the current content of `index.json`."""
        return self._index.read()

    def change_index(self, change: Callable[[IndexDocument], IndexDocument]) -> None:
        """Replace the index by the result of `change`, under the store's lock.

        The store must have every manifest in it, as after `write_manifest`.
        """
        self._tree.prepare()
        with self._tree.lock().held():
            document = self._index.read()
            changed = change(document)
            if changed is not document:
                self._index.write(changed)

    def note_origin(self, digests: Iterable[Digest], origin: str) -> None:
        """Record the repository (`registry/repository`) that listed manifests were pulled from."""
        found = tuple(digests)

        def change(document: IndexDocument) -> IndexDocument:
            for digest in found:
                document = document.annotated(digest, media_types.ORIGIN, origin)
            return document

        self.change_index(change)

    # Maintenance

    @cached_property
    def bundles(self) -> KeptBundles:
        """The bundles of this store: model directories that runtimes open."""
        from modelpack.store.kept_bundles import KeptBundles

        return KeptBundles(self._tree, self._blobs, self._marks)

    def lease(
        self, digests: Iterable[Digest], *, growing: bool = True, inherited: bool = False
    ) -> AbstractContextManager[None]:
        """Protect these blobs from deletion by any process while the block runs.

        A `growing` lease also protects the blobs that this object writes or finds in the block: the
        parts of a model are safe until its manifest is written. A lease on a manifest protects its
        bundle. An `inherited` lease survives `exec` and ends with the new program.
        """
        return self._leases.hold(digests, growing=growing, inherited=inherited)

    def gc(self, *, dry_run: bool = False, grace_seconds: float = GRACE_SECONDS) -> GcReport:
        """Delete blobs that no model and no lease needs and that are older than `grace_seconds`."""
        from modelpack.store.deletion import Collector

        collector = Collector(
            self._tree, self._blobs, self._marks, self._index, self._leases, self.bundles
        )
        return collector.collect(dry_run=dry_run, grace_seconds=grace_seconds)

    def drop_quarantined(self, digest: Digest) -> None:
        """Delete the quarantined copy of a blob that the store has again."""
        self._marks.drop_quarantined(digest)

    def fsck(self, *, fast: bool = False, watch: Watch) -> FsckReport:
        """Check the index, all blobs and all bundles; report the models that are affected.

        `fast` checks sizes and manifests only. Damaged blobs are moved to quarantine, and bundles
        that differ from their blobs are deleted.
        """
        from modelpack.store.fsck import Checker

        self._tree.prepare()
        checker = Checker(
            self._tree, self._blobs, self._marks, self._index, self.bundles, watch, fast=fast
        )
        return checker.check()

    def _prepare(self) -> None:
        """Make the store ready for a large file."""
        from modelpack.store.imports import sweep

        self._tree.prepare()
        sweep(self._tree)

    def _remover(self) -> Remover:
        from modelpack.store.deletion import Remover

        return Remover(self._tree, self._blobs, self._index, self._leases, self.bundles)


@dataclass(frozen=True, slots=True)
class ListingCache:
    """`ingest/listing.json`: a few facts per manifest, so that `list` opens no manifest again.

    A digest always stands for the same bytes, so facts are never out of date. A damaged file, or
    one of another version, counts as empty.
    """

    tree: Tree

    def read(self) -> dict[str, list[Any]]:
        """Return the facts by digest as unchecked JSON lists."""
        with suppress(OSError, ValueError, RecursionError):
            value = json.loads(read_own(self.tree.ingest / "listing.json", _MAX_LISTING_BYTES))
            if isinstance(value, dict) and value.get("version") == LISTING_VERSION:
                facts = value.get("models")
                if isinstance(facts, dict):
                    return facts
        return {}

    def write(self, facts: Mapping[str, list[Any]]) -> None:
        """Replace the facts; do nothing where the store is not writable or the facts too many."""
        content = json.dumps(
            {"version": LISTING_VERSION, "models": facts}, separators=(",", ":")
        ).encode()
        if len(content) > _MAX_LISTING_BYTES:
            return
        path = self.tree.ingest / "listing.json"
        with suppress(OSError):
            write_atomically(path, content, by_way_of=self.tree.ingest)


def _skipped(descriptor: Descriptor) -> Progress:
    size, name = descriptor.size, _shown(descriptor)
    return Progress(Action.SKIP, name, descriptor.digest, size, size)


def _shown(descriptor: Descriptor) -> str:
    return descriptor.filepath or descriptor.digest.short
