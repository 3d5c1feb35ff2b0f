"""Bundles kept in the store for runtimes that open a model again and again."""

from __future__ import annotations

from contextlib import ExitStack, suppress
from pathlib import Path

from modelpack.artifacts.digest import Digest
from modelpack.artifacts.model import Model, ModelFile, Role, format_of, role_of
from modelpack.bundles.bundle import Bundle, lay_out
from modelpack.bundles.links import Placement
from modelpack.errors import StoreError
from modelpack.operations.find import find_model
from modelpack.operations.remote import RemoteOptions
from modelpack.progress import Action, Progress, ProgressCallback
from modelpack.storage import Watch, watching
from modelpack.store.kept_bundles import KeptFile
from modelpack.store.layout import LayoutStore

_WEIGHTS = (Role.WEIGHT, Role.PROJECTOR)


def kept_bundle(
    name: str,
    *,
    store: LayoutStore | None = None,
    remote: RemoteOptions | None = None,
    progress: ProgressCallback | None = None,
    until: ExitStack | None = None,
) -> tuple[Model, Path]:
    """Return the model `name` and the directory of its files; one that is not stored is pulled.

    The directory is in the store, named after the digest, and made once; it goes with the model.
    With `until`, no process removes the model or the directory until that is closed or this process
    ends, whatever program it has become. Raises as `modelpack.pull` and `modelpack.bundle` do.
    """
    store = store or LayoutStore()
    watch = watching(progress)
    model = find_model(name, store, pull=True, remote=remote, watch=watch)
    if until is not None:
        with suppress(StoreError):  # whoever cannot write to a store can still read it
            until.enter_context(store.lease([model.digest], growing=False, inherited=True))
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
    """Return the kept bundle of a stored model, all of which is there.

    It is made if need be, and made again if a file of it is no longer what was laid out: changed,
    added, missing, or a link of a blob that was replaced since.
    """
    bundles, directory = store.bundles, store.bundles.directory(model.digest)
    if bundles.check(model.digest) is None:
        return directory

    def waiting(holder: str) -> None:
        message = f"the bundle is being made by {holder}: waiting"
        watch.report(Progress(Action.NOTE, str(directory), model.digest, message=message))

    with bundles.workspace(model.digest, watch.stop, waiting) as folder:
        different = bundles.check(model.digest)
        if different is None:
            return directory
        if different:
            message = f"the bundle is made again: {different}"
            watch.report(Progress(Action.NOTE, str(directory), model.digest, message=message))
        needed = [model.digest, *(blob.digest for blob in model.manifest.blobs)]
        with store.lease(needed, growing=False):
            made = lay_out(
                model, lambda blob: store.blob_path(blob.digest), folder / "made", watch=watch
            )
            bundles.publish(model.digest, made.directory, _kept_files(made))
    return directory


def _kept_files(bundle: Bundle) -> list[KeptFile]:
    files = [
        KeptFile(file.path, file.content, None if file.linked is Placement.HARDLINK else "")
        for file in bundle.files
    ]
    config = bundle.config.relative_to(bundle.directory).as_posix()
    return [*files, KeptFile(config, Digest.of(bundle.config.read_bytes()), "")]


def _holds(layer: ModelFile, name: str) -> int:
    """Return how likely a file is of this layer: by how much of its path the layer's is."""
    path = layer.filepath
    if path is None:
        return 1 if layer.archive else 0
    return 1 + len(path) if name == path or name.startswith(f"{path}/") else -1
