"""Find a model in the store; complete it from its registry or the hub if it is partial."""

from __future__ import annotations

from modelpack.artifacts.model import Model
from modelpack.artifacts.reference import Reference, is_model_id
from modelpack.errors import (
    NotFoundError,
    UnsupportedError,
)
from modelpack.hub.reference import HubReference, hub_origin
from modelpack.operations.lookup import check_whole, completing_reference, stored_model
from modelpack.operations.remote import RemoteOptions
from modelpack.operations.selection import Selection
from modelpack.operations.sources import named, open_commit
from modelpack.storage import Watch
from modelpack.store.layout import LayoutStore


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
            from modelpack.operations.trust import check_stored

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
