"""Send a model to a registry: from a local store (`push`) or from elsewhere (`copy`)."""

from __future__ import annotations

from dataclasses import dataclass

from modelpack.artifacts.digest import Digest
from modelpack.artifacts.reference import Reference
from modelpack.errors import UsageError
from modelpack.hub.reference import HubReference
from modelpack.operations.lookup import check_whole, is_stored_id, stored_model
from modelpack.operations.remote import RemoteOptions, open_repository, open_source
from modelpack.operations.transfer import Transfer, TransferOptions, transfer_model
from modelpack.progress import ProgressCallback, Stop
from modelpack.storage import ReferrerSource, Watch, watching
from modelpack.store.layout import LayoutStore


@dataclass(frozen=True, slots=True)
class Pushed:
    """A pushed model, and counts of the blobs of the model and of each of its referrers."""

    reference: Reference
    digest: Digest
    transfer: Transfer
    referrers: tuple[Transfer, ...] = ()


def push(
    reference: str | Reference,
    *,
    to: str | Reference | None = None,
    with_referrers: bool = False,
    store: LayoutStore | None = None,
    remote: RemoteOptions | None = None,
    progress: ProgressCallback | None = None,
    stop: Stop | None = None,
) -> Pushed:
    """Push the stored model `reference` to its registry, or to `to`, which an id requires.

    Blobs that the repository already has are not uploaded; the registry links those that were
    pushed to, or pulled from, another of its repositories. With `with_referrers`, stored
    referrers are pushed before the tag is set. Raises `NotFoundError` if the store has no such
    model, `UsageError` for an id without `to`, `PartialModelError`, `AuthError`,
    `RemoteUnavailableError`, and `IntegrityError` if a stored blob is damaged.
    """
    store = store or LayoutStore()
    if to is None and is_stored_id(store, str(reference)):
        raise UsageError(
            f"{reference}: an id does not name a registry",
            hint="add --to REGISTRY/REPOSITORY:TAG, or push the model by its name",
        )
    target = to if to is not None else reference
    where = Reference.parse(target) if isinstance(target, str) else target
    if store.missing(str(reference)):
        check_whole(store, stored_model(store, str(reference)))
    watch = watching(progress, stop)
    return push_from(store, str(reference), where, remote, watch, with_referrers=with_referrers)


def push_from(
    source: ReferrerSource,
    name: str,
    where: Reference,
    remote: RemoteOptions | None,
    watch: Watch,
    *,
    with_referrers: bool = False,
) -> Pushed:
    """Push the model `name` of `source` to the registry and the tag that `where` names."""
    options = remote or RemoteOptions()
    descriptor = source.resolve(name)
    raw = source.fetch_manifest(descriptor)
    with open_repository(where, options, watch, writes=True) as repository:
        how = TransferOptions(watch, options.concurrency, with_referrers)
        done = transfer_model(source, repository, descriptor, raw, where.tag, how)
    return Pushed(where, descriptor.digest, done.model, done.referrers)


@dataclass(frozen=True, slots=True)
class Copied:
    """A copied model, and counts of the blobs of the model and of each of its referrers."""

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
    """Copy a model from one registry to another without storing it.

    The source may also be a model of the Hugging Face Hub: `hf.co/ORG/NAME[:QUANT][@REVISION]`.
    Within one registry, blobs are mounted. Otherwise each blob is streamed and hashed, and an
    upload with wrong bytes is cancelled. With `with_referrers`, direct and indirect referrers are
    copied too, before the tag is set.
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
