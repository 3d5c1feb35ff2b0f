"""Find: the model that a user names, in the store or in its registry."""

from __future__ import annotations

from typing import TYPE_CHECKING

from modelpack.blob import read_blob
from modelpack.config import ModelConfig
from modelpack.descriptor import Descriptor
from modelpack.errors import InvalidReferenceError, NotFoundError, UnsupportedError
from modelpack.hub.origin import hub_origin
from modelpack.hub.reference import HubReference, local_name
from modelpack.manifest import Manifest
from modelpack.model import Model
from modelpack.operations.remote import RemoteOptions, fetch_referenced_manifest, open_repository
from modelpack.operations.selection import Selection
from modelpack.operations.sources import named, open_commit, open_source
from modelpack.operations.variants import fetch_variant
from modelpack.operations.watching import watching
from modelpack.operations.wholeness import check_whole, completing_reference
from modelpack.progress import ProgressCallback, Stop
from modelpack.reference import Reference, begins_id, is_model_id
from modelpack.storage import Source, Watch
from modelpack.stores.layout import LayoutStore

if TYPE_CHECKING:
    from modelpack.registry import Repository


def inspect(
    name: str,
    *,
    store: LayoutStore | None = None,
    remote: RemoteOptions | None = None,
    from_registry: bool = False,
    progress: ProgressCallback | None = None,
    stop: Stop | None = None,
) -> Model:
    """Return the model `name`: of the store, or, with `from_registry`, of its registry.

    A name is a reference, a digest, a short id or a unique prefix of one. From a registry only
    the manifest and the config are fetched. Raises `NotFoundError`.
    """
    watch = watching(progress, stop)
    if from_registry:
        return remote_model(named(name), remote, watch)
    return stored_model(store or LayoutStore(), name)


def find_model(
    name: str, store: LayoutStore, *, pull: bool, remote: RemoteOptions | None, watch: Watch
) -> Model:
    """Return the stored model `name`, all of it.

    With `pull`, what is not there is pulled first. Without, a model that was pulled in part is a
    `PartialModelError`.
    """
    model = find_any_part(name, store, pull=pull, remote=remote, watch=watch)
    if pull and store.missing(model.descriptor):
        complete(store, model, remote=remote, watch=watch)
    check_whole(store, model)
    return model


def find_any_part(
    name: str,
    store: LayoutStore,
    *,
    pull: bool,
    remote: RemoteOptions | None,
    watch: Watch,
    selection: Selection | None = None,
) -> Model:
    """Return the stored model `name`, though layers of it may be missing.

    With `pull`, a model of which nothing is there is pulled first, as far as `selection` says.
    Where `remote` says who is trusted, the model has to be signed: raises `UntrustedError`.
    """
    try:
        model = stored_model(store, name, remote)
    except NotFoundError:
        if not pull or is_model_id(name):
            raise
    except UnsupportedError:
        # One variant has the name here, and the store cannot tell which it is.
        if not pull or is_model_id(name) or remote is None or remote.variant is None:
            raise
    else:
        if remote is not None and remote.trust is not None:
            from modelpack.operations.trusting import check_stored

            check_stored(remote.trust, store, model, remote, watch)
        return model
    _pull(named(name), store, remote, watch, selection)
    return stored_model(store, name)


def complete(
    store: LayoutStore,
    model: Model,
    *,
    remote: RemoteOptions | None,
    watch: Watch,
    selection: Selection | None = None,
) -> None:
    """Fetch what a partly present model lacks, or of that what `selection` says.

    It comes by digest from where the model was pulled: its tag may be another model by now.
    """
    origin = hub_origin(model.manifest)
    where = completing_reference(store, model)
    if origin is not None:
        _complete_from_hub(origin, store, model, remote or RemoteOptions(), watch, selection)
    elif where is None:
        check_whole(store, model)
    else:
        _pull(where, store, remote, watch, selection)


