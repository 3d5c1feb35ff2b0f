"""Recognise EAGLE-3 heads by their config.json, and compare them with the model they draft for.

A head is a directory of safetensors and a config.json in the format of SGLang and vLLM
(`LlamaForCausalLMEagle3`) or of vLLM's speculators library. The engine checks all tensors at load.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Final

from modelpack.errors import PackagingError

#: Architectures in config.json that are EAGLE-3 heads with a layer like Llama's.
ARCHITECTURES: Final = frozenset(
    {"LlamaForCausalLMEagle3", "Eagle3LlamaForCausalLM", "Eagle3Speculator", "Eagle3DraftModel"}
)
_EMBEDDINGS: Final = ("embed_tokens.weight", "token_embd.weight")
_NORMS: Final = ("model.norm.weight", "output_norm.weight")

Shapes = Mapping[str, tuple[int, ...]]


def is_head(config: Mapping[str, Any] | None) -> bool:
    """Return whether a config.json is that of an EAGLE-3 head."""
    if config is None:
        return False
    named = config.get("architectures")
    names = {name for name in named if isinstance(name, str)} if isinstance(named, list) else set()
    return bool(names & ARCHITECTURES) or config.get("speculators_model_type") == "eagle3"


def check_head(config: Mapping[str, Any], head: Shapes, base: Shapes | None, what: str) -> None:
    """Raise `PackagingError` for a head without its main tensors, or for another model than `base`.

    `head` and `base` are the shapes of their tensors; `base` is None if they are unknown.
    """
    if not is_head(config):
        raise PackagingError(
            f"{what}: config.json is not that of an EAGLE-3 head",
            hint="give the directory of a head for SGLang or vLLM",
        )
    for name in ("fc.weight", "lm_head.weight"):
        if len(head.get(name, ())) != 2:
            raise PackagingError(f"{what}: the EAGLE head has no matrix {name}")
    if base is None:
        return
    inner = config.get("transformer_layer_config", config)
    vocab = inner.get("vocab_size") if isinstance(inner, Mapping) else None
    sizes = _last(base, _EMBEDDINGS)
    if sizes is not None and vocab not in sizes:
        raise PackagingError(
            f"{what}: the EAGLE head is for a vocabulary of {vocab} tokens, the base's embeddings "
            f"are {' x '.join(map(str, sizes))}",
            hint="name the model that the head was trained for",
        )
    norm = _last(base, _NORMS)
    if norm is not None and head["fc.weight"][1] != 3 * norm[0]:
        raise PackagingError(
            f"{what}: the EAGLE head reads {head['fc.weight'][1]} values per token, expected three "
            f"hidden states of the base's {norm[0]}",
            hint="name the model that the head was trained for",
        )


def _last(shapes: Shapes, names: Iterable[str]) -> tuple[int, ...] | None:
    """Return the shape of the tensor with one of these names, or with a prefix before it."""
    for found, shape in shapes.items():
        if found.endswith(tuple(names)):
            return shape
    return None
