"""Deletion from a store: models by name, as `docker model rm` does, and garbage collection.

`Remover` deletes what the user names and the blobs that only it needs. `Collector` deletes what no
model, no live process and no recent work needs, including the files of abandoned uploads, which the
embedded registry (`modelpack.registry_server.uploads`) writes to `ingest/uploads/`.
"""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Collection, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from modelpack.artifacts import media_types
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
from modelpack.store.blobs import Blobs, VerifiedMarks
from modelpack.store.filesystem import FileLock, bytes_freed, delete_tree, is_draft, map_os_errors
from modelpack.store.imports import is_ingest_file
from modelpack.store.index import IndexDocument, IndexFile
from modelpack.store.kept_bundles import KeptBundles
from modelpack.store.leases import Leases
from modelpack.store.manifests import reachable, read_manifest, referrers
from modelpack.store.tree import Tree, labelled_digest


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
        """Do as `LayoutStore.remove`."""
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
        """Do as `LayoutStore.delete_blob`."""
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
        """Do as `LayoutStore.discard_blobs`."""
        if not digests:
            return
        self.tree.prepare()
        with self.tree.lock().held():
            needed = reachable(self.blobs, [e.descriptor for e in self.index.read().entries])
            needed |= {digest for lease in self.leases.live() for digest in lease.digests}
            for digest in digests:
                if digest not in needed:
                    self.blobs.delete(digest)

    def prune(self, *, dry_run: bool) -> Removal:
        """Do as `LayoutStore.prune`."""
        self.tree.prepare()
        with self.tree.lock().held():
            document = self.index.read()
            leased = {digest for lease in self.leases.live() for digest in lease.digests}
            gone = self._without_name(document, leased)
            return self._drop(document, gone, leased, dry_run=dry_run) if gone else Removal()

    def _without_name(self, document: IndexDocument, leased: set[Digest]) -> list[Descriptor]:
        """Return the listed manifests that no name and no lease reaches.

        Referrers of kept manifests are kept, and the bases of kept adapters. So are manifests that
        cannot be read, since their subject is unknown. Raises `StoreError` if a kept manifest is
        damaged.
        """
        names = {entry.digest for entry in document.entries if entry.name is not None}
        roots = [e.manifest for e in document.entries if e.digest in names or e.digest in leased]
        kept = reachable(self.blobs, roots)
        rest = {e.digest: e.manifest for e in document.entries if e.digest not in kept}
        subjects: dict[Digest, Digest | None] = {}
        bases: dict[Digest, str] = {}
        for entry in document.entries:
            with suppress(NotFoundError, IntegrityError, FormatError):
                manifest = read_manifest(self.blobs, entry.manifest)
                subjects[entry.digest] = manifest.subject.digest if manifest.subject else None
                bases[entry.digest] = manifest.annotations.get(media_types.BASE_DIGEST, "")
        found = [descriptor for digest, descriptor in rest.items() if digest not in subjects]
        while True:
            kept |= reachable(self.blobs, found)
            needed = {base for digest, base in bases.items() if digest in kept}
            found = [
                descriptor
                for digest, descriptor in rest.items()
                if digest not in kept and (subjects.get(digest) in kept or str(digest) in needed)
            ]
            if not found:
                break
        return [descriptor for digest, descriptor in rest.items() if digest not in kept]

    def _delete(
        self, document: IndexDocument, model: lookup.StoredModel, leased: set[Digest]
    ) -> Removal:
        gone = [model.descriptor, *self._referrers(document, {model.digest})]
        if model.descriptor.media_type in media_types.INDEX_TYPES:
            gone += self._parts(document, gone)
        return replace(self._drop(document, gone, leased), untagged=model.names)

    def _drop(
        self,
        document: IndexDocument,
        gone: list[Descriptor],
        leased: set[Digest],
        *,
        dry_run: bool = False,
    ) -> Removal:
        """Delete manifests and the blobs that only they need, except `leased` ones."""
        unneeded = self._unneeded(document, gone) - leased
        bundles = [self.bundles.directory(digest) for digest in sorted(unneeded)]
        size = bytes_freed([*bundles, *map(self.tree.blob, unneeded)])
        if not dry_run:
            for descriptor in gone:
                document = document.without_manifest(descriptor.digest)
            # Write the index first: a listed model must have all its blobs at any time.
            self.index.write(document)
            for bundle in bundles:
                self.bundles.drop(bundle)
            for digest in sorted(unneeded):
                self.blobs.delete(digest)
        deleted = tuple(dict.fromkeys(descriptor.digest for descriptor in gone))
        freed = tuple(sorted(unneeded.difference(deleted)))
        return Removal((), deleted, freed, size)

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
        unneeded = set(going)
        for descriptor in gone:
            with suppress(StoreError):
                unneeded |= reachable(self.blobs, [descriptor])
        return unneeded - needed

    def _parts(self, document: IndexDocument, gone: list[Descriptor]) -> list[Descriptor]:
        """Return the manifests that only the index `gone[0]` needs, and their referrers.

        Earlier versions listed the manifests of an index in `index.json`.
        """
        with suppress(StoreError):
            listed = reachable(self.blobs, gone[:1]) - {gone[0].digest}
            parts = list(document.bare(sorted(listed)))
            dying = self._unneeded(document, [*gone, *parts])
            parts = [part for part in parts if part.digest in dying]
            return [*parts, *self._referrers(document, dying - {one.digest for one in gone})]
        return []

    def _referrers(self, document: IndexDocument, subjects: set[Digest]) -> list[Descriptor]:
        """Return the untagged referrers of manifests, their referrers, and so on."""
        by_subject: dict[Digest, list[Descriptor]] = {}
        for entry in document.entries:
            if entry.name is None:
                with suppress(NotFoundError, IntegrityError, FormatError):
                    subject = read_manifest(self.blobs, entry.descriptor).subject
                    if subject is not None:
                        by_subject.setdefault(subject.digest, []).append(entry.descriptor)
        found: dict[Digest, Descriptor] = {}
        waiting = [one for subject in sorted(subjects) for one in by_subject.pop(subject, [])]
        while waiting:
            descriptor = waiting.pop(0)
            if descriptor.digest not in subjects:
                found[descriptor.digest] = descriptor
                waiting += by_subject.pop(descriptor.digest, [])
        return list(found.values())


