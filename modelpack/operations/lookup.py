"""Look models up by name in a store or a registry, without fetching their layers."""

from __future__ import annotations

import io
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from modelpack.artifacts import media_types
from modelpack.artifacts.config import ModelConfig
from modelpack.artifacts.descriptor import Descriptor
from modelpack.artifacts.manifest import Index, Manifest
from modelpack.artifacts.model import Model, ModelFile
from modelpack.artifacts.reference import Reference, begins_id, is_model_id
from modelpack.errors import (
    InvalidReferenceError,
    NotFoundError,
    PartialModelError,
    UnsupportedError,
)
from modelpack.formats.projector import identified
from modelpack.formats.reader import WeightFile
from modelpack.hub.reference import HubReference, local_name
from modelpack.operations.remote import (
    RemoteOptions,
    fetch_referenced_manifest,
    named,
    open_repository,
    open_source,
)
from modelpack.operations.variants import fetch_variant, opened_variant
from modelpack.progress import ProgressCallback, Stop
from modelpack.storage import Source, Watch, fill, read_blob, watching
from modelpack.store.layout import LayoutStore

if TYPE_CHECKING:
    from modelpack.registry import Repository


_MAX_SHOWN = 5
# The parser reads windows of 64 KiB; the architecture of a GGUF file is in the first.
_HEAD_BYTES = 128 * 1024
_IMAGE_CONFIGS = (media_types.OCI_IMAGE_CONFIG, media_types.DOCKER_IMAGE_CONFIG)


def check_whole(store: LayoutStore, model: Model) -> None:
    """Raise `PartialModelError` with the missing blobs if the model is only partly stored.

    The check is cheap for a model that was pulled or packaged completely.
    """
    missing = store.missing(model.descriptor)
    if not missing:
        return
    lines = [f"{blob.filepath or blob.digest.short} ({blob.size} bytes)" for blob in missing]
    if len(lines) > _MAX_SHOWN:
        lines = [*lines[:_MAX_SHOWN], f"and {len(lines) - _MAX_SHOWN} more"]
    where = completing_reference(store, model)
    raise PartialModelError(
        f"{model.reference or model.short_id} is stored in part: {len(missing)} of "
        f"{len(model.manifest.unique_blobs)} blobs are missing: {', '.join(lines)}",
        missing=tuple(str(blob.digest) for blob in missing),
        hint=f"run `modelpack pull {where}` to fetch the rest" if where else "pull the model again",
    )


def completing_reference(store: LayoutStore, model: Model) -> Reference | None:
    """Return the reference by digest from which to pull the rest of a model; None if unknown."""
    places = store.get(str(model.digest)).places
    return Reference.parse(f"{places[0]}@{model.digest}") if places else None


def inspect(
    name: str | Reference,
    *,
    store: LayoutStore | None = None,
    remote: RemoteOptions | None = None,
    from_registry: bool = False,
    progress: ProgressCallback | None = None,
    stop: Stop | None = None,
) -> Model:
    """Return the model `name` from the store or, with `from_registry`, from its registry.

    A name is a reference, a digest, a short id or a unique prefix of one. From a registry only
    the manifest and the config are fetched and, of a model with several GGUF files of one media
    type, the start of each, which says which of them is a projector. Raises `NotFoundError`.
    """
    watch = watching(progress, stop)
    if from_registry:
        return remote_model(named(name), remote, watch)
    store = store or LayoutStore()
    return with_projectors(store, stored_model(store, str(name)))


def stored_model(store: Source, name: str, options: RemoteOptions | None = None) -> Model:
    """Return the model `name` of a source; from an index, the variant that `options` select."""
    name = local_name(name)
    descriptor = store.resolve(name)
    reference = reference_in(store, name, descriptor)
    what = f"model {name}"
    raw = store.fetch_manifest(descriptor)
    descriptor, manifest = fetch_variant(store, descriptor, raw, what, options=options)
    return Model(reference, descriptor, manifest, _read_config(store, manifest, what))


@dataclass(frozen=True, slots=True)
class StoredImage:
    """A stored image: an index of container images, as `convert --to image` makes.

    `size` is that of all configs and layers in bytes.
    """

    descriptor: Descriptor
    references: tuple[Reference, ...]
    index: Index
    size: int


def stored_image(store: LayoutStore, name: str) -> StoredImage | None:
    """Return the image `name` of the store, None if it is no index of container images.

    Raises as `LayoutStore.get`, and `NotFoundError` if the store lacks one of its manifests.
    """
    found = store.get(name)
    if found.descriptor.media_type not in media_types.INDEX_TYPES:
        return None
    index = Index.parse(store.fetch_manifest(found.descriptor), str(found.digest))
    manifests = [
        Manifest.parse(store.fetch_manifest(child), str(child.digest))
        for child in index.manifests
        if child.media_type in media_types.MANIFEST_TYPES
    ]
    if not any(manifest.config.media_type in _IMAGE_CONFIGS for manifest in manifests):
        return None
    sizes = {blob.digest: blob.size for manifest in manifests for blob in manifest.blobs}
    return StoredImage(found.descriptor, found.references, index, sum(sizes.values()))


