"""What `list` shows of each model, kept so that a store of thousands is listed at once.

`ingest/listing.json` has a few facts for each manifest, by its digest. A digest stands for the same
bytes for ever, so a fact is never out of date; what is missing is read anew, and a file that is
damaged or of another version counts as empty.
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
from modelpack.errors import (
    NotFoundError,
    StoreError,
    UsageError,
)
from modelpack.progress import Action, Progress
from modelpack.storage import BlobReader, BlobSource, Outcome, Watch
from modelpack.store import lookup
from modelpack.store.blobs import Blobs, FileBlob
from modelpack.store.filesystem import read_own, write_atomically
from modelpack.store.index import IndexDocument, IndexFile
from modelpack.store.leases import Leases
from modelpack.store.lookup import StoredModel
from modelpack.store.manifests import Manifests, check_names, check_size
from modelpack.store.tree import Tree, open_tree
from modelpack.store.verified_marks import Trust

if TYPE_CHECKING:
    from modelpack.store.downloads import Downloads
    from modelpack.store.fsck import FsckReport
    from modelpack.store.gc import GcReport
    from modelpack.store.imports import ImportedFile, Imports
    from modelpack.store.kept_bundles import KeptBundles
    from modelpack.store.manifests import Publisher
    from modelpack.store.removal import Removal, Remover

#: Grows when the facts change their meaning or their order.
VERSION: Final = 1
_MAX_BYTES: Final = 256 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class ListingCache:
    """The facts of one store, as lists of JSON values."""

    tree: Tree

    def read(self) -> dict[str, list[Any]]:
        """Return the facts by digest; who reads them checks them."""
        with suppress(OSError, ValueError, RecursionError):
            value = json.loads(read_own(self.tree.ingest / "listing.json", _MAX_BYTES))
            if isinstance(value, dict) and value.get("version") == VERSION:
                facts = value.get("models")
                if isinstance(facts, dict):
                    return facts
        return {}

    def write(self, facts: Mapping[str, list[Any]]) -> None:
        """Replace the facts; a store that cannot be written to goes without."""
        content = json.dumps({"version": VERSION, "models": facts}, separators=(",", ":")).encode()
        if len(content) > _MAX_BYTES:
            return
        path = self.tree.ingest / "listing.json"
        with suppress(OSError):
            write_atomically(path, content, by_way_of=self.tree.ingest)


# Most commands read, and are to start at once: what the others need is loaded when it is used.


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
        self._manifests = Manifests(self._tree, self._blobs, self._index)

    # Source

    def resolve(self, name: str) -> Descriptor:
        """Return the manifest that `name` means; a tag wins over an id that looks the same.

        Raises `NotFoundError`, `AmbiguousError`, `InvalidReferenceError`, and `IntegrityError` if a
        tag and a digest in `name` disagree.
        """
        try:
            return self._index.read().find(name).entry.manifest
        except NotFoundError:
            child = self._manifests.unlisted(name)
            if child is None:
                raise
            return child

    def fetch_manifest(self, descriptor: Descriptor) -> bytes:
        """Return a manifest's bytes, checked against size and digest."""
        raw = self._blobs.read(descriptor.digest, "manifest")
        check_size(descriptor, len(raw), "manifest")
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

    def receive_blob(self, descriptor: Descriptor, stream: BlobReader, watch: Watch) -> Outcome:
        """Store the blob from a stream that is read once; if that fails, nothing of it stays.

        A blob that is there is not read. Raises `DigestMismatchError`, `SizeMismatchError`,
        `StorageFullError`, or what the stream raises.
        """
        self._tree.prepare()
        if self._publisher.keep(descriptor):
            watch.report(_skipped(descriptor))
            return Outcome.EXISTED
        with self._imports.receiving(descriptor, stream, watch) as read:
            return self._publisher.publish(read)

    def list_manifests(self, named: Sequence[tuple[Descriptor, str | None]]) -> None:
        """List stored manifests, each with a name or None, in one change of the index.

        Raises as `write_manifest`; then nothing has changed.
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
        """Write a manifest and, with `name`, a full reference, tag it; the index comes last.

        `origin` is the repository (`registry/repository`) that it came from, to be remembered. A
        `partial` one may lack layers, and is marked so until a call that is not.

        Raises `NotFoundError` if a blob of it is missing, `IntegrityError` if `raw` is not what
        the descriptor says, `ManifestError` if it does not parse.
        """
        self._manifests.write(
            self._publisher, descriptor, raw, name, origin=origin, partial=partial
        )

    def missing(self, model: str | Descriptor) -> tuple[Descriptor, ...]:
        """Return the layers that a partly present model lacks; none for any other.

        `model` is a name, for which it raises as `resolve`, or the manifest's descriptor.
        """
        descriptor = self.resolve(model) if isinstance(model, str) else model
        return self._manifests.missing(descriptor)

    def referrers(self, subject: Digest, artifact_type: str | None = None) -> list[Descriptor]:
        """Return the listed manifests whose subject is this one, those of `artifact_type` if given.

        Those with a name count if they have an artifact type: models are not all read for this.
        """
        return self._manifests.referrers(subject, artifact_type)

    # Files

    def blob_path(self, digest: Digest) -> Path:
        """Return the path of a blob, to read only; raises `NotFoundError`."""
        return self._blobs.path(digest)

    def partial_path(self, digest: Digest) -> Path:
        """Return where a download of the blob is written, to read only: nothing is verified yet."""
        return self._tree.partial(digest)

    def write_bytes(self, content: bytes, media_type: str, algorithm: str = "sha256") -> Descriptor:
        """Store a small blob, and return its descriptor."""
        descriptor = Descriptor(media_type, Digest.of(content, algorithm), len(content))
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
        from modelpack.store.imports import ImportedFile

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
            check_size(descriptor, read.found.st_size, str(path))
            descriptor.digest.check_equal(read.digest, str(path))
            return self._publisher.publish(read)

    def note_links(self, digests: Iterable[Digest]) -> None:
        """Note that these blobs have hard links elsewhere, by which they can be changed.

        From now on a change is detected at the next use, by size and time, as of `import_file`. A
        store that cannot be written to goes without.
        """
        found = set(digests)
        if found and not self._tree.is_read_only():
            with suppress(StoreError):
                self._tree.prepare()
                self.bundles.note_links(found)

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

    def indexes(self) -> tuple[StoredModel, ...]:
        """Return all indexes, by name: of variants of a model, or of anything else."""
        return lookup.models(self._index.read().entries, media_types.INDEX_TYPES)

    def get(self, name: str) -> StoredModel:
        """Return the model that `name` means, with all its names; raises as `resolve`."""
        document = self._index.read()
        return lookup.model(document.entries, document.find(name).entry.digest)

    def tag(self, name: str, reference: Reference) -> Descriptor:
        """Give the model `name` another name, taking it from the model that had it.

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
        """Remove a name; with its last name, or by its id, the model and what only it needs.

        Raises as `resolve`, and `ConflictError` (unless `force`) for the id of a model with
        several names, and `LockedError` for a model that a lease keeps.
        """
        return self._remover().remove(name, force=force)

    @property
    def listing_cache(self) -> ListingCache:
        """What a list shows of each model, kept from one list to the next."""

        return ListingCache(self._tree)

    def has_file(self, digest: Digest) -> bool:
        """Return whether something has the name of the blob; whether it is good is not asked."""
        return os.path.isfile(f"{self.root}/blobs/{digest.algorithm}/{digest.encoded}")

    def touch_blob(self, digest: Digest) -> bool:
        """Return whether the blob is there; a collection counts it as recent from now on."""
        return self._publisher.touch(digest)

    def delete_blob(self, digest: Digest) -> bool:
        """Delete a blob that no listed manifest needs; return whether it was there.

        Raises `ConflictError` if one needs it, `LockedError` if a lease keeps it.
        """
        return self._remover().delete_blob(digest)

    def discard_blobs(self, digests: Collection[Digest]) -> None:
        """Delete those of the blobs that no listed manifest needs and no lease keeps."""
        self._remover().discard(digests)

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

    def note_origin(self, digests: Iterable[Digest], origin: str) -> None:
        """Remember the repository (`registry/repository`) that listed manifests came from."""
        found = tuple(digests)

        def change(document: IndexDocument) -> IndexDocument:
            for digest in found:
                document = document.annotated(digest, media_types.ORIGIN, origin)
            return document

        self.change_index(change)

    # Upkeep

    @cached_property
    def bundles(self) -> KeptBundles:
        """The models that are laid out in the store, for runtimes to open."""
        from modelpack.store.kept_bundles import KeptBundles

        return KeptBundles(self._tree, self._blobs, self._trust)

    def lease(
        self, digests: Iterable[Digest], *, growing: bool = True, inherited: bool = False
    ) -> AbstractContextManager[None]:
        """Keep these blobs from being deleted in the block, by any process.

        A `growing` lease also keeps what this object writes, or finds there, in the block: so the
        parts of a model are safe until its manifest is written. A lease on a manifest keeps its
        bundle. An `inherited` lease outlives the block's process in the program that it becomes.
        """
        return self._leases.hold(digests, growing=growing, inherited=inherited)

    def gc(self, *, dry_run: bool = False, grace_seconds: float = 3600) -> GcReport:
        """Delete the blobs that no model and no lease needs, if unused for `grace_seconds`."""
        from modelpack.store.gc import Collector

        collector = Collector(
            self._tree, self._blobs, self._trust, self._index, self._leases, self.bundles
        )
        return collector.collect(dry_run=dry_run, grace_seconds=grace_seconds)

    def drop_quarantined(self, digest: Digest) -> None:
        """Delete the damaged copy of a blob that is there again."""
        self._trust.drop_quarantined(digest)

    def fsck(self, *, fast: bool = False, watch: Watch) -> FsckReport:
        """Check everything; `fast` looks at sizes and manifests only. Damaged blobs are set aside,
        bundles that differ from their blobs are deleted.

        The report says which models are hit.
        """
        from modelpack.store.fsck import Checker

        checker = Checker(self._tree, self._blobs, self._trust, self._index, self.bundles)
        return checker.check(fast=fast, watch=watch)

    @cached_property
    def _publisher(self) -> Publisher:
        from modelpack.store.manifests import Publisher

        return Publisher(self._tree, self._blobs, self._trust, self._leases)

    @cached_property
    def _downloads(self) -> Downloads:
        from modelpack.store.downloads import Downloads

        return Downloads(self._tree, self._blobs)

    @cached_property
    def _imports(self) -> Imports:
        from modelpack.store.imports import Imports

        return Imports(self._tree)

    def _remover(self) -> Remover:
        from modelpack.store.removal import Remover

        return Remover(self._tree, self._blobs, self._index, self._leases, self.bundles)


def _skipped(descriptor: Descriptor) -> Progress:
    size, name = descriptor.size, _shown(descriptor)
    return Progress(Action.SKIP, name, descriptor.digest, size, size)


def _shown(descriptor: Descriptor) -> str:
    return descriptor.filepath or descriptor.digest.short
