"""Push a model from a local store to a registry."""

from __future__ import annotations

from dataclasses import dataclass

from modelpack.artifacts.digest import Digest
from modelpack.artifacts.reference import Reference
from modelpack.operations.lookup import check_whole, stored_model
from modelpack.operations.remote import RemoteOptions, open_repository
from modelpack.operations.transfer import Transfer, TransferOptions, transfer_model
from modelpack.progress import ProgressCallback, Stop
from modelpack.storage import ReferrerSource, Watch, watching
from modelpack.store.layout import LayoutStore


@dataclass(frozen=True, slots=True)
class Pushed:
    """A pushed model: its target, its digest and the counts of its blobs and its referrers'."""

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
    """Push the stored model `reference` to its registry, or to `to`.

    Blobs that the registry has are not uploaded again. With `with_referrers`, stored
    referrers of the model are pushed before the tag is set. Raises `NotFoundError` if the store has
    no such model, `AuthError`, `RemoteUnavailableError`, and `IntegrityError` if a stored blob is
    damaged.
    """
    store = store or LayoutStore()
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
