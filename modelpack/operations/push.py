"""Push: a model from a local store to a registry."""

from __future__ import annotations

from dataclasses import dataclass

from modelpack.digest import Digest
from modelpack.operations.remote import RemoteOptions, open_repository
from modelpack.operations.transfer import Transfer, transfer
from modelpack.operations.watching import watching
from modelpack.progress import ProgressCallback, Stop
from modelpack.reference import Reference
from modelpack.storage import Source, Watch
from modelpack.stores.layout import LayoutStore


@dataclass(frozen=True, slots=True)
class Pushed:
    """A pushed model: where to, its id, and what had to be sent."""

    reference: Reference
    digest: Digest
    transfer: Transfer


def push(
    reference: str | Reference,
    *,
    to: str | Reference | None = None,
    store: LayoutStore | None = None,
    remote: RemoteOptions | None = None,
    progress: ProgressCallback | None = None,
    stop: Stop | None = None,
) -> Pushed:
    """Send the stored model `reference` to its registry, or to `to`.

    What the registry has already is not sent again. Raises `NotFoundError` if the store has no
    such model, `AuthError`, `RemoteUnavailableError`, and `IntegrityError` if a stored blob is
    damaged.
    """
    store = store or LayoutStore()
    target = to if to is not None else reference
    where = Reference.parse(target) if isinstance(target, str) else target
    return push_from(store, str(reference), where, remote, watching(progress, stop))


def push_from(
    source: Source, name: str, where: Reference, remote: RemoteOptions | None, watch: Watch
) -> Pushed:
    """Send the model `name` of `source` to the registry and tag that `where` names."""
    options = remote or RemoteOptions()
    descriptor = source.resolve(name)
    raw = source.fetch_manifest(descriptor)
    with open_repository(where, options, watch, writes=True) as repository:
        done = transfer(
            source,
            repository,
            descriptor,
            raw,
            where.tag,
            concurrency=options.concurrency,
            watch=watch,
        )
    return Pushed(where, descriptor.digest, done)
