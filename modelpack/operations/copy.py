"""Copy a model from a registry or the hub to a registry, without the local store."""

from __future__ import annotations

from dataclasses import dataclass

from modelpack.artifacts.digest import Digest
from modelpack.artifacts.reference import Reference
from modelpack.hub.reference import HubReference
from modelpack.operations.remote import RemoteOptions, open_repository
from modelpack.operations.sources import open_source
from modelpack.operations.transfer import Transfer, TransferOptions, transfer_model
from modelpack.progress import ProgressCallback, Stop
from modelpack.storage import watching


@dataclass(frozen=True, slots=True)
class Copied:
    """A copied model: source, target, digest and the counts of its blobs and its referrers'."""

    source: Reference
    target: Reference
    digest: Digest
    transfer: Transfer
    referrers: tuple[Transfer, ...] = ()


def copy(
    source: str | Reference | HubReference,
    target: str | Reference,
    *,
    with_referrers: bool = False,
    source_options: RemoteOptions | None = None,
    target_options: RemoteOptions | None = None,
    progress: ProgressCallback | None = None,
    stop: Stop | None = None,
) -> Copied:
    """Copy a model between registries, streaming; within one registry, blobs are mounted.

    The source may also be a model of the Hugging Face Hub: `hf.co/ORG/NAME[:QUANT][@REVISION]`.

    Every blob is hashed in transit; an upload with wrong bytes is cancelled. With `with_referrers`,
    direct and indirect referrers are copied too, before the tag is set.
    """
    where = Reference.parse(target) if isinstance(target, str) else target
    options = target_options or RemoteOptions()
    watch = watching(progress, stop)
    with (
        open_source(source, source_options or options, watch) as opened,
        open_repository(where, options, watch, writes=True) as repository,
    ):
        how = TransferOptions(watch, options.concurrency, with_referrers)
        done = transfer_model(
            opened.source, repository, opened.descriptor, opened.raw, where.tag, how
        )
    return Copied(opened.local, where, opened.descriptor.digest, done.model, done.referrers)
