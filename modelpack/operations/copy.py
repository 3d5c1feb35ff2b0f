"""Copy: a model from a registry or the hub to a registry, without touching the local store."""

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
    """A copied model: where from, where to, its id, and what had to be sent.

    `referrers` are the manifests about it that were copied too, each with what that took.
    """

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

    The source may be a model of the Hugging Face Hub, too: `hf.co/ORG/NAME[:QUANT][@REVISION]`.

    Every blob is hashed on its way, and an upload whose bytes turn out wrong is cancelled. With
    `with_referrers`, what is attached to the model comes along, and what is attached to that; the
    tag is set last.
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
