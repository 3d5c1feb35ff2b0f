"""Garbage collection: deleting what no model, no live process and no recent work needs."""

from __future__ import annotations

import os
import time
from collections.abc import Collection, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from modelpack.digest import Digest
from modelpack.errors import LockedError
from modelpack.stores.abandoned import abandoned_uploads, allocated_bytes, remove_upload
from modelpack.stores.blobs import Blobs
from modelpack.stores.index import IndexFile
from modelpack.stores.kept import BUNDLES, own_bytes, remove_bundle, stale_bundles
from modelpack.stores.leases import Leases
from modelpack.stores.locks import FileLock
from modelpack.stores.os_errors import translating
from modelpack.stores.reachability import reachable, referrers
from modelpack.stores.staging import is_staged_import
from modelpack.stores.tree import Tree, labelled
from modelpack.stores.trust import Trust

#: Downloads that nobody resumed for a week are given up.
PARTIAL_SECONDS = 7 * 24 * 3600.0
_FLUSH_LIMIT = 16 * 1024**3


@dataclass(frozen=True, slots=True)
class GcReport:
    """What was deleted or, in a dry run, would be.

    `partials` are files and uploads in `ingest/`, and bundles that were kept; `kept` are
    unreferenced blobs that a lease or the grace period protects.
    """

    dry_run: bool
    removed: tuple[Digest, ...]
    partials: tuple[str, ...]
    bytes_freed: int
    kept: tuple[Digest, ...]


@dataclass(frozen=True, slots=True)
class Collector:
    """Sweeps one store."""

    tree: Tree
    blobs: Blobs
    trust: Trust
    index: IndexFile
    leases: Leases

    def collect(
        self, *, dry_run: bool, grace_seconds: float, partial_seconds: float = PARTIAL_SECONDS
    ) -> GcReport:
        """Delete unreferenced blobs not used for `grace_seconds`, and what downloads left behind.

        Roots are the index, manifests about live ones (their subject is live), and live leases.
        """
        self.tree.prepare()
        with self.tree.lock().held():
            live = self._live()
            leased = {d for lease in self.leases.live() for d in lease.digests}
            removed, kept, freed = [], [], 0
            for digest in [d for d in self.blobs.digests() if d not in live]:
                path = self.tree.blob(digest)
                if digest in leased or self._is_recent(digest, path, grace_seconds):
                    kept.append(digest)
                    continue
                removed.append(digest)
                freed += self.blobs.reclaimable(digest)
                if not dry_run:
                    self.blobs.delete(digest)
            partials = list(self._left_behind(partial_seconds, dry_run=dry_run))
            freed += sum(size for _, size in partials)
            bundles = list(self._bundles(live | leased, grace_seconds, dry_run=dry_run))
            freed += sum(size for _, size in bundles)
            if not dry_run:
                for mark in self.trust.stale_marks():
                    mark.unlink(missing_ok=True)
        if not dry_run:
            self.trust.settle(((d, self.tree.blob(d)) for d in sorted(live)), limit=_FLUSH_LIMIT)
        names = tuple(str(path.relative_to(self.tree.ingest)) for path, _ in partials)
        names += tuple(f"{BUNDLES}/{name}" for name, _ in bundles)
        return GcReport(dry_run, tuple(removed), names, freed, tuple(kept))

    def _bundles(
        self, live: Collection[Digest], grace_seconds: float, *, dry_run: bool
    ) -> Iterator[tuple[str, int]]:
        """Delete the bundles of models that have gone; tell their names and bytes."""
        for path in stale_bundles(self.tree.root, live, grace_seconds):
            with translating("delete", path):
                size = own_bytes(path)
                if not dry_run:
                    remove_bundle(path)
            yield path.name, size

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
            return time.time() - self.trust.last_used(digest, path) < grace_seconds
        except FileNotFoundError:  # a link that leads nowhere
            return False

    def _left_behind(self, partial_seconds: float, *, dry_run: bool) -> Iterator[tuple[Path, int]]:
        """Delete what no process writes any more and nobody goes on with; tell it and its bytes."""
        for path in sorted(self.tree.ingest.iterdir()):
            with translating("delete", path), suppress(FileNotFoundError, LockedError):
                found = path.stat()
                size = min(found.st_size, found.st_blocks * 512)  # a download may have gaps
                if is_staged_import(path):
                    # The importing process holds the file itself, from before we got the lock.
                    if not FileLock(path).is_free():
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
            with translating("delete", path), suppress(FileNotFoundError):
                size = allocated_bytes(path)
                if not dry_run:
                    remove_upload(path)
                yield path, size

    def _is_given_up(self, path: Path, partial_seconds: float) -> bool:
        digest = labelled(path.stem)
        if digest is None:
            return False
        done = os.path.lexists(self.tree.blob(digest))
        return done or time.time() - path.stat().st_mtime >= partial_seconds
