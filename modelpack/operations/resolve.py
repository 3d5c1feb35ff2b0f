"""Give runtimes the files of a model: as paths in the store, or laid out in a directory.

`resolve` returns blob paths, `bundle` writes a directory for the user, and `kept_bundle` returns a
directory in the store that is made once and reused.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

from modelpack.artifacts.digest import Digest
from modelpack.artifacts.media_types import DOCKER_SAFETENSORS
from modelpack.artifacts.model import Model, ModelFile, Role, format_of, role_of
from modelpack.artifacts.reference import Reference
from modelpack.bundles.bundle import Bundle, lay_out
from modelpack.bundles.joined_tensors import JOINED_WEIGHTS
from modelpack.bundles.links import LinkMode, Placement
from modelpack.errors import StoreError
from modelpack.formats.projector import gguf_role
from modelpack.operations.lookup import check_whole, with_projectors
from modelpack.operations.pull import Selection, complete, find_any_part, find_model
from modelpack.operations.remote import RemoteOptions
from modelpack.progress import Action, Progress, ProgressCallback, Stop
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
    """Return the model `name` and the directory of its files; pull the model if it is not stored.

    The directory is in the store and named after the digest. It is made once, and deleted with the
    model. With `until`, no process removes the model or the directory before that stack is closed
    or this process ends; the lease survives `exec`. Raises as `modelpack.pull` and
    `modelpack.bundle` do.
    """
    store = store or LayoutStore()
    watch = watching(progress)
    model = find_model(name, store, pull=True, remote=remote, watch=watch)
    if until is not None:
        with suppress(StoreError):  # a read-only store has no leases, but can be read
            until.enter_context(store.lease([model.digest], growing=False, inherited=True))
    return model, kept_directory(model, store, watch) / "model"


def has_packed_weights(model: Model) -> bool:
    """Return whether no runtime can open the weights: in archives, or a layer for each tensor."""
    return any(file.is_packed and file.role in _WEIGHTS for file in model.files())


def unpacked_files(
    model: Model, store: LayoutStore, watch: Watch
) -> tuple[tuple[ModelFile, Path], ...]:
    """Return the unpacked files of a model with packed weights, and their paths in its kept bundle.

    Each file has the descriptor of the layer that contains it; joined tensors have that of the
    first. Raises as `modelpack.bundle` does.
    """
    layers = model.files()
    root = kept_directory(model, store, watch) / "model"
    found = []
    for path in sorted(path for path in root.rglob("*") if path.is_file()):
        name = path.relative_to(root).as_posix()
        role = role_of("", name)
        kind = format_of("", name) if role in _WEIGHTS else ""
        if kind == "gguf":
            role = gguf_role(path, role)
        layer = max(layers, key=lambda layer: _match_length(layer, name))
        media_type = DOCKER_SAFETENSORS if layer.is_tensor else layer.media_type
        found.append((ModelFile(role, media_type, name, layer.descriptor, kind), path))
    return tuple(found)


def kept_directory(model: Model, store: LayoutStore, watch: Watch) -> Path:
    """Return the directory of the kept bundle of a stored, complete model; make it if needed.

    The bundle is made again if its files differ from those that were laid out: if one was changed,
    added or removed, or is a link to a blob that was replaced since.
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


def _match_length(layer: ModelFile, name: str) -> int:
    """Return how well the layer's path matches the file `name`: longer prefixes score higher."""
    path = layer.filepath
    if layer.is_tensor:
        return 0 if name == JOINED_WEIGHTS else -1
    if path is None:
        return 1 if layer.archive else 0
    return 1 + len(path) if name == path or name.startswith(f"{path}/") else -1


@dataclass(frozen=True, slots=True)
class ResolvedFile:
    """A file of a model, and the path of the blob or of the unpacked file in the store."""

    file: ModelFile
    path: Path


@dataclass(frozen=True, slots=True)
class Resolved:
    """A model and its requested files, in layer order."""

    model: Model
    files: tuple[ResolvedFile, ...]


def resolve(
    name: str | Reference,
    *,
    media_types: Sequence[str] = (),
    files: Sequence[str] = (),
    pull: bool = False,
    store: LayoutStore | None = None,
    remote: RemoteOptions | None = None,
    progress: ProgressCallback | None = None,
    stop: Stop | None = None,
) -> Resolved:
    """Return the blob paths of the model's files of these media types and file paths.

    A media type is exact, a pattern (`*gguf*`) or a short name (`weight`, `gguf`, `license`,
    `chat-template`, …). Without either, the weights are returned. With `pull`, files that the store
    lacks are fetched first: the requested ones or, without a request, the whole model. Raises
    `NotFoundError` if nothing matches, and `PartialModelError` for files that no pull fetched.

    Weights inside archives, or in a layer for each tensor, are unpacked once into the store's
    `bundles`, and the paths are in that directory. An exact media type or a pattern still selects
    the layer itself.
    """
    store = store or LayoutStore()
    watch = watching(progress, stop)
    selection = Selection(include=tuple(files), media_types=tuple(media_types))
    name = str(name)
    model = find_any_part(name, store, pull=pull, remote=remote, watch=watch, selection=selection)
    model = with_projectors(store, model)
    if not media_types and not files:
        media_types = ("weight",)
    if has_packed_weights(model) and not any("/" in text or "*" in text for text in media_types):
        return _unpacked(model, media_types, files, pull, store, remote, watch)
    chosen = model.select(media_types, files)
    lacking = {blob.digest for blob in store.missing(model.descriptor)}
    if any(file.descriptor.digest in lacking for file in chosen):
        if not pull:
            check_whole(store, model)
        complete(store, model, remote=remote, watch=watch, selection=selection)
    return Resolved(
        model,
        tuple(ResolvedFile(file, store.blob_path(file.descriptor.digest)) for file in chosen),
    )


def _unpacked(
    model: Model,
    media_types: Sequence[str],
    files: Sequence[str],
    pull: bool,
    store: LayoutStore,
    remote: RemoteOptions | None,
    watch: Watch,
) -> Resolved:
    if pull and store.missing(model.descriptor):
        complete(store, model, remote=remote, watch=watch)
    check_whole(store, model)
    paths = dict(unpacked_files(model, store, watch))
    chosen = model.select(media_types, files, among=tuple(paths))
    return Resolved(model, tuple(ResolvedFile(file, paths[file]) for file in chosen))


def bundle(
    name: str | Reference,
    directory: str | Path,
    *,
    links: LinkMode = LinkMode.AUTO,
    overwrite: bool = False,
    pull: bool = False,
    store: LayoutStore | None = None,
    remote: RemoteOptions | None = None,
    progress: ProgressCallback | None = None,
    stop: Stop | None = None,
) -> Bundle:
    """Write the model's files to `directory`, as links to the store if possible, for a runtime."""
    store = store or LayoutStore()
    watch = watching(progress, stop)
    directory = Path(directory)
    store.check_outside(directory)
    model = find_model(str(name), store, pull=pull, remote=remote, watch=watch)
    made = lay_out(
        model,
        lambda descriptor: store.blob_path(descriptor.digest),
        directory,
        links=links,
        watch=watch,
        overwrite=overwrite,
    )
    store.note_links(file.content for file in made.files if file.linked is Placement.HARDLINK)
    return made
