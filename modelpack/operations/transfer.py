"""Transfer models between stores, registries and the hub.

All operations that write a model or a referrer call `transfer_model`. Its `Source` and `Target`
may be a store, a registry or memory. `run_all` runs independent parts of one call
in threads and stops them together.
"""

from __future__ import annotations

import concurrent.futures
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Final, TypeVar

from modelpack.artifacts.descriptor import Descriptor
from modelpack.artifacts.digest import Digest
from modelpack.artifacts.manifest import Index, parse_manifest_or_index
from modelpack.errors import InterruptedTransferError, UnsupportedError
from modelpack.progress import SIGNAL_SECONDS, Action, Progress, RunningTasks, Stop
from modelpack.storage import Outcome, PlacedTarget, ReferrerSource, Source, Target, Watch

T = TypeVar("T")


def run_all(tasks: Sequence[Callable[[], T]], workers: int, stop: Stop) -> list[T]:
    """Return the results of `tasks`, in their order, run by up to `workers` threads.

    The first failure stops the other tasks, and is raised when all of them have ended, so that no
    task continues in the background after an error. Ctrl-C does the same.
    """
    if len(tasks) <= 1 or workers <= 1:
        return [task() for task in tasks]
    begun = RunningTasks()

    def run(task: Callable[[], T]) -> T:
        if not begun.begin():
            raise InterruptedTransferError("stopped on request")
        try:
            return task()
        finally:
            begun.end()

    with concurrent.futures.ThreadPoolExecutor(min(workers, len(tasks)), "modelpack") as executor:
        try:
            futures = [executor.submit(run, task) for task in tasks]
            running = set(futures)
            while running:
                done, running = concurrent.futures.wait(
                    running, SIGNAL_SECONDS, return_when=concurrent.futures.FIRST_EXCEPTION
                )
                for future in futures:
                    if future in done:
                        future.result()  # raises what its task raised
            return [future.result() for future in futures]
        except BaseException:
            stop.request()
            executor.shutdown(wait=False, cancel_futures=True)
            begun.wait()
            raise


#: The largest number of manifests that one index may lead to, and the deepest nesting of indexes.
MAX_MANIFESTS: Final = 1_000
MAX_DEPTH: Final = 4
#: The largest number of referrers of one model. Anyone with write access to a repository may attach
#: manifests to a model in it, so the number must be limited.
MAX_REFERRERS = 10_000


@dataclass(frozen=True, slots=True)
class TransferOptions:
    """How to transfer a model: `concurrency` blobs at a time, reporting to `watch`.

    `with_referrers` adds signatures and other referrers, before the tag is set. `blobs` limits the
    transfer to these blobs of a manifest. `write` replaces the target's `write_manifest` and the
    tag for a target that keeps more than both; referrers then follow the tag.
    """

    watch: Watch
    concurrency: int = 1
    with_referrers: bool = False
    blobs: Sequence[Descriptor] | None = None
    write: Callable[[], None] | None = None


@dataclass(frozen=True, slots=True)
class Transfer:
    """Counts of the blobs of one manifest; `bytes_written` are the bytes sent or stored."""

    descriptor: Descriptor
    written: int
    existed: int
    mounted: int
    bytes_written: int


@dataclass(frozen=True, slots=True)
class TransferredModel:
    """The counts of a transferred model and of each of its transferred referrers."""

    model: Transfer
    referrers: tuple[Transfer, ...] = ()


def transfer_model(
    source: Source,
    target: Target,
    descriptor: Descriptor,
    raw: bytes,
    name: str | None,
    options: TransferOptions,
) -> TransferredModel:
    """Transfer the manifest or index `raw` and everything it lists to `target`, tagged `name`.

    Blobs come first, then the manifest, then referrers if `options` ask for them; the tag is set
    last, so that a target never lists an incomplete model. The manifests of an index are written
    before the index. Raises `UnsupportedError` for indexes that are nested too deeply or list too
    many manifests.
    """
    tree = _ManifestTree(source, target, options)
    if not options.with_referrers:
        return TransferredModel(tree.transfer(descriptor, raw, name))
    assert isinstance(source, ReferrerSource)
    model = tree.transfer(descriptor, raw, None)
    referrers = _transfer_referrers(source, target, descriptor, raw, options)
    if options.write is None:
        target.write_manifest(descriptor, raw, name)
    return TransferredModel(model, referrers)


