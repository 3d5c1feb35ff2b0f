"""Garbage collection: delete what no model, no live process and no recent work needs."""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Collection, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from modelpack.artifacts.digest import Digest
from modelpack.errors import LockedError
from modelpack.store.blobs import Blobs
from modelpack.store.filesystem import bytes_freed, is_draft, map_os_errors
from modelpack.store.imports import is_ingest_file
from modelpack.store.index import IndexFile
from modelpack.store.kept_bundles import KeptBundles
from modelpack.store.leases import Leases
from modelpack.store.locks import FileLock
from modelpack.store.reachability import reachable, referrers
from modelpack.store.tree import Tree, labelled_digest
from modelpack.store.upload_sessions import abandoned_uploads, allocated_bytes, remove_upload
from modelpack.store.verified_marks import VerifiedMarks

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

    def collect(
        self, *, dry_run: bool, grace_seconds: float, partial_seconds: float = PARTIAL_SECONDS
    ) -> GcReport:
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
                    self.bundles.remove(path)
                for digest in removed:
                    self.blobs.delete(digest)
            partials = list(self._left_behind(partial_seconds, dry_run=dry_run))
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
            digest = labelled_digest(path.name)
            if path.is_dir():
                continue
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

    def _left_behind(self, partial_seconds: float, *, dry_run: bool) -> Iterator[tuple[Path, int]]:
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
                    if time.time() - found.st_mtime < partial_seconds:
                        continue
                    if not dry_run:
                        path.unlink()
                elif path.suffix == ".part" and self._is_given_up(path, partial_seconds):
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
                size = allocated_bytes(path)
                if not dry_run:
                    remove_upload(path)
                yield path, size

    def _is_given_up(self, path: Path, partial_seconds: float) -> bool:
        digest = labelled_digest(path.stem)
        if digest is None:
            return False
        done = os.path.lexists(self.tree.blob(digest))
        return done or time.time() - path.stat().st_mtime >= partial_seconds
