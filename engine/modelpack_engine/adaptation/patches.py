"""Patches: modules whose attention or positions have to be said in other words for rows.

Each answers the calls of one of mlx-lm's classes; with a cache of mlx-lm's own, the class does.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import gemma2

from modelpack_engine.adaptation.swaps import Call, ClassSwaps
from modelpack_engine.attention.paged import PagedKV


@dataclass(frozen=True, slots=True)
class Patch:
    """What answers calls of a class, and why."""

    call: Call
    reason: str


def _gemma2_attention(
    original: Call, module: Any, x: mx.array, mask: Any = None, cache: Any = None
) -> Any:
    """Attend with capped scores, which MLX's attention function cannot: mlx-lm does it by hand."""
    if not isinstance(cache, PagedKV):
        return original(module, x, mask, cache)
    rows, length, _ = x.shape

    def heads(projected: mx.array, count: int) -> mx.array:
        return projected.reshape(rows, length, count, -1).transpose(0, 2, 1, 3)

    queries = module.rope(heads(module.q_proj(x), module.n_heads), offset=cache.offset)
    keys = module.rope(heads(module.k_proj(x), module.n_kv_heads), offset=cache.offset)
    cache.update_and_fetch(keys, heads(module.v_proj(x), module.n_kv_heads))
    softcap = module.attn_logit_softcapping
    output = cache.attend(queries, scale=module.scale, softcap=softcap)
    return module.o_proj(output.transpose(0, 2, 1, 3).reshape(rows, length, -1))


PATCHES: dict[type[nn.Module], Patch] = {
    gemma2.Attention: Patch(_gemma2_attention, "caps its scores"),
}


def patch_modules(model: nn.Module, swaps: ClassSwaps) -> dict[str, str]:
    """Patch every module that has one; return class names and reasons."""
    patched: dict[str, str] = {}
    for _, module in model.named_modules():
        patch = PATCHES.get(type(module))
        if patch is not None:
            patched[type(module).__name__] = patch.reason
            swaps.override(module, patch.call)
    return patched
