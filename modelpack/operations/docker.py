"""Import models from the stores of Docker Model Runner and Ollama, and export to the former."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from modelpack.artifacts import media_types
from modelpack.artifacts.descriptor import Descriptor
from modelpack.artifacts.digest import Digest
from modelpack.artifacts.manifest import Manifest
from modelpack.artifacts.reference import Reference
from modelpack.errors import NotFoundError, UnsupportedError
from modelpack.operations.lookup import check_whole, named_references, stored_model
from modelpack.progress import Action, Progress, ProgressCallback, Stop
from modelpack.storage import Watch, watching
from modelpack.store.docker_store import DockerStore
from modelpack.store.layout import LayoutStore
from modelpack.store.ollama_store import OllamaStore, ollama_reference


@dataclass(frozen=True, slots=True)
class Exchanged:
    """A model that was imported or exported, and its references."""

    digest: Digest
    references: tuple[str, ...]


def import_from_docker(
    names: Sequence[str] = (),
    *,
    docker: DockerStore | None = None,
    store: LayoutStore | None = None,
    link: bool = True,
    progress: ProgressCallback | None = None,
    stop: Stop | None = None,
) -> tuple[Exchanged, ...]:
    """Import models from Docker Model Runner's store; without names, all models.

    Every blob is verified. With `link`, blobs are hard-linked if the file system allows it.
    """
    docker = docker or DockerStore()
    store = store or LayoutStore()
    watch = watching(progress, stop)
    wanted = [(docker.resolve(name), (str(Reference.parse(name)),)) for name in names]
    return _import_models(docker, store, wanted or _all_of(docker), link, watch)


def import_from_ollama(
    names: Sequence[str] = (),
    *,
    ollama: OllamaStore | None = None,
    store: LayoutStore | None = None,
    link: bool = True,
    progress: ProgressCallback | None = None,
    stop: Stop | None = None,
) -> tuple[Exchanged, ...]:
    """Import models by Ollama's names for them; without names, all models.

    They keep the full names, like `registry.ollama.ai/library/llama3:latest`. Every blob is
    verified. With `link`, blobs are hard-linked if the file system allows it.
    """
    ollama = ollama or OllamaStore()
    store = store or LayoutStore()
    watch = watching(progress, stop)
    wanted = [
        (ollama.resolve(name), (str(ollama_reference(name).without_digest()),)) for name in names
    ]
    return _import_models(ollama, store, wanted or _all_of(ollama), link, watch)


def _all_of(source: DockerStore | OllamaStore) -> list[tuple[Descriptor, tuple[str, ...]]]:
    models = source.models()
    return [(model.descriptor, tuple(map(str, model.references))) for model in models]


def export_to_docker(
    names: Sequence[str],
    *,
    docker: DockerStore | None = None,
    store: LayoutStore | None = None,
    link: bool = True,
    progress: ProgressCallback | None = None,
    stop: Stop | None = None,
) -> tuple[Exchanged, ...]:
    """Export stored models to Docker Model Runner's store; without names, all tagged models."""
    docker = docker or DockerStore(create=True)
    store = store or LayoutStore()
    watch = watching(progress, stop)
    everything = not names
    if not names:
        names = [str(ref) for model in store.models() for ref in model.references]
    exchanged = []
    for name in names:
        watch.stop.check()
        descriptor = store.resolve(name)
        raw = store.fetch_manifest(descriptor)
        manifest = Manifest.parse(raw, name)
        manifest.check_is_model(name)
        try:
            check_docker_format(manifest, name)
        except UnsupportedError as error:
            if not everything:
                raise
            watch.report(Progress(Action.NOTE, name, message=f"skipped {error}"))
            continue
        if store.missing(name):
            check_whole(store, stored_model(store, name))
        references = named_references(store, name)
        if not references:
            raise NotFoundError(
                f"cannot export {name}: it has no tag, and Docker Model Runner needs one",
                hint="run modelpack tag ID NAME",
            )
        for reference in references:
            docker.write_model(
                raw,
                lambda blob: store.blob_path(blob.digest),
                reference,
                link=link,
                watch=watch,
            )
        if link:
            store.note_links(blob.digest for blob in manifest.blobs)
        exchanged.append(Exchanged(descriptor.digest, tuple(str(ref) for ref in references)))
    return tuple(exchanged)


def check_docker_format(manifest: Manifest, what: str) -> None:
    """Raise `UnsupportedError` for a model in a format that `docker model` cannot load."""
    if manifest.config.media_type in media_types.FOREIGN_CONFIG_TYPES:
        raise UnsupportedError(
            f"has the format of another tool ({manifest.config.media_type}), which `docker model` "
            "cannot load",
            path=what,
            hint=f"run `modelpack convert {what} --to docker`, and export the result",
        )


def _import_models(
    source: DockerStore | OllamaStore,
    store: LayoutStore,
    wanted: Sequence[tuple[Descriptor, tuple[str, ...]]],
    link: bool,
    watch: Watch,
) -> tuple[Exchanged, ...]:
    return tuple(_import_model(source, store, *model, link, watch) for model in wanted)


def _import_model(
    source: DockerStore | OllamaStore,
    store: LayoutStore,
    descriptor: Descriptor,
    references: tuple[str, ...],
    link: bool,
    watch: Watch,
) -> Exchanged:
    watch.stop.check()
    digest = descriptor.digest
    raw = source.fetch_manifest(descriptor)
    manifest = Manifest.parse(raw, f"model {digest.short}")
    with store.lease(blob.digest for blob in manifest.blobs):
        for blob in manifest.unique_blobs:
            if not store.has_blob(blob):
                store.adopt_file(source.blob_path(blob.digest), blob, watch, link=link)
        for reference in references or (None,):
            store.write_manifest(descriptor, raw, reference)
    return Exchanged(digest, references)
