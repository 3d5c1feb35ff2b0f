"""A model's layout with its keys and values in the type that the user wants."""

from __future__ import annotations

from dataclasses import replace

import mlx.core as mx
import mlx.nn as nn

from modelpack_engine.adaptation.layout import Leaf, ModelLayout, layout_of
from modelpack_engine.attention.pools import KVLayout
from modelpack_engine.attention.quantised import GROUPS, quantisation
from modelpack_engine.errors import EngineError
from modelpack_engine.kv_types import KVCacheDtype

_FLOATS = {"bf16": mx.bfloat16, "fp16": mx.float16}
_BITS = {"q8": 8, "q4": 4}


def layout_with_cache_type(model: nn.Module, kind: KVCacheDtype) -> ModelLayout | None:
    """Return what a model caches, keys and values as `kind`; None if it cannot be paged."""
    layout = layout_of(model)
    return None if layout is None else with_cache_type(layout, kind)


def with_cache_type(layout: ModelLayout, kind: KVCacheDtype) -> ModelLayout:
    """Return `layout` with keys and values of the type `kind`.

    Raises `EngineError` for a model that cannot be quantised: one that caches latents, which are
    keys and values in one and compressed as they are, or whose heads do not fall into groups.
    """
    if kind in _FLOATS:
        return layout.with_dtype(_FLOATS[kind])
    if kind not in _BITS:
        return layout

    def quantise(leaf: Leaf) -> Leaf:
        content = leaf.content
        if not isinstance(content, KVLayout):
            return leaf
        problem = None
        found = quantisation(_BITS[kind], content.key_dim, content.value_dim)
        if _holds_latents(leaf, content):
            problem = "it caches latents, which keys and values share"
        elif found is None or content.value_dim == 0:
            dims = f"{content.key_dim}/{content.value_dim}"
            problem = f"heads have {dims} elements, expected multiples of {GROUPS[-1]}"
        if problem is not None:
            raise EngineError(
                f"{leaf.name} cannot have its keys and values in {kind}: {problem}",
                hint="use --kv-cache-dtype auto, bf16 or fp16 for this model",
            )
        return replace(leaf, content=replace(content, quantised=found))

    return layout.with_leaves(quantise)


def _holds_latents(leaf: Leaf, content: KVLayout) -> bool:
    return getattr(leaf.owner, "kv_lora_rank", None) in (content.key_dim, content.value_dim)
