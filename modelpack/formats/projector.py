"""Projectors (mmproj): GGUF files with an encoder of pictures or sound for a language model.

Source: llama.cpp's tools/mtmd/clip-impl.h and gguf-py's `VisionProjectorType`.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

from modelpack.formats.gguf import GGUFHeader

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
