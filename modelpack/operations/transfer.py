"""Run the independent parts of one call side by side, and stop them together."""

from __future__ import annotations

import concurrent.futures
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Final, TypeVar

from modelpack.artifacts.descriptor import Descriptor
from modelpack.artifacts.digest import Digest
from modelpack.artifacts.manifest import Index, Manifest, parse_manifest_or_index
from modelpack.errors import UnsupportedError
from modelpack.progress import Action, Progress, Stop
from modelpack.storage import Outcome, ReferrerSource, Source, Target, Watch

T = TypeVar("T")


def run_all(tasks: Sequence[Callable[[], T]], workers: int, stop: Stop) -> list[T]:
    """Return the results of `tasks`, in their order, run by up to `workers` threads.

    The first failure asks the others to stop and is raised once all of them have ended, so that
    nothing goes on in the background after an error. Ctrl-C does the same.
    """
    if len(tasks) <= 1 or workers <= 1:
        return [task() for task in tasks]
    with concurrent.futures.ThreadPoolExecutor(min(workers, len(tasks)), "modelpack") as executor:
        futures = [executor.submit(task) for task in tasks]
        try:
            done, _ = concurrent.futures.wait(
                futures, return_when=concurrent.futures.FIRST_EXCEPTION
            )
            failed = next((f for f in futures if f in done and f.exception() is not None), None)
            if failed is not None:
                failed.result()
            return [future.result() for future in futures]
        except BaseException:
            stop.request()
            for future in futures:
                future.cancel()
            raise


#: Manifests of one index, and how deep indexes may be in it.
MAX_MANIFESTS: Final = 1_000
MAX_DEPTH: Final = 4


@dataclass(frozen=True, slots=True)
class Transfer:
    """What a transfer did. `bytes_written` counts blobs that had to be sent or stored."""

    descriptor: Descriptor
    written: int
    existed: int
    mounted: int
    bytes_written: int


def transfer(
    source: Source,
    target: Target,
    descriptor: Descriptor,
    raw: bytes,
    name: str | None,
    *,
    concurrency: int,
    watch: Watch,
) -> Transfer:
    """Have the manifest `raw` and all it names in `target`, tagged `name`; return what was done.

    Blobs first, the manifest last, so that a target never shows a model with a part missing. The
    manifests of an index are brought before the index itself, each once. Raises `UnsupportedError`
    for indexes that are nested too deeply or list too much.
    """
    return _transfer(source, target, descriptor, raw, name, concurrency, watch, 0, set())


def _transfer(
    source: Source,
    target: Target,
    descriptor: Descriptor,
    raw: bytes,
    name: str | None,
    concurrency: int,
    watch: Watch,
    depth: int,
    done: set[Digest],
) -> Transfer:
    done.add(descriptor.digest)
    if depth > MAX_DEPTH or len(done) > MAX_MANIFESTS:
        raise UnsupportedError(
            f"{descriptor.digest}: an index may hold {MAX_MANIFESTS} manifests, and indexes "
            f"{MAX_DEPTH} deep"
        )
    document = parse_manifest_or_index(
        raw, f"manifest {descriptor.digest}", media_type=descriptor.media_type
    )
    if isinstance(document, Index):
        counts = [
            _transfer(
                source,
                target,
                child,
                source.fetch_manifest(child),
                None,
                concurrency,
                watch,
                depth + 1,
                done,
            )
            for child in document.manifests
            if child.digest not in done
        ]
        target.write_manifest(descriptor, raw, name)
        return Transfer(
            descriptor,
            sum(count.written for count in counts),
            sum(count.existed for count in counts),
            sum(count.mounted for count in counts),
            sum(count.bytes_written for count in counts),
        )
    return _transfer_manifest(source, target, document, descriptor, name, concurrency, watch)


def _transfer_manifest(
    source: Source,
    target: Target,
    manifest: Manifest,
    descriptor: Descriptor,
    name: str | None,
    concurrency: int,
    watch: Watch,
) -> Transfer:
    done = transfer_blobs(
        source, target, descriptor, manifest.unique_blobs, concurrency=concurrency, watch=watch
    )
    target.write_manifest(descriptor, manifest.raw, name)
    return done


def transfer_blobs(
    source: Source,
    target: Target,
    descriptor: Descriptor,
    wanted: Iterable[Descriptor],
    *,
    concurrency: int,
    watch: Watch,
) -> Transfer:
    """Have the `wanted` blobs of the manifest `descriptor` in `target`; return what was done."""
    # The largest first: the last to finish decides how long it all takes.
    blobs = sorted(wanted, key=lambda blob: blob.size, reverse=True)
    tasks = [partial(_have_blob, source, target, blob, watch) for blob in blobs]
    outcomes = run_all(tasks, concurrency, watch.stop)
    count = Counter(outcomes)
    sizes = zip(blobs, outcomes, strict=True)
    return Transfer(
        descriptor,
        count[Outcome.WRITTEN],
        count[Outcome.EXISTED],
        count[Outcome.MOUNTED],
        sum(blob.size for blob, outcome in sizes if outcome is Outcome.WRITTEN),
    )


def _have_blob(source: Source, target: Target, blob: Descriptor, watch: Watch) -> Outcome:
    watch.stop.check()
    name = blob.filepath or blob.digest.short
    if target.has_blob(blob):
        watch.report(Progress(Action.SKIP, name, blob.digest, blob.size, blob.size))
        return Outcome.EXISTED
    mount = getattr(target, "mount_blob", None)
    if mount is not None and mount(blob, source):
        watch.report(Progress(Action.MOUNT, name, blob.digest, blob.size, blob.size))
        return Outcome.MOUNTED
    return target.write_blob(blob, source.blob(blob), watch)


#: Whoever may write to a repository may attach things to a model in it: there has to be an end.
MAX_REFERRERS = 10_000


def transfer_referrers(
    source: ReferrerSource,
    target: Target,
    descriptor: Descriptor,
    raw: bytes,
    *,
    concurrency: int,
    watch: Watch,
) -> tuple[Transfer, ...]:
    """Have in `target` all that is about the manifest `raw`, directly or not; it is there already.

    What is about the manifests of an index counts. Each subject comes before what is about it.
    Raises `UnsupportedError` for more than `MAX_REFERRERS` manifests.
    """
    done: list[Transfer] = []
    seen: set[Digest] = set()
    waiting = _subjects(descriptor, raw)
    while waiting:
        subject = waiting.pop(0)
        for referrer in source.referrers(subject):
            watch.stop.check()
            if referrer.digest in seen:
                continue
            seen.add(referrer.digest)
            if len(seen) > MAX_REFERRERS:
                raise UnsupportedError(
                    f"more than {MAX_REFERRERS} manifests are attached to it",
                    path=str(descriptor.digest),
                    hint="copy the model without them",
                )
            content = source.fetch_manifest(referrer)
            done.append(
                transfer(
                    source, target, referrer, content, None, concurrency=concurrency, watch=watch
                )
            )
            waiting += _subjects(referrer, content)
    return tuple(done)


def _subjects(descriptor: Descriptor, raw: bytes) -> list[Digest]:
    """Return what others may be about: the manifest, and those that it lists if it is an index."""
    document = parse_manifest_or_index(
        raw, f"manifest {descriptor.digest}", media_type=descriptor.media_type
    )
    children = [child.digest for child in document.manifests] if isinstance(document, Index) else []
    return [descriptor.digest, *children]
