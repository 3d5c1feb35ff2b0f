"""Pull a model from a registry or the hub into a local store."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from modelpack.artifacts.config import ModelConfig
from modelpack.artifacts.descriptor import Descriptor
from modelpack.artifacts.digest import Digest
from modelpack.artifacts.manifest import Manifest, parse_manifest_or_index
from modelpack.artifacts.model import Model
from modelpack.artifacts.reference import Reference
from modelpack.errors import UsageError
from modelpack.hub.reference import HubReference
from modelpack.operations.remote import RemoteOptions
from modelpack.operations.selection import Selection
from modelpack.operations.sources import open_source
from modelpack.operations.transfer import Transfer, TransferOptions, transfer_model
from modelpack.operations.variants import fetch_variant
from modelpack.progress import ProgressCallback, Stop
from modelpack.storage import ReferrerSource, Source, Watch, read_blob, watching
from modelpack.store.layout import LayoutStore

if TYPE_CHECKING:
    from modelpack.trust.signatures import Signature


@dataclass(frozen=True, slots=True)
class Pulled:
    """A pulled model: its reference, its digest and the counts of its blobs and its referrers'.

    `missing` are the blobs that were left out and that the store does not have.
    """

    reference: Reference
    digest: Digest
    transfer: Transfer
    missing: tuple[Descriptor, ...] = ()
    referrers: tuple[Transfer, ...] = ()


def pull(
    reference: str | Reference | HubReference,
    *,
    to: str | Reference | None = None,
    selection: Selection | None = None,
    with_referrers: bool = False,
    store: LayoutStore | None = None,
    remote: RemoteOptions | None = None,
    progress: ProgressCallback | None = None,
    stop: Stop | None = None,
) -> Pulled:
    """Fetch a model into `store` under its reference, or as `to`, and verify every byte.

    The model is in a registry or, as `hf.co/ORG/NAME[:QUANT][@REVISION]`, on the Hugging Face Hub.
    For an index, one variant is pulled under the reference; see `RemoteOptions`.

    An interrupted pull resumes. With a `selection`, only those files are fetched, and the model is
    marked partial until another pull completes it. With `with_referrers`, referrers are fetched
    too. If `remote.trust` is set, signatures are verified before any file is fetched, and stored
    with the model.

    Raises `UntrustedError`, `NotFoundError`, `AuthError`, `IntegrityError`,
    `RemoteUnavailableError`, `StorageFullError` and `UnsupportedError`.
    """
    store = store or LayoutStore()
    options = remote or RemoteOptions()
    watch = watching(progress, stop)
    with open_source(reference, options, watch) as opened:
        source, origin = opened.source, opened.local
        where = origin if to is None else _target(to)
        descriptor, document = fetch_variant(
            source,
            opened.descriptor,
            opened.raw,
            opened.asked,
            options=options,
            report=watch.report,
        )
        raw = document.raw
        names = tuple(dict.fromkeys((origin.name, where.name)))
        signatures = _trusted_signatures(options, source, names, document)
        name = str(where.without_digest()) if where.tag else None
        with store.lease(blob.digest for blob in (*document.blobs, descriptor)):
            blobs = document.unique_blobs
            if selection is not None and not selection.is_everything:
                blobs = _selected(source, document, origin, selection)
            partial = len(blobs) < len(document.unique_blobs)

            def write() -> None:
                store.write_manifest(descriptor, raw, name, origin=origin.name, partial=partial)
                _store_signatures(signatures, source, store, watch)

            how = TransferOptions(watch, options.concurrency, with_referrers, blobs, write)
            done = transfer_model(source, store, descriptor, raw, name, how)
            if with_referrers:
                store.note_origin([one.descriptor.digest for one in done.referrers], origin.name)
            missing = store.missing(descriptor)
    return Pulled(where, descriptor.digest, done.model, missing, done.referrers)


def _target(to: str | Reference) -> Reference:
    where = Reference.parse(to) if isinstance(to, str) else to
    if where.digest is not None:
        raise UsageError(
            f"{where}: a digest cannot be chosen, it follows from the files",
            hint=f"write {where.without_digest()}",
        )
    return where


def _trusted_signatures(
    options: RemoteOptions, source: ReferrerSource, names: Sequence[str], manifest: Manifest
) -> tuple[Signature, ...]:
    """Return the signatures that make the model trusted; raise `UntrustedError` otherwise."""
    if options.trust is None:
        return ()
    from modelpack.operations.trust import check_source

    return check_source(
        options.trust,
        source,
        names,
        manifest.descriptor,
        lambda: _model(source, manifest, None),
    )


def _store_signatures(
    signatures: Sequence[Signature], source: ReferrerSource, store: LayoutStore, watch: Watch
) -> None:
    """Store attached signatures with the model: later checks read them without a registry."""
    held = {one.manifest.digest: one.manifest for one in signatures}
    for manifest in held.values():
        raw = source.fetch_manifest(manifest)
        if parse_manifest_or_index(raw, str(manifest.digest)).subject is not None:
            transfer_model(source, store, manifest, raw, None, TransferOptions(watch))


def _model(source: Source, manifest: Manifest, where: Reference | None) -> Model:
    raw = read_blob(source, manifest.config)
    what = f"config of {where or manifest.digest}"
    config = ModelConfig.parse(raw, manifest.config.media_type, what)
    return Model(where, manifest.descriptor, manifest, config)


def _selected(
    source: Source, manifest: Manifest, where: Reference, selection: Selection
) -> tuple[Descriptor, ...]:
    """Return the blobs of the selected files, and the config."""
    model = _model(source, manifest, where)
    chosen = (*(file.descriptor for file in selection.chosen(model)), manifest.config)
    return tuple({blob.digest: blob for blob in chosen}.values())
