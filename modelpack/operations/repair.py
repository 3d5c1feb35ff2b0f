"""Fetch the blobs that a check of the store found damaged or missing."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

from modelpack.artifacts import media_types
from modelpack.artifacts.descriptor import Descriptor
from modelpack.artifacts.digest import Digest
from modelpack.artifacts.manifest import parse_manifest_or_index
from modelpack.artifacts.reference import Reference
from modelpack.errors import (
    InterruptedTransferError,
    ModelpackError,
    NotFoundError,
    UnsupportedError,
)
from modelpack.hub.reference import HUB_REGISTRIES
from modelpack.operations.remote import RemoteOptions, open_repository
from modelpack.progress import Action, Progress, ProgressCallback, Stop
from modelpack.storage import Watch, watching
from modelpack.store.fsck import Fault, FsckReport
from modelpack.store.index import IndexDocument
from modelpack.store.layout import LayoutStore
from modelpack.store.manifests import successors

if TYPE_CHECKING:
    from modelpack.registry import Repository

# Blobs of a damaged manifest, and manifests of a damaged index, are found in later passes.
_PASSES = 4


@dataclass(frozen=True, slots=True)
class Failure:
    """A blob that could not be fetched, and why."""

    digest: Digest
    message: str


@dataclass(frozen=True, slots=True)
class Repaired:
    """The result of a repair, with the checks `before` and `after` it; `after` hashes no blobs.

    `restored` are the fetched blobs, `failures` those that no registry could provide.
    """

    before: FsckReport
    after: FsckReport
    restored: tuple[Descriptor, ...]
    failures: tuple[Failure, ...]

    @property
    def bytes_fetched(self) -> int:
        """The size of all restored blobs."""
        return sum(blob.size for blob in self.restored)


def repair(
    store: LayoutStore,
    *,
    source: str | Reference | None = None,
    fast: bool = False,
    remote: RemoteOptions | None = None,
    progress: ProgressCallback | None = None,
    stop: Stop | None = None,
) -> Repaired:
    """Check the store, and fetch damaged and missing blobs from the origins of their models.

    An origin is the repository that a pull recorded, or that a name of the model contains. `source`
    replaces all origins. Fetched blobs are verified. A blob that no origin has is a `Failure`, and
    remains a problem of the store.
    """
    watch = watching(progress, stop)
    place = None if source is None else Reference.parse(str(source)).name
    before = report = store.fsck(fast=fast, watch=watch)
    restored: list[Descriptor] = []
    failures: dict[Digest, Failure] = {}
    with ExitStack() as stack:

        @cache
        def opened(name: str) -> Repository:
            site = HUB_REGISTRIES.get(name.partition("/")[0])
            if site is not None:
                raise UnsupportedError(
                    f"cannot fetch from {name}: {site.title} has no digests",
                    hint="pull the model again",
                )
            where = Reference.parse(name)
            return stack.enter_context(open_repository(where, remote or RemoteOptions(), watch))

        for _ in range(_PASSES):
            bad = {p.digest for p in report.problems if p.kind in (Fault.CONTENT, Fault.MISSING)}
            wanted = _wanted(store, {d for d in bad if d is not None and d not in failures})
            if not wanted:
                break
            for descriptor, places in wanted:
                try:
                    _restore(store, descriptor, [place] if place else places, opened, watch)
                    restored.append(descriptor)
                except InterruptedTransferError:
                    raise
                except ModelpackError as error:
                    failures[descriptor.digest] = Failure(descriptor.digest, str(error))
            report = store.fsck(fast=True, watch=watch)
    after = report if report is not before else store.fsck(fast=True, watch=watch)
    return Repaired(before, after, tuple(restored), tuple(failures.values()))


def _restore(
    store: LayoutStore,
    descriptor: Descriptor,
    names: Iterable[str],
    opened: Callable[[str], Repository],
    watch: Watch,
) -> None:
    """Fetch the blob from the first repository that has it; raise the error of the last one."""
    error: ModelpackError = NotFoundError(
        f"{descriptor.digest}: unknown origin",
        hint="give the repository with --from REFERENCE",
    )
    for name in names:
        try:
            if descriptor.media_type in media_types.MANIFEST_AND_INDEX_TYPES:
                raw = opened(name).fetch_manifest(descriptor)
                store.write_bytes(raw, descriptor.media_type, descriptor.digest.algorithm)
            else:
                store.write_blob(descriptor, opened(name).blob(descriptor), watch)
        except InterruptedTransferError:
            raise
        except ModelpackError as failed:
            watch.report(Progress(Action.NOTE, name, descriptor.digest, message=str(failed)))
            error = failed
        else:
            store.drop_quarantined(descriptor.digest)
            return
    raise error


def _wanted(store: LayoutStore, bad: set[Digest]) -> list[tuple[Descriptor, tuple[str, ...]]]:
    """Return the blobs in `bad` that indexed models need, and the repositories that may have them.

    Other blobs are unused.
    """
    document = store.index()
    found: dict[Digest, tuple[Descriptor, tuple[str, ...]]] = {}
    seen: set[Digest] = set()
    for entry in document.entries:
        waiting = [entry.manifest]
        while waiting:
            descriptor = waiting.pop()
            if descriptor.digest in bad and descriptor.digest not in found:
                found[descriptor.digest] = (descriptor, _places(document, entry.digest))
            if (
                descriptor.media_type not in media_types.MANIFEST_AND_INDEX_TYPES
                or descriptor.digest in seen
            ):
                continue
            seen.add(descriptor.digest)
            try:
                raw = store.fetch_manifest(descriptor)
                waiting += successors(parse_manifest_or_index(raw, str(descriptor.digest)))
            except ModelpackError:  # damaged: restored in this pass, or reported by the check
                continue
    return list(found.values())


def _places(document: IndexDocument, digest: Digest) -> tuple[str, ...]:
    """Return the repositories that may have a manifest: its origins and those in its names."""
    names = [
        name
        for entry in document.entries_of(digest)
        for name in (entry.origin, entry.reference.name if entry.reference else None)
    ]
    return tuple(dict.fromkeys(name for name in names if name is not None))
