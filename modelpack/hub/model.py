"""HubModel: a model of the hub as a manifest and blobs; fulfils `Source`.

The manifest is made without downloading weights: the hub states the SHA-256 of files in LFS or Xet,
which is a layer's digest, and range requests read the headers of weights. Small files are
downloaded. The manifest depends on the commit alone, so all pulls and copies of it have the same
digest.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import BinaryIO, Final, TypeVar, cast

from modelpack.artifacts import media_types
from modelpack.artifacts.config import ModelConfig
from modelpack.artifacts.descriptor import Descriptor
from modelpack.artifacts.digest import Digest
from modelpack.artifacts.manifest import Manifest
from modelpack.builder.build import Built, build_from_layers, file_layer
from modelpack.builder.classify import MEDIA_TYPES, FileKind, classify
from modelpack.builder.conversion import docker_config_type
from modelpack.builder.files import LayerMetadata
from modelpack.builder.times import EPOCH
from modelpack.errors import NotFoundError, PackagingError, WeightFormatError
from modelpack.formats.dduf import read_dduf_header
from modelpack.formats.gguf import read_gguf_header
from modelpack.formats.reader import WeightFile
from modelpack.formats.safetensors import read_safetensors_header
from modelpack.formats.statistics import (
    ModelStatistics,
    dduf_statistics,
    gguf_statistics,
    safetensors_statistics,
)
from modelpack.hub.reference import HubReference, origin_annotations
from modelpack.hub.repository import HubFile, HubRepository
from modelpack.hub.selection import Choice
from modelpack.storage import BlobSource, BytesBlob, FileBlob

T = TypeVar("T")
#: Runs independent tasks, several at a time, and returns their results.
RunAll = Callable[[Sequence[Callable[[], T]]], list[T]]

_FILE_MODE: Final = 0o644  # git has no other, except for executables


@dataclass(frozen=True, slots=True)
class HubModel:
    """A model at a commit. `notes` tell users which files were chosen and left out."""

    reference: HubReference
    manifest: Manifest
    config: ModelConfig
    notes: tuple[str, ...]
    _repository: HubRepository
    _small: Mapping[Digest, BlobSource]

    @property
    def descriptor(self) -> Descriptor:
        """The descriptor of the manifest."""
        return self.manifest.descriptor

    def resolve(self, name: str) -> Descriptor:
        """Return the manifest's descriptor, whatever the name: there is only one."""
        return self.descriptor

    def fetch_manifest(self, descriptor: Descriptor) -> bytes:
        """Return the manifest's bytes; raise `NotFoundError` for any other manifest."""
        if descriptor.digest != self.descriptor.digest:
            raise NotFoundError(f"{self.reference} has no manifest {descriptor.digest}")
        return self.manifest.raw

    def referrers(self, subject: Digest, artifact_type: str | None = None) -> list[Descriptor]:
        """Return an empty list: the hub has no referrers."""
        return []

    def blob(self, descriptor: Descriptor) -> BlobSource:
        """Return the blob as a source; a large one is read from the hub."""
        return self._small.get(descriptor.digest) or self._repository.blob(
            descriptor.filepath or "", descriptor
        )


def hub_model(
    repository: HubRepository, choice: Choice, directory: Path, run_all: RunAll[HubFile]
) -> HubModel:
    """Return the model of the chosen files; small ones are kept in `directory`.

    Raises `WeightFormatError` for weights that do not parse, `PackagingError` for shards that are
    missing, and what reading from the hub raises.
    """
    tasks = [partial(_fetched, repository, file, directory) for file in choice.files]
    files = {file.path: file for file in run_all(tasks)}
    layers = [_layer(files[file.path], choice) for file in choice.files]
    statistics = _statistics(repository, [files[f.path] for f in choice.weights], choice, directory)
    built: Built = build_from_layers(
        statistics,
        layers,
        config_type=docker_config_type(layers),
        created=EPOCH,
        annotations=origin_annotations(repository.reference),
        notes=(*choice.notes, *statistics.notes),
    )
    small: dict[Digest, BlobSource] = {
        layer.digest: FileBlob(directory / layer.filepath)
        for layer in layers
        if layer.filepath and (directory / layer.filepath).exists()
    }
    small[built.manifest.config.digest] = BytesBlob(built.config_bytes)
    return HubModel(
        repository.reference, built.manifest, built.config, built.notes, repository, small
    )


def _fetched(repository: HubRepository, file: HubFile, directory: Path) -> HubFile:
    """Return the file with its SHA-256; download it to `directory` if that needs its bytes."""
    place = directory / file.path
    place.parent.mkdir(parents=True, exist_ok=True)  # statistics look for shards in it
    # Statistics need the bytes of the config and of an index of shards.
    if file.sha256 and not file.path.endswith((".safetensors.index.json", "config.json")):
        return file
    content = repository.read(file)
    place.write_bytes(content)
    return replace(file, sha256=Digest.of(content))


def _layer(file: HubFile, choice: Choice) -> Descriptor:
    assert file.sha256 is not None, f"{file.path} was fetched without its digest"
    media_type = MEDIA_TYPES[classify(file.path)]
    if any(file.path == projector.path for projector in choice.projectors):
        media_type = media_types.DOCKER_MMPROJ
    name = file.path.rpartition("/")[2]
    metadata = LayerMetadata(name=name, mode=_FILE_MODE, size=file.size, mtime=EPOCH)
    return file_layer(media_type, file.sha256, metadata, file.path)


def _statistics(
    repository: HubRepository, weights: Sequence[HubFile], choice: Choice, directory: Path
) -> ModelStatistics:
    try:
        if choice.kind is FileKind.GGUF:
            return gguf_statistics(_headers(repository, weights, directory, read_gguf_header))
        if choice.kind is FileKind.DDUF:
            return dduf_statistics(_headers(repository, weights, directory, read_dduf_header))
        headers = _headers(repository, weights, directory, read_safetensors_header)
        return safetensors_statistics(headers, config_json=directory / "config.json")
    except PackagingError as error:  # it names the temporary directory
        message = error.message.replace(str(directory), str(repository.reference))
        hint = "check the repository on the hub: it is incomplete"
        raise PackagingError(message, hint=hint) from None
    except WeightFormatError as error:
        where = (error.path or "").replace(f"{directory}/", f"{repository.reference}: ")
        raise WeightFormatError(error.message, path=where, offset=error.offset) from None


def _headers(
    repository: HubRepository,
    files: Sequence[HubFile],
    directory: Path,
    read: Callable[[WeightFile], T],
) -> list[T]:
    found = []
    for file in files:
        place = directory / file.path
        if place.exists():
            with WeightFile.open(place) as content:
                found.append(read(content))
        else:
            with repository.open_file(file) as remote:
                stream = cast(BinaryIO, remote)
                found.append(read(WeightFile(stream, path=str(place), size=file.size)))
    return found
