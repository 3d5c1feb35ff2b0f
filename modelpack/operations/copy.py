"""Copy: a model from registry to registry, without touching the local store."""

from __future__ import annotations

from dataclasses import dataclass

from modelpack.digest import Digest
from modelpack.operations.remote import RemoteOptions, fetch_referenced_manifest, open_repository
from modelpack.operations.transfer import Transfer, transfer
from modelpack.operations.watching import watching
from modelpack.progress import ProgressCallback, Stop
from modelpack.reference import Reference


@dataclass(frozen=True, slots=True)
class Copied:
    """A copied model: where from, where to, its id, and what had to be sent."""

    source: Reference
    target: Reference
    digest: Digest
    transfer: Transfer


def copy(
    source: str | Reference,
    target: str | Reference,
    *,
    source_options: RemoteOptions | None = None,
    target_options: RemoteOptions | None = None,
    progress: ProgressCallback | None = None,
    stop: Stop | None = None,
) -> Copied:
    """Copy a model between registries, streaming; within one registry, blobs are mounted.

    Every blob is hashed on its way, and an upload whose bytes turn out wrong is cancelled.
    """
    origin = Reference.parse(source) if isinstance(source, str) else source
    where = Reference.parse(target) if isinstance(target, str) else target
    options = target_options or RemoteOptions()
    watch = watching(progress, stop)
    with (
        open_repository(origin, source_options or options, watch) as reading,
        open_repository(where, options, watch, writes=True) as writing,
    ):
        descriptor, raw = fetch_referenced_manifest(reading, origin)
        done = transfer(
            reading,
            writing,
            descriptor,
            raw,
            where.tag,
            concurrency=options.concurrency,
            watch=watch,
        )
    return Copied(origin, where, descriptor.digest, done)
