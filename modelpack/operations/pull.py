"""Pull: a model from a registry into a local store."""

from __future__ import annotations

from dataclasses import dataclass

from modelpack.digest import Digest
from modelpack.errors import UnsupportedError
from modelpack.manifest import Index, parse_manifest_or_index
from modelpack.operations.remote import RemoteOptions, fetch_referenced_manifest, open_repository
from modelpack.operations.transfer import Transfer, transfer
from modelpack.operations.watching import watching
from modelpack.progress import ProgressCallback, Stop
from modelpack.reference import Reference
from modelpack.stores.layout import LayoutStore


@dataclass(frozen=True, slots=True)
class Pulled:
    """A pulled model: where from, its id, and what had to be fetched."""

    reference: Reference
    digest: Digest
    transfer: Transfer


def pull(
    reference: str | Reference,
    *,
    store: LayoutStore | None = None,
    remote: RemoteOptions | None = None,
    progress: ProgressCallback | None = None,
    stop: Stop | None = None,
) -> Pulled:
    """Fetch a model, verify every byte and keep it in `store` under its reference.

    A pull that was cut short goes on where it stopped. Raises `NotFoundError`, `AuthError`,
    `IntegrityError`, `RemoteUnavailableError`, `StorageFullError` and `UnsupportedError`.
    """
    where = Reference.parse(reference) if isinstance(reference, str) else reference
    store = store or LayoutStore()
    options = remote or RemoteOptions()
    watch = watching(progress, stop)
    with open_repository(where, options, watch) as repository:
        descriptor, raw = fetch_referenced_manifest(repository, where)
        document = parse_manifest_or_index(raw, str(where))
        if isinstance(document, Index):
            raise UnsupportedError(
                "is an index of several models, and Modelpack cannot choose one yet",
                path=str(where),
                hint="pull one of its manifests by digest: "
                + ", ".join(f"{where.name}@{m.digest}" for m in document.manifests[:8]),
            )
        document.check_is_model(str(where))
        name = str(where.without_digest()) if where.tag else None
        with store.lease(blob.digest for blob in (*document.blobs, descriptor)):
            done = transfer(
                repository,
                store,
                descriptor,
                raw,
                name,
                concurrency=options.concurrency,
                watch=watch,
            )
    return Pulled(where, descriptor.digest, done)
