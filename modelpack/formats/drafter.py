"""Recognise drafters by their config.json, and compare them with the model they draft for.

A drafter is a directory of safetensors and a config.json: an EAGLE-3 head in the format of SGLang
and vLLM (`LlamaForCausalLMEagle3`) or of vLLM's speculators library, or the drafter that Google
publishes for a Gemma 4 (`Gemma4AssistantForCausalLM`). The engine checks all tensors at load.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

from modelpack.errors import PackagingError

#: Architectures in config.json that are EAGLE-3 heads with a layer like Llama's.
ARCHITECTURES: Final = frozenset(
    {"LlamaForCausalLMEagle3", "Eagle3LlamaForCausalLM", "Eagle3Speculator", "Eagle3DraftModel"}
)
#: Architectures that draft from Gemma 4's own keys and values.
ASSISTANTS: Final = frozenset({"Gemma4AssistantForCausalLM", "Gemma4UnifiedAssistantForCausalLM"})
_ASSISTANT_TYPES: Final = ("gemma4_assistant", "gemma4_unified_assistant")
_EMBEDDINGS: Final = ("embed_tokens.weight", "token_embd.weight")
_NORMS: Final = ("model.norm.weight", "output_norm.weight")

Shapes = Mapping[str, tuple[int, ...]]
DrafterKind = Literal["eagle3", "gemma4-assistant"]


@dataclass(frozen=True, slots=True)
class _Format:
    """What errors call a drafter, and its matrices; the first reads `states` states of a token."""

    name: str
    states: int
    matrices: tuple[str, ...]


_FORMATS: Final[Mapping[DrafterKind, _Format]] = {
    "eagle3": _Format("EAGLE head", 3, ("fc.weight", "lm_head.weight")),
    # An embedding and a state, which are as long as each other.
    "gemma4-assistant": _Format(
        "Gemma 4 drafter",
        2,
        ("pre_projection.weight", "post_projection.weight", "embed_tokens.weight"),
    ),
}


def drafter_kind(config: Mapping[str, Any] | None) -> DrafterKind | None:
    """Return which drafter has this config.json, or None if it is not one's."""
    if config is None:
        return None
    named = config.get("architectures")
    names = {name for name in named if isinstance(name, str)} if isinstance(named, list) else set()
    if names & ARCHITECTURES or config.get("speculators_model_type") == "eagle3":
        return "eagle3"
    if names & ASSISTANTS or config.get("model_type") in _ASSISTANT_TYPES:
        return "gemma4-assistant"
    return None


def check_drafter(
    config: Mapping[str, Any], own: Shapes, base: Shapes | None, what: str
) -> DrafterKind:
    """Return the kind of a drafter that has its main tensors and fits `base`.

    `own` and `base` are the shapes of their tensors; `base` is None if they are unknown. Raises
    `PackagingError` otherwise.
    """
    kind = drafter_kind(config)
    if kind is None:
        raise PackagingError(
            f"{what}: config.json is not that of an EAGLE-3 head or of Gemma 4's drafter",
            hint="give the directory of a head for SGLang or vLLM, or of a gemma-4-*-assistant",
        )
    name, states, matrices = _FORMATS[kind].name, _FORMATS[kind].states, _FORMATS[kind].matrices
    for matrix in matrices:
        if len(own.get(matrix, ())) != 2:
            raise PackagingError(f"{what}: the {name} has no matrix {matrix}")
    if base is None:
        return kind
    inner = config.get("transformer_layer_config", config.get("text_config", config))
    vocab = inner.get("vocab_size") if isinstance(inner, Mapping) else None
    sizes = _last(base, _EMBEDDINGS)
    if sizes is not None and vocab not in sizes:
        raise PackagingError(
            f"{what}: the {name} is for a vocabulary of {vocab} tokens, the base's embeddings "
            f"are {' x '.join(map(str, sizes))}",
            hint="name the model that the drafter was trained for",
        )
    norm = _last(base, _NORMS)
    reads = own[matrices[0]][1]
    if norm is not None and reads != states * norm[0]:
        raise PackagingError(
            f"{what}: the {name} reads {reads} values per token, expected {states} times the "
            f"base's hidden size of {norm[0]}",
            hint="name the model that the drafter was trained for",
        )
    return kind


def _last(shapes: Shapes, names: Iterable[str]) -> tuple[int, ...] | None:
    """Return the shape of the tensor with one of these names, or with a prefix before it."""
    for found, shape in shapes.items():
        if found.endswith(tuple(names)):
            return shape
    return None