def stored_model(store: Source, name: str, options: RemoteOptions | None = None) -> Model:
    """Return the model `name` of a source, with its config; of variants, the one to take."""
    name = local_name(name)
    descriptor = store.resolve(name)
    reference = reference_in(store, name, descriptor)
    what = f"model {name}"
    raw = store.fetch_manifest(descriptor)
    descriptor, manifest = fetch_variant(store, descriptor, raw, what, options=options)
    return Model(reference, descriptor, manifest, _read_config(store, manifest, what))


def reference_in(source: Source, name: str, found: Descriptor) -> Reference | None:
    """Return the reference by which `source` found the manifest; None for an id or a part of one.

    The first digits of an id are spelled like a name, and a model that has no such name must not be
    taken for one that has: a policy trusts names.
    """
    if is_model_id(name.strip()):
        return None
    try:
        reference = Reference.parse(name)
        if begins_id(name) and source.resolve(str(reference)).digest != found.digest:
            return None
    except (InvalidReferenceError, NotFoundError):
        return None
    return reference


def model_of(
    source: Source, descriptor: Descriptor, manifest: Manifest, reference: Reference | None
) -> Model:
    """Return the model whose manifest was read from `source`; raise `UnsupportedError` if none."""
    what = str(reference or descriptor.digest)
    manifest.check_is_model(what)
    return Model(reference, descriptor, manifest, _read_config(source, manifest, what))


def remote_model(
    reference: Reference | HubReference, remote: RemoteOptions | None, watch: Watch
) -> Model:
    """Return the model `reference` of its registry: two small requests, no layer.

    Of the hub: its small files, and the headers of its weights.
    """
    with open_source(reference, remote or RemoteOptions(), watch) as opened:
        descriptor, manifest = fetch_variant(
            opened.source,
            opened.descriptor,
            opened.raw,
            opened.asked,
            options=remote,
            report=watch.report,
        )
        config = _read_config(opened.source, manifest, opened.asked)
        return Model(opened.local, descriptor, manifest, config)


def model_in(repository: Repository, reference: Reference) -> Model:
    """Return the model `reference` of its open repository."""
    descriptor, raw = fetch_referenced_manifest(repository, reference)
    descriptor, manifest = fetch_variant(repository, descriptor, raw, str(reference))
    return Model(
        reference, descriptor, manifest, _read_config(repository, manifest, str(reference))
    )


def remote_config(reference: Reference, remote: RemoteOptions | None = None) -> bytes:
    """Return the raw config blob of the model `reference` of its registry."""
    watch = watching(None)
    with open_repository(reference, remote or RemoteOptions(), watch) as repository:
        return read_blob(repository, model_in(repository, reference).manifest.config)


def _read_config(source: Source, manifest: Manifest, what: str) -> ModelConfig:
    raw = read_blob(source, manifest.config)
    return ModelConfig.parse(raw, manifest.config.media_type, f"config of {what}")


def _complete_from_hub(
    origin: HubReference,
    store: LayoutStore,
    model: Model,
    remote: RemoteOptions,
    watch: Watch,
    selection: Selection | None,
) -> None:
    """Fetch missing files from the commit that the model was made of, by their paths."""
    wanted = {file.descriptor.digest for file in (selection or Selection()).chosen(model)}
    missing = [blob for blob in store.missing(model.descriptor) if blob.digest in wanted]
    with open_commit(origin, remote, watch) as repository, store.lease([model.digest]):
        for blob in missing:
            source = repository.blob(blob.filepath or "", blob)
            store.write_blob(blob, source, watch)
        store.write_manifest(
            model.descriptor, model.manifest.raw, partial=bool(store.missing(model.descriptor))
        )


def _pull(
    where: Reference | HubReference,
    store: LayoutStore,
    remote: RemoteOptions | None,
    watch: Watch,
    selection: Selection | None,
) -> None:
    from modelpack.operations.pull import pull

    pull(
        where,
        selection=selection,
        store=store,
        remote=remote,
        progress=watch.report,
        stop=watch.stop,
    )
