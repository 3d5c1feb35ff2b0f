"""Bundles that runtimes open again and again, kept beside the blobs they are links to."""

from __future__ import annotations

from pathlib import Path

from modelpack.errors import ConflictError
from modelpack.model import Model, ModelFile, Role, format_of, role_of
from modelpack.operations.find import find_model
from modelpack.operations.remote import RemoteOptions
from modelpack.operations.watching import watching
from modelpack.progress import ProgressCallback
from modelpack.storage import Watch
from modelpack.stores.kept import bundle_directory, remove_bundle, stale_bundles
from modelpack.stores.layout import LayoutStore
from modelpack.unpacking.bundle import lay_out

_WEIGHTS = (Role.WEIGHT, Role.PROJECTOR)


def kept_bundle(
    name: str,
    *,
    store: LayoutStore | None = None,
    remote: RemoteOptions | None = None,
    progress: ProgressCallback | None = None,
) -> tuple[Model, Path]:
    """Return the model `name` and the directory of its files; one that is not stored is pulled.

    The directory is in the store, named after the digest, and made once. Those of models that are
    no longer stored are removed. Raises as `modelpack.pull` and `modelpack.bundle` do.
    """
    store = store or LayoutStore()
    watch = watching(progress)
    model = find_model(name, store, pull=True, remote=remote, watch=watch)
    return model, kept_directory(model, store, watch) / "model"


def has_packed_weights(model: Model) -> bool:
    """Whether weights of the model are inside archives, so that nothing can open them there."""
    return any(file.archive and file.role in _WEIGHTS for file in model.files())


def unpacked_files(
    model: Model, store: LayoutStore, watch: Watch
) -> tuple[tuple[ModelFile, Path], ...]:
    """Return the files of a model that has archives, and their paths in its kept bundle.

    The descriptor of a file is that of the layer that it was in. Raises as `modelpack.bundle`.
    """
    layers = model.files()
    root = kept_directory(model, store, watch) / "model"
    found = []
    for path in sorted(path for path in root.rglob("*") if path.is_file()):
        name = path.relative_to(root).as_posix()
        role = role_of("", name)
        kind = format_of("", name) if role in _WEIGHTS else ""
        layer = max(layers, key=lambda layer: _holds(layer, name))
        found.append((ModelFile(role, layer.media_type, name, layer.descriptor, kind), path))
    return tuple(found)


def kept_directory(model: Model, store: LayoutStore, watch: Watch) -> Path:
    """Return the kept bundle of a stored model, all of which is there; made if need be."""
    directory = bundle_directory(store.root, model.digest)
    _remove_old(store)
    if not directory.is_dir():
        directory.parent.mkdir(exist_ok=True)
        try:
            lay_out(model, lambda blob: store.blob_path(blob.digest), directory, watch=watch)
        except ConflictError:
            if not directory.is_dir():  # otherwise another process made the same just now
                raise
    return directory


def _holds(layer: ModelFile, name: str) -> int:
    """Return how likely a file is of this layer: by how much of its path the layer's is."""
    path = layer.filepath
    if path is None:
        return 1 if layer.archive else 0
    return 1 + len(path) if name == path or name.startswith(f"{path}/") else -1


def _remove_old(store: LayoutStore) -> None:
    stored = {model.descriptor.digest for model in store.models()}
    for path in stale_bundles(store.root, stored, seconds=0):
        remove_bundle(path)
