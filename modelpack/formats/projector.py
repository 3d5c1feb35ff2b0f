"""Projectors (mmproj): GGUF files with an encoder of pictures or sound for a language model.

Source: llama.cpp's tools/mtmd/clip-impl.h and gguf-py's `VisionProjectorType`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Final

from modelpack.artifacts.model import Model, ModelFile, Role
from modelpack.errors import (
    FormatError,
    ModelpackError,
    NotFoundError,
    PackagingError,
    SourceChangedError,
)
from modelpack.formats.gguf import GGUFHeader, read_gguf_architecture
from modelpack.formats.reader import WeightSource
from modelpack.formats.shards import ShardSet, shard_set

#: The `general.architecture` of projectors.
PROJECTOR_ARCHITECTURE: Final = "clip"
_TYPES: Final = ("clip.projector_type", "clip.vision.projector_type")  # of one, of several encoders
#: The last tensor of a projector by its type, and which of its dimensions, in ggml's order, is the
#: width of the embeddings.
_OUTPUTS: Mapping[str, tuple[str, int]] = MappingProxyType(
    {
        "gemma3": ("mm.input_projection.weight", 0),
        "idefics3": ("mm.model.fc.weight", 1),
        "internvl": ("mm.model.mlp.3.weight", 1),
        "mlp": ("mm.2.weight", 1),
        "pixtral": ("mm.2.weight", 1),
        "qwen2.5vl_merger": ("mm.2.weight", 1),
        "qwen2vl_merger": ("mm.2.weight", 1),
        "qwen3vl_merger": ("mm.2.weight", 1),
    }
)


def gguf_role(source: WeightSource, otherwise: Role) -> Role:
    """Return whether a GGUF file is a projector or weights, by its architecture.

    `otherwise` is returned for a missing or damaged file.
    """
    try:
        found = read_gguf_architecture(source)
    except (FormatError, NotFoundError, SourceChangedError):
        return otherwise
    return Role.PROJECTOR if found == PROJECTOR_ARCHITECTURE else Role.WEIGHT


def identified(model: Model, content: Callable[[ModelFile], WeightSource]) -> Model:
    """Return `model` with the projectors among its GGUF files, as their content says.

    Media types decide where they can (`ModelFile.may_be_projector`). `content` opens a file; those
    that cannot be read keep the role that their name gives them. Nothing is opened of a
    model with one GGUF file or its shards, unless a name is that of a projector.
    """
    files = [file for file in model.files() if file.may_be_projector]
    are_weights = all(file.role is Role.WEIGHT for file in files)
    if are_weights and len({_set_of(file) for file in files}) < 2:
        return model
    projectors = set()
    for file in files:
        try:
            role = gguf_role(content(file), file.role)
        except ModelpackError:  # whoever needs the file says why it cannot be read
            role = file.role
        if role is Role.PROJECTOR:
            projectors.add(file.descriptor.digest)
    return replace(model, projectors=frozenset(projectors))


def _set_of(file: ModelFile) -> ShardSet | str:
    """Return the set that a shard belongs to, otherwise the path of the file, or its digest."""
    path = file.filepath or str(file.descriptor.digest)
    try:
        return shard_set(path) or path
    except PackagingError:  # the shard number exceeds the count, so it is not a shard
        return path


def architecture_of(header: GGUFHeader) -> str | None:
    """Return the `general.architecture` of a GGUF file, None if it has no such text."""
    return _text(header, "general.architecture")


def projector_type(header: GGUFHeader) -> str | None:
    """Return the type of a projector of pictures; None if the file has none.

    A projector without `clip.has_vision_encoder` encodes sound only.
    """
    encodes = header.metadata.get("clip.has_vision_encoder")
    if encodes is None or encodes.value is not True:
        return None
    found = next((found for key in _TYPES if (found := _text(header, key))), None)
    is_llava = header.metadata.get("clip.has_llava_projector")  # the oldest files name no type
    return "mlp" if found is None and is_llava is not None and is_llava.value is True else found


def projected_width(header: GGUFHeader) -> int | None:
    """Return the width of a projector's embeddings of pictures; None for types not known here.

    `clip.vision.projection_dim` says it too, but in older files of LLaVA it is that of CLIP.
    """
    name, dimension = _OUTPUTS.get(projector_type(header) or "", ("", 0))
    shape = next((tensor.shape for tensor in header.tensors if tensor.name == name), ())
    return shape[dimension] if len(shape) == 2 else None


def embedding_width(header: GGUFHeader) -> int | None:
    """Return the width of the embeddings of a language model in GGUF, None if it names none."""
    value = header.metadata.get(f"{architecture_of(header)}.embedding_length")
    return value.value if value is not None and isinstance(value.value, int) else None


def _text(header: GGUFHeader, key: str) -> str | None:
    value = header.metadata.get(key)
    return value.value if value is not None and isinstance(value.value, str) else None
