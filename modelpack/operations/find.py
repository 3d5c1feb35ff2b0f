"""Find: the model that a user names, in the store or in its registry."""

from __future__ import annotations

from modelpack.blob import read_blob
from modelpack.config import ModelConfig
from modelpack.errors import NotFoundError
from modelpack.manifest import Manifest
from modelpack.model import Model
from modelpack.operations.pull import pull
from modelpack.operations.remote import RemoteOptions, fetch_referenced_manifest, open_repository
from modelpack.operations.watching import watching
from modelpack.progress import ProgressCallback, Stop
from modelpack.reference import Reference, is_model_id
from modelpack.storage import Source, Watch
from modelpack.stores.layout import LayoutStore


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
        return remote_model(Reference.parse(name), remote, watch)
    return find_model(name, store or LayoutStore(), pull=False, remote=remote, watch=watch)


def find_model(
    name: str, store: LayoutStore, *, pull: bool, remote: RemoteOptions | None, watch: Watch
) -> Model:
    """Return the stored model `name`; with `pull`, one that is not there is pulled first."""
    try:
        return stored_model(store, name)
    except NotFoundError:
        if not pull or is_model_id(name):
            raise
    _pull_missing(name, store, remote, watch)
    return stored_model(store, name)


def stored_model(store: Source, name: str) -> Model:
    """Return the model `name` of a source, with its config."""
    descriptor = store.resolve(name)
    reference = None if is_model_id(name.strip()) else _reference(name)
    what = f"model {name}"
    manifest = Manifest.parse(store.fetch_manifest(descriptor), what)
    manifest.check_is_model(what)
    return Model(reference, descriptor, manifest, _read_config(store, manifest, what))


def remote_model(reference: Reference, remote: RemoteOptions | None, watch: Watch) -> Model:
    """Return the model `reference` of its registry: two small requests, no layer."""
    with open_repository(reference, remote or RemoteOptions(), watch) as repository:
        descriptor, raw = fetch_referenced_manifest(repository, reference)
        manifest = Manifest.parse(raw, str(reference))
        manifest.check_is_model(str(reference))
        config = _read_config(repository, manifest, str(reference))
    return Model(reference, descriptor, manifest, config)


def remote_config(reference: Reference, remote: RemoteOptions | None = None) -> bytes:
    """Return the raw config blob of the model `reference` of its registry."""
    watch = watching(None)
    with open_repository(reference, remote or RemoteOptions(), watch) as repository:
        _, raw = fetch_referenced_manifest(repository, reference)
        return read_blob(repository, Manifest.parse(raw, str(reference)).config)


def _read_config(source: Source, manifest: Manifest, what: str) -> ModelConfig:
    raw = read_blob(source, manifest.config)
    return ModelConfig.parse(raw, manifest.config.media_type, f"config of {what}")


def _pull_missing(
    name: str, store: LayoutStore, remote: RemoteOptions | None, watch: Watch
) -> None:
    pull(Reference.parse(name), store=store, remote=remote, progress=watch.report, stop=watch.stop)


def _reference(name: str) -> Reference | None:
    try:
        return Reference.parse(name)
    except ValueError:  # a prefix of an id that is no name
        return None
