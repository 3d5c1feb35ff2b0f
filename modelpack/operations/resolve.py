"""Resolve a model to file paths, or write its files to a directory, for a runtime to open."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from modelpack.artifacts.model import Model, ModelFile
from modelpack.bundles.links import LinkMode
from modelpack.errors import UsageError
from modelpack.operations.find import complete, find_any_part, find_model
from modelpack.operations.kept_bundles import has_packed_weights, unpacked_files
from modelpack.operations.lookup import check_whole
from modelpack.operations.remote import RemoteOptions
from modelpack.operations.selection import Selection
from modelpack.progress import ProgressCallback, Stop
from modelpack.storage import Watch, watching
from modelpack.store.layout import LayoutStore

if TYPE_CHECKING:
    from modelpack.bundles.bundle import Bundle


@dataclass(frozen=True, slots=True)
class ResolvedFile:
    """A file of a model and where its bytes are: `path` is the blob in the store."""

    file: ModelFile
    path: Path


@dataclass(frozen=True, slots=True)
class Resolved:
    """A model and those of its files that were asked for, in layer order."""

    model: Model
    files: tuple[ResolvedFile, ...]


def resolve(
    name: str,
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
    `chat-template`, …). Nothing asked for means the weights. With `pull`, files that the store
    lacks are fetched first: those that are asked for or, if none is, the whole model. Raises
    `NotFoundError` if nothing matches, `PartialModelError` for what was left out of a pull.

    Where weights are inside of archives, all is unpacked, once, into the store's `bundles`, and the
    paths are those there; a media type that is written whole still means the layer itself.
    """
    store = store or LayoutStore()
    watch = watching(progress, stop)
    selection = Selection(include=tuple(files), media_types=tuple(media_types))
    model = find_any_part(name, store, pull=pull, remote=remote, watch=watch, selection=selection)
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
    name: str,
    directory: Path,
    *,
    links: LinkMode = LinkMode.AUTO,
    overwrite: bool = False,
    pull: bool = False,
    store: LayoutStore | None = None,
    remote: RemoteOptions | None = None,
    progress: ProgressCallback | None = None,
    stop: Stop | None = None,
) -> Bundle:
    """Lay the model out in `directory`, as links to the store, ready for a runtime to open."""
    from modelpack.bundles.bundle import lay_out
    from modelpack.bundles.links import Placement

    store = store or LayoutStore()
    watch = watching(progress, stop)
    if directory.resolve() == store.root.resolve():
        raise UsageError(f"{directory} is the store itself", hint="choose another directory")
    model = find_model(name, store, pull=pull, remote=remote, watch=watch)
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
