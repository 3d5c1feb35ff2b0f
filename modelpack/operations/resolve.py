"""Resolve and bundle: from a model to paths that a runtime can open."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from modelpack.errors import UsageError
from modelpack.model import Model, ModelFile
from modelpack.operations.find import find_model
from modelpack.operations.remote import RemoteOptions
from modelpack.operations.watching import watching
from modelpack.progress import ProgressCallback, Stop
from modelpack.stores.layout import LayoutStore
from modelpack.unpacking.bundle import Bundle, LinkMode, lay_out


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
    `chat-template`, …). Nothing asked for means the weights. With `pull`, a model that the store
    lacks is pulled first. Raises `NotFoundError` if nothing matches.
    """
    store = store or LayoutStore()
    model = find_model(name, store, pull=pull, remote=remote, watch=watching(progress, stop))
    if not media_types and not files:
        media_types = ("weight",)
    chosen = model.select(media_types, files)
    return Resolved(
        model,
        tuple(ResolvedFile(file, store.blob_path(file.descriptor.digest)) for file in chosen),
    )


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
    store = store or LayoutStore()
    watch = watching(progress, stop)
    if directory.resolve() == store.root.resolve():
        raise UsageError(f"{directory} is the store itself", hint="choose another directory")
    model = find_model(name, store, pull=pull, remote=remote, watch=watch)
    return lay_out(
        model,
        lambda descriptor: store.blob_path(descriptor.digest),
        directory,
        links=links,
        watch=watch,
        overwrite=overwrite,
    )
