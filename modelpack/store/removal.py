"""Remove names and models, as `docker model rm` does."""

from __future__ import annotations

from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass

from modelpack.artifacts.descriptor import Descriptor
from modelpack.artifacts.digest import Digest
from modelpack.errors import (
    ConflictError,
    FormatError,
    IntegrityError,
    LockedError,
    NotFoundError,
    StoreError,
)
from modelpack.store import lookup
from modelpack.store.blobs import Blobs
from modelpack.store.filesystem import bytes_freed
from modelpack.store.index import IndexDocument, IndexFile
from modelpack.store.kept_bundles import KeptBundles
from modelpack.store.leases import Leases
from modelpack.store.reachability import reachable, read_manifest
from modelpack.store.tree import Tree


@dataclass(frozen=True, slots=True)
class Removal:
    """The result of a removal.

    `deleted` are the manifests (the model first, then its referrers), `freed` the other blobs that
    nothing else needed. `bytes_freed` leaves out files that have another name elsewhere.
    """

    untagged: tuple[str, ...] = ()
    deleted: tuple[Digest, ...] = ()
    freed: tuple[Digest, ...] = ()
    bytes_freed: int = 0


@dataclass(frozen=True, slots=True)
class Remover:
    """Removes names, models and blobs from one store."""

    tree: Tree
    blobs: Blobs
    index: IndexFile
    leases: Leases
    bundles: KeptBundles

    def remove(self, name: str, *, force: bool) -> Removal:
        """Remove a name; with the last name, or by id, remove the model.

        Unless forced, raises `ConflictError` for the id of a model with several names, and
        `LockedError` for a model in use.
        """
        self.tree.prepare()
        with self.tree.lock().held():
            document = self.index.read()
            match = document.find(name)
            model = lookup.model(document.entries, match.entry.digest)
            if match.by_name and len(model.names) > 1:
                unwanted = match.entry.name
                self.index.write(document.untagged(lambda entry: entry.name == unwanted))
                return Removal(untagged=(str(unwanted),))
            if len(model.names) > 1 and not force:
                raise ConflictError(
                    f"{name} has several names: {', '.join(model.names)}",
                    hint="remove it by name, or use --force to remove all of them",
                )
            leases = self.leases.live()
            user = next((lease for lease in leases if model.digest in lease.digests), None)
            if user is not None and not force:
                raise LockedError(
                    f"{name} ({model.digest.short}) is in use by {user.holder}",
                    hint="stop that process, or use --force",
                )
            leased = {digest for lease in leases for digest in lease.digests}
            return self._delete(document, model, leased)

    def delete_blob(self, digest: Digest) -> bool:
        """Delete a blob that nothing needs; return whether it existed.

        Raises `ConflictError` if a listed manifest needs it, `LockedError` if a lease keeps it.
        """
        self.tree.prepare()
        with self.tree.lock().held():
            if self.blobs.find(digest) is None:
                return False
            if digest in reachable(self.blobs, [e.descriptor for e in self.index.read().entries]):
                raise ConflictError(
                    f"blob {digest} belongs to a model in the store", hint="remove the model"
                )
            user = next((lease for lease in self.leases.live() if digest in lease.digests), None)
            if user is not None:
                raise LockedError(f"blob {digest} is in use by {user.holder}")
            self.blobs.delete(digest)
        return True

    def discard(self, digests: Collection[Digest]) -> None:
        """Delete the blobs that no listed manifest needs and no lease keeps."""
        if not digests:
            return
        self.tree.prepare()
        with self.tree.lock().held():
            needed = reachable(self.blobs, [e.descriptor for e in self.index.read().entries])
            needed |= {digest for lease in self.leases.live() for digest in lease.digests}
            for digest in digests:
                if digest not in needed:
                    self.blobs.delete(digest)

    def _delete(
        self, document: IndexDocument, model: lookup.StoredModel, leased: set[Digest]
    ) -> Removal:
        gone = [model.descriptor, *self._referrers(document, model.digest)]
        unneeded = self._unneeded(document, gone) - leased
        for descriptor in gone:
            document = document.without_manifest(descriptor.digest)
        # Write the index first: a listed model must have all its blobs at any time.
        self.index.write(document)
        bundles = [self.bundles.directory(digest) for digest in sorted(unneeded)]
        size = bytes_freed([*bundles, *map(self.tree.blob, unneeded)])
        for bundle in bundles:
            self.bundles.drop(bundle)
        for digest in sorted(unneeded):
            self.blobs.delete(digest)
        deleted = tuple(dict.fromkeys(descriptor.digest for descriptor in gone))
        freed = tuple(sorted(unneeded.difference(deleted)))
        return Removal(model.names, deleted, freed, size)

    def _unneeded(self, document: IndexDocument, gone: list[Descriptor]) -> set[Digest]:
        """Return the blobs that only these manifests need.

        Return nothing if another manifest is damaged, since its needs are unknown; the garbage
        collection deletes the blobs later.
        """
        going = {descriptor.digest for descriptor in gone}
        kept = [entry.descriptor for entry in document.entries if entry.digest not in going]
        try:
            needed = reachable(self.blobs, kept)
        except StoreError:
            return set()
        return self._known_needs(gone) - needed

    def _known_needs(self, manifests: list[Descriptor]) -> set[Digest]:
        found = {descriptor.digest for descriptor in manifests}
        for descriptor in manifests:
            with suppress(StoreError):
                found |= reachable(self.blobs, [descriptor])
        return found

    def _referrers(self, document: IndexDocument, digest: Digest) -> list[Descriptor]:
        """Return the untagged referrers of a manifest, their referrers, and so on."""
        by_subject: dict[Digest, list[Descriptor]] = {}
        for entry in document.entries:
            if entry.name is None and (subject := self._subject(entry)) is not None:
                by_subject.setdefault(subject, []).append(entry.descriptor)
        found: dict[Digest, Descriptor] = {}
        waiting = by_subject.pop(digest, [])
        while waiting:
            descriptor = waiting.pop(0)
            if descriptor.digest != digest:
                found[descriptor.digest] = descriptor
                waiting += by_subject.pop(descriptor.digest, [])
        return list(found.values())

    def _subject(self, entry: lookup.Entry) -> Digest | None:
        try:
            subject = read_manifest(self.blobs, entry.descriptor).subject
        except (NotFoundError, IntegrityError, FormatError):
            return None
        return subject.digest if subject else None