@dataclass(frozen=True, slots=True)
class _ManifestTree:
    """The transfer of a manifest or an index; `done` are the digests transferred so far."""

    source: Source
    target: Target
    options: TransferOptions
    done: set[Digest] = field(default_factory=set)

    def transfer(
        self, descriptor: Descriptor, raw: bytes, name: str | None, depth: int = 0
    ) -> Transfer:
        self.done.add(descriptor.digest)
        if depth > MAX_DEPTH or len(self.done) > MAX_MANIFESTS:
            raise UnsupportedError(
                f"{descriptor.digest}: the index exceeds {MAX_MANIFESTS} manifests or "
                f"{MAX_DEPTH} levels of indexes"
            )
        document = parse_manifest_or_index(
            raw, f"manifest {descriptor.digest}", media_type=descriptor.media_type
        )
        if isinstance(document, Index):
            counts = [
                self.transfer(child, self.source.fetch_manifest(child), None, depth + 1)
                for child in document.manifests
                if child.digest not in self.done
            ]
            done = Transfer(
                descriptor,
                sum(count.written for count in counts),
                sum(count.existed for count in counts),
                sum(count.mounted for count in counts),
                sum(count.bytes_written for count in counts),
            )
        else:
            blobs = self.options.blobs
            wanted = document.unique_blobs if blobs is None else blobs
            done = self._transfer_blobs(descriptor, wanted)
        if self.options.write is None:
            self.target.write_manifest(descriptor, raw, name)
        else:
            self.options.write()
        return done

    def _transfer_blobs(self, descriptor: Descriptor, wanted: Iterable[Descriptor]) -> Transfer:
        # Start with the largest blob, which usually determines the total time.
        blobs = sorted(wanted, key=lambda blob: blob.size, reverse=True)
        tasks = [partial(self._transfer_blob, blob) for blob in blobs]
        outcomes = run_all(tasks, self.options.concurrency, self.options.watch.stop)
        self._note_place(blobs)
        count = Counter(outcomes)
        sizes = zip(blobs, outcomes, strict=True)
        return Transfer(
            descriptor,
            count[Outcome.WRITTEN],
            count[Outcome.EXISTED],
            count[Outcome.MOUNTED],
            sum(blob.size for blob, outcome in sizes if outcome is Outcome.WRITTEN),
        )

    def _note_place(self, blobs: Iterable[Descriptor]) -> None:
        """Record in the store, if one is involved, that the repository has these blobs."""
        for store, other in ((self.source, self.target), (self.target, self.source)):
            place: str | None = getattr(other, "place", None)
            if place is not None and isinstance(store, PlacedTarget):
                store.note_place([blob.digest for blob in blobs], place)

    def _transfer_blob(self, blob: Descriptor) -> Outcome:
        watch = self.options.watch
        watch.stop.check()
        name = blob.filepath or blob.digest.short
        if self.target.has_blob(blob):
            watch.report(Progress(Action.SKIP, name, blob.digest, blob.size, blob.size))
            return Outcome.EXISTED
        mount = getattr(self.target, "mount_blob", None)
        if mount is not None and mount(blob, self.source):
            watch.report(Progress(Action.MOUNT, name, blob.digest, blob.size, blob.size))
            return Outcome.MOUNTED
        return self.target.write_blob(blob, self.source.blob(blob), watch)


def _transfer_referrers(
    source: ReferrerSource,
    target: Target,
    descriptor: Descriptor,
    raw: bytes,
    options: TransferOptions,
) -> tuple[Transfer, ...]:
    """Transfer all direct and indirect referrers of the manifest `raw`, which `target` already has.

    This includes the referrers of an index's manifests. Each subject precedes its referrers. Raises
    `UnsupportedError` for more than `MAX_REFERRERS`.
    """
    each = TransferOptions(options.watch, options.concurrency)
    done: list[Transfer] = []
    seen: set[Digest] = set()
    waiting = _subjects(descriptor, raw)
    while waiting:
        subject = waiting.pop(0)
        for referrer in source.referrers(subject):
            options.watch.stop.check()
            if referrer.digest in seen:
                continue
            seen.add(referrer.digest)
            if len(seen) > MAX_REFERRERS:
                raise UnsupportedError(
                    f"has more than {MAX_REFERRERS} referrers",
                    path=str(descriptor.digest),
                    hint="transfer the model without its referrers",
                )
            content = source.fetch_manifest(referrer)
            done.append(_ManifestTree(source, target, each).transfer(referrer, content, None))
            waiting += _subjects(referrer, content)
    return tuple(done)


def _subjects(descriptor: Descriptor, raw: bytes) -> list[Digest]:
    """Return the digests whose referrers to list: that of the manifest and those in an index."""
    document = parse_manifest_or_index(
        raw, f"manifest {descriptor.digest}", media_type=descriptor.media_type
    )
    children = [child.digest for child in document.manifests] if isinstance(document, Index) else []
    return [descriptor.digest, *children]
