"""Import models from the store of Docker Model Runner, and export models to it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from modelpack.artifacts import media_types
from modelpack.artifacts.digest import Digest
from modelpack.artifacts.manifest import Manifest
from modelpack.artifacts.reference import Reference
from modelpack.errors import NotFoundError, UnsupportedError
from modelpack.operations.lookup import check_whole, named_references, stored_model
from modelpack.progress import Action, Progress, ProgressCallback, Stop
from modelpack.storage import Watch, watching
from modelpack.store.docker_store import DockerStore
from modelpack.store.layout import LayoutStore


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
    wanted: list[tuple[Digest, tuple[str, ...]]]
    if names:
        wanted = [(docker.resolve(name).digest, (str(Reference.parse(name)),)) for name in names]
    else:
        wanted = [(model.digest, tuple(map(str, model.references))) for model in docker.models()]
    return tuple(
        _import_model(docker, store, digest, references, link, watch)
        for digest, references in wanted
    )


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


def _import_model(
    docker: DockerStore,
    store: LayoutStore,
    digest: Digest,
    references: tuple[str, ...],
    link: bool,
    watch: Watch,
) -> Exchanged:
    watch.stop.check()
    descriptor = docker.resolve(str(digest))
    raw = docker.fetch_manifest(descriptor)
    manifest = Manifest.parse(raw, f"model {digest.short}")
    with store.lease(blob.digest for blob in manifest.blobs):
        for blob in manifest.unique_blobs:
            if not store.has_blob(blob):
                store.adopt_file(docker.blob_path(blob.digest), blob, watch, link=link)
        for reference in references or (None,):
            store.write_manifest(descriptor, raw, reference)
    return Exchanged(digest, references)