#: Age in seconds at which a partial download counts as abandoned.
PARTIAL_SECONDS = 7 * 24 * 3600.0


@dataclass(frozen=True, slots=True)
class GcReport:
    """What was deleted or, in a dry run, would be deleted.

    `partials` are files and uploads in `ingest/`, bundles of removed models, and damaged copies of
    blobs that were stored again or that no model needs. `kept` are unreferenced blobs that a lease
    or the grace period protects. `bytes_freed` leaves out files that have another name elsewhere.
    """

    dry_run: bool
    removed: tuple[Digest, ...]
    partials: tuple[str, ...]
    bytes_freed: int
    kept: tuple[Digest, ...]


@dataclass(frozen=True, slots=True)
class Collector:
    """The garbage collector of one store."""

    tree: Tree
    blobs: Blobs
    marks: VerifiedMarks
    index: IndexFile
    leases: Leases
    bundles: KeptBundles

    def collect(self, *, dry_run: bool, grace_seconds: float) -> GcReport:
        """Delete unreferenced blobs unused for `grace_seconds`, and abandoned partial files.

        The roots are the index, the referrers of live manifests, and the leases of live processes.
        """
        self.tree.prepare()
        with self.tree.lock().held():
            live = self._live()
            leased = {d for lease in self.leases.live() for d in lease.digests}
            removed, kept = [], []
            stale = self.bundles.stale(live | leased)
            left_over = self.bundles.left_over(delete=not dry_run)
            for digest in [d for d in self.blobs.digests() if d not in live]:
                path = self.tree.blob(digest)
                if path.is_dir():
                    continue  # `fsck` reports it
                if digest in leased or self._is_recent(digest, path, grace_seconds):
                    kept.append(digest)
                    continue
                removed.append(digest)
            damaged = list(self._unneeded_damage(live))
            freed = bytes_freed(
                [*stale, *left_over.values(), *damaged, *map(self.tree.blob, removed)]
            )
            if not dry_run:
                for path in damaged:
                    path.unlink(missing_ok=True)
                for path in stale:
                    self.bundles.drop(path)
                for path in left_over.values():
                    delete_tree(path)
                for digest in removed:
                    self.blobs.delete(digest)
            partials = list(self._left_behind(dry_run=dry_run))
            freed += sum(size for _, size in partials)
            if not dry_run:
                for mark in self.marks.stale_marks():
                    mark.unlink(missing_ok=True)
        if not dry_run:
            self.marks.settle((d, self.tree.blob(d)) for d in sorted(live))
        names = tuple(str(path.relative_to(self.tree.ingest)) for path, _ in partials)
        names += tuple(f"{self.tree.quarantine.name}/{path.name}" for path in damaged)
        names += tuple(f"{self.tree.bundle_ingest.name}/{name}" for name in left_over)
        names += tuple(f"{self.tree.bundles.name}/{path.name}" for path in stale)
        return GcReport(dry_run, tuple(removed), names, freed, tuple(kept))

    def _unneeded_damage(self, live: Collection[Digest]) -> Iterator[Path]:
        """Yield the damaged blobs that were stored again, and those that no model needs."""
        if not self.tree.quarantine.is_dir():
            return
        for path in sorted(self.tree.quarantine.iterdir()):
            digest = None if path.is_dir() else labelled_digest(path.name)
            if digest is not None and (digest not in live or self.tree.blob(digest).is_file()):
                yield path

    def _live(self) -> set[Digest]:
        live = reachable(self.blobs, [entry.descriptor for entry in self.index.read().entries])
        while True:
            candidates = [digest for digest in self.blobs.digests() if digest not in live]
            about = referrers(self.blobs, candidates, live)
            if not about:
                return live
            live |= reachable(self.blobs, about)

    def _is_recent(self, digest: Digest, path: Path, grace_seconds: float) -> bool:
        try:
            return time.time() - self.marks.last_used(digest, path) < grace_seconds
        except FileNotFoundError:  # a dangling link
            return False

    def _left_behind(self, *, dry_run: bool) -> Iterator[tuple[Path, int]]:
        """Delete abandoned files of `ingest/`; yield the path and size of each."""
        for path in sorted(self.tree.ingest.iterdir()):
            with map_os_errors("delete", path), suppress(FileNotFoundError, LockedError):
                found = path.lstat()
                if not stat.S_ISREG(found.st_mode):
                    continue
                size = min(found.st_size, found.st_blocks * 512)  # a download may have gaps
                if is_ingest_file(path):
                    # The importing process locks the file itself while it holds the store's lock.
                    if not FileLock(path).is_free():
                        continue
                    if not dry_run:
                        path.unlink()
                elif is_draft(path):
                    if time.time() - found.st_mtime < PARTIAL_SECONDS:
                        continue
                    if not dry_run:
                        path.unlink()
                elif path.suffix == ".part" and self._is_given_up(path):
                    lock = FileLock(path.with_suffix(".lock"))
                    if dry_run and not lock.is_free():
                        continue
                    if not dry_run:
                        with lock.held(patience=0, remove=True):
                            path.unlink()
                            path.with_suffix(".json").unlink(missing_ok=True)
                            path.with_suffix(".json.tmp").unlink(missing_ok=True)
                else:
                    continue
                yield path, size
        for path in abandoned_uploads(self.tree.uploads):
            with map_os_errors("delete", path), suppress(FileNotFoundError):
                files = path.iterdir() if path.is_dir() else [path]
                size = sum(file.stat().st_blocks * 512 for file in files)
                if not dry_run:
                    delete_tree(path)
                yield path, size

    def _is_given_up(self, path: Path) -> bool:
        digest = labelled_digest(path.stem)
        if digest is None:
            return False
        done = os.path.lexists(self.tree.blob(digest))
        return done or time.time() - path.stat().st_mtime >= PARTIAL_SECONDS


#: Seconds after which an upload that received nothing is dropped.
EXPIRY: Final = 24 * 3600


def abandoned_uploads(directory: Path) -> Iterator[Path]:
    """Yield the uploads in `directory` that received nothing for `EXPIRY` seconds.

    After a crash, one may be a part of a session, or a single file.
    """
    for path in sorted(directory.glob("*")):
        with suppress(FileNotFoundError):  # it has just ended
            if idle_seconds(path) > EXPIRY:
                yield path


def idle_seconds(path: Path) -> float:
    """Return how long ago the session at `path` last received bytes; raises `FileNotFoundError`."""
    data = path / "data"
    try:
        found = data.stat()
    except (FileNotFoundError, NotADirectoryError):
        found = path.stat()
    return time.time() - found.st_mtime