def check_image(reference: Reference, remote: RemoteOptions) -> None:
    """Raise `UnsupportedError` unless `reference` is a container image in its registry.

    Raises `NotFoundError` if there is none, and the errors of the registry.
    """
    with open_repository(reference, remote, watching(None)) as repository:
        found, raw = fetch_referenced_manifest(repository, reference)
        if found.media_type in media_types.INDEX_TYPES:
            children = Index.parse(raw, str(reference)).manifests
            if not children:
                raise UnsupportedError(f"{reference} is an index without images")
            raw = repository.fetch_manifest(children[0])
        manifest = Manifest.parse(raw, str(reference))
    if manifest.config.media_type not in _IMAGE_CONFIGS:
        raise UnsupportedError(
            f"{reference} is not a container image: its config has the type "
            f"{manifest.config.media_type}",
            hint="run `modelpack convert --to image --push` to make an image from a model",
        )


def reference_in(source: Source, name: str, found: Descriptor) -> Reference | None:
    """Return the reference by which `source` found the manifest; None for an id or its prefix.

    A prefix of an id looks like a name, but must not count as the model's name, since policies
    trust names.
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


def is_stored_id(store: LayoutStore, name: str) -> bool:
    """Return whether `name` is the id, or a prefix of the id, of a stored model, not its name.

    Raises `AmbiguousError` if several models have the prefix.
    """
    if not begins_id(name):
        return False
    with suppress(InvalidReferenceError, NotFoundError):  # 64 digits are no name
        store.resolve(str(Reference.parse(name)))
        return False
    with suppress(NotFoundError):
        store.resolve(name)
        return True
    return False


def named_references(store: LayoutStore, name: str) -> tuple[Reference, ...]:
    """Return the stored reference `name`, or all references of the model if `name` is an id."""
    references = store.get(name).references
    try:
        named = Reference.parse(name).without_digest()
    except ValueError:
        return references
    return (named,) if named in references else references


def model_of(
    source: Source, descriptor: Descriptor, manifest: Manifest, reference: Reference | None
) -> Model:
    """Return the model of a manifest read from `source`; raise `UnsupportedError` for others."""
    what = str(reference or descriptor.digest)
    manifest.check_is_model(what)
    return Model(reference, descriptor, manifest, _read_config(source, manifest, what))


def remote_model(
    reference: Reference | HubReference, remote: RemoteOptions | None, watch: Watch
) -> Model:
    """Return the model `reference` from its registry or the hub, without fetching its layers.

    A registry needs two small requests, and one for each of several GGUF files of one media type.
    From the hub, small files and the headers of weights are fetched.
    """
    options = remote or RemoteOptions()
    with open_source(reference, options, watch) as opened:
        descriptor, manifest = opened_variant(opened, options, watch)
        config = _read_config(opened.source, manifest, opened.asked)
        model = Model(opened.local, descriptor, manifest, config)
        return with_projectors(opened.source, model)


def with_projectors(source: Source, model: Model) -> Model:
    """Return a model of `source` with the projectors among its GGUF files, by their first bytes.

    Those of a registry are not verified.
    """

    def head(file: ModelFile) -> WeightFile:
        blob = file.descriptor
        content = bytearray(min(blob.size, _HEAD_BYTES))
        with source.blob(blob).open() as stream:
            count = fill(stream, memoryview(content))
        name = file.filepath or blob.digest.short
        return WeightFile(io.BytesIO(content[:count]), path=name, size=blob.size)

    return identified(model, head)


def model_in(repository: Repository, reference: Reference) -> Model:
    """Return the model `reference` of an open repository."""
    descriptor, raw = fetch_referenced_manifest(repository, reference)
    descriptor, manifest = fetch_variant(repository, descriptor, raw, str(reference))
    return model_of(repository, descriptor, manifest, reference)


def remote_config(reference: Reference, remote: RemoteOptions | None = None) -> bytes:
    """Return the bytes of the config blob of the model `reference` in its registry."""
    watch = watching(None)
    with open_repository(reference, remote or RemoteOptions(), watch) as repository:
        return read_blob(repository, model_in(repository, reference).manifest.config)


def _read_config(source: Source, manifest: Manifest, what: str) -> ModelConfig:
    raw = read_blob(source, manifest.config)
    return ModelConfig.parse(raw, manifest.config.media_type, f"config of {what}")
