"""Fetch the blobs that a check of the store found damaged or missing."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass
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
from modelpack.hub.reference import HUB_REGISTRY
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
    place = None if source is None else _name(source)
    before = report = store.fsck(fast=fast, watch=watch)
    restored: list[Descriptor] = []
    failures: dict[Digest, Failure] = {}
    with ExitStack() as stack:
        places = _Places(stack, remote or RemoteOptions(), watch)
        for _ in range(_PASSES):
            bad = {p.digest for p in report.problems if p.kind in (Fault.CONTENT, Fault.MISSING)}
            wanted = _wanted(store, {d for d in bad if d is not None and d not in failures})
            if not wanted:
                break
            for want in wanted:
                try:
                    _restore(store, want, [place] if place else want.places, places, watch)
                    restored.append(want.descriptor)
                except InterruptedTransferError:
                    raise
                except ModelpackError as error:
                    failures[want.descriptor.digest] = Failure(want.descriptor.digest, str(error))
            report = store.fsck(fast=True, watch=watch)
    after = report if report is not before else store.fsck(fast=True, watch=watch)
    return Repaired(before, after, tuple(restored), tuple(failures.values()))


@dataclass(frozen=True, slots=True)
class _Wanted:
    """A blob to fetch, and the repositories that may have it."""

    descriptor: Descriptor
    places: tuple[str, ...]


class _Places:
    """Open repositories by `registry/repository`; each is opened on first use."""

    def __init__(self, stack: ExitStack, options: RemoteOptions, watch: Watch) -> None:
        self._stack = stack
        self._options = options
        self._watch = watch
        self._open: dict[str, Repository] = {}

    def __getitem__(self, name: str) -> Repository:
        if name not in self._open:
            if name.startswith(f"{HUB_REGISTRY}/"):
                raise UnsupportedError(
                    f"cannot fetch from {name}: the Hugging Face Hub has no digests",
                    hint="pull the model again",
                )
            opened = open_repository(Reference.parse(name), self._options, self._watch)
            self._open[name] = self._stack.enter_context(opened)
        return self._open[name]


def _restore(
    store: LayoutStore, want: _Wanted, names: Iterable[str], places: _Places, watch: Watch
) -> None:
    """Fetch the blob from the first repository that has it; raise the error of the last one."""
    descriptor = want.descriptor
    error: ModelpackError = NotFoundError(
        f"{descriptor.digest}: unknown origin",
        hint="give the repository with --from REFERENCE",
    )
    for name in names:
        try:
            if descriptor.media_type in media_types.MANIFEST_AND_INDEX_TYPES:
                raw = places[name].fetch_manifest(descriptor)
                store.write_bytes(raw, descriptor.media_type, descriptor.digest.algorithm)
            else:
                store.write_blob(descriptor, places[name].blob(descriptor), watch)
        except InterruptedTransferError:
            raise
        except ModelpackError as failed:
            watch.report(Progress(Action.NOTE, name, descriptor.digest, message=str(failed)))
            error = failed
        else:
            store.drop_quarantined(descriptor.digest)
            return
    raise error


def _wanted(store: LayoutStore, bad: set[Digest]) -> list[_Wanted]:
    """Return the blobs in `bad` that models in the index need; other blobs are unused."""
    document = store.index()
    found: dict[Digest, _Wanted] = {}
    seen: set[Digest] = set()
    for entry in document.entries:
        waiting = [entry.manifest]
        while waiting:
            descriptor = waiting.pop()
            if descriptor.digest in bad and descriptor.digest not in found:
                places = _places(document, entry.digest)
                found[descriptor.digest] = _Wanted(descriptor, places)
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
    found: dict[str, None] = {}
    for entry in document.entries_of(digest):
        for name in (entry.origin, entry.reference.name if entry.reference else None):
            if name is not None:
                found[name] = None
    return tuple(found)


def _name(source: str | Reference) -> str:
    return (Reference.parse(source) if isinstance(source, str) else source).name
