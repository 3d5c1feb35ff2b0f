"""Read the headers of a model's weight files, from the store or by ranges from a registry."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, cast

from modelpack.artifacts.model import Model, ModelFile
from modelpack.artifacts.reference import Reference
from modelpack.errors import UnsupportedError
from modelpack.formats.gguf import GGUFHeader, read_gguf_header
from modelpack.formats.reader import WeightFile
from modelpack.formats.safetensors import SafetensorsHeader, read_safetensors_header
from modelpack.operations.lookup import check_whole, model_in, stored_model
from modelpack.operations.remote import RemoteOptions, open_repository
from modelpack.operations.resolve import has_packed_weights, unpacked_files
from modelpack.progress import Stop
from modelpack.storage import watching
from modelpack.store.layout import LayoutStore

if TYPE_CHECKING:
    from modelpack.registry import Repository

_READERS: dict[str, Callable[[WeightFile], GGUFHeader | SafetensorsHeader]] = {
    "gguf": read_gguf_header,
    "safetensors": read_safetensors_header,
}


@dataclass(frozen=True, slots=True)
class FileHeader:
    """The header of one file, and the bytes and requests that it took, both 0 for a stored file.

    The header of a remote file is not verified, since a digest covers the whole file.
    """

    file: ModelFile
    header: GGUFHeader | SafetensorsHeader
    bytes_fetched: int = 0
    requests: int = 0


def read_headers(
    name: str | Reference,
    *,
    files: Sequence[str] = (),
    store: LayoutStore | None = None,
    remote: RemoteOptions | None = None,
    from_registry: bool = False,
    stop: Stop | None = None,
) -> tuple[FileHeader, ...]:
    """Return the headers of the model's GGUF and safetensors files, or of `files` among them.

    With `from_registry`, only a few ranges of each file are fetched. Raises `NotFoundError`,
    `WeightFormatError` for a damaged header, and `UnsupportedError` for packed weights in a
    registry.
    """
    name = str(name)
    if from_registry:
        where = Reference.parse(name)
        watch = watching(None, stop)
        with open_repository(where, remote or RemoteOptions(), watch) as repository:
            model = model_in(repository, where)
            if has_packed_weights(model):
                raise UnsupportedError(
                    "has its weights inside archives or in a layer for each tensor, which cannot "
                    "be read by ranges",
                    path=str(where),
                    hint=f"run `modelpack pull {where}`, then repeat without --remote",
                )
            chosen = _readable(model, files)
            return tuple(_fetch(repository, file) for file in chosen)
    store = store or LayoutStore()
    model = stored_model(store, name)
    if has_packed_weights(model):
        check_whole(store, model)
        paths = dict(unpacked_files(model, store, watching(None, stop)))
        chosen = _readable(model, files, among=tuple(paths))
        return tuple(FileHeader(file, _read(paths[file], file)) for file in chosen)
    chosen = _readable(model, files)
    if any(file.descriptor in store.missing(name) for file in chosen):
        check_whole(store, model)
    places = {file: store.blob_path(file.descriptor.digest) for file in chosen}
    return tuple(FileHeader(file, _read(places[file], file)) for file in chosen)


def _fetch(repository: Repository, file: ModelFile) -> FileHeader:
    size = file.descriptor.size
    with repository.open_file(file.descriptor) as content:
        path = file.filepath or str(file.descriptor.digest)
        header = _READERS[file.format](WeightFile(cast(BinaryIO, content), path=path, size=size))
        return FileHeader(file, header, content.bytes_fetched, content.requests)


def _read(path: Path, file: ModelFile) -> GGUFHeader | SafetensorsHeader:
    with WeightFile.open(path) as weights:
        weights.path = file.filepath or weights.path
        return _READERS[file.format](weights)


def _readable(
    model: Model, files: Sequence[str], *, among: Sequence[ModelFile] | None = None
) -> tuple[ModelFile, ...]:
    types = () if files else ("gguf", "safetensors", "mmproj")
    found = model.select(types, files, among=among)
    return tuple(file for file in found if file.format in _READERS and not file.is_packed)
