"""Patches: modules whose attention or positions have to be said in other words for rows.

Each answers the calls of one of mlx-lm's classes; without the caches of a step, the class does.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from modelpack_engine.adaptation.swaps import Call, ClassSwaps
from modelpack_engine.attention.handles import KVHandle
from modelpack_engine.attention.paged import PagedKV


@dataclass(frozen=True, slots=True)
class Patch:
    """What answers calls of a class, and why."""

    call: Call
    reason: str


#: Patches by the full name of the class: looking one up imports no model.
PATCHES: dict[str, Patch] = {}


def _patches(name: str, reason: str) -> Callable[[Call], Call]:
    def register(call: Call) -> Call:
        PATCHES[f"mlx_lm.models.{name}"] = Patch(call, reason)
        return call

    return register


def patch_modules(model: nn.Module, swaps: ClassSwaps) -> dict[str, str]:
    """Patch every module that has one; return class names and reasons."""
    patched: dict[str, str] = {}
    for _, module in model.named_modules():
        kind = type(module)
        patch = PATCHES.get(f"{kind.__module__}.{kind.__qualname__}")
        if patch is not None:
            patched[kind.__name__] = patch.reason
            swaps.override(module, patch.call)
    return patched


@_patches("gemma2.Attention", "caps its scores, which MLX's attention function cannot")
def _gemma2_attention(
    original: Call, module: Any, x: mx.array, mask: Any = None, cache: Any = None
) -> Any:
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


@_patches("gpt_bigcode.GPTBigCodeModel", "looks positions up in a table")
def _gpt_bigcode(original: Call, module: Any, inputs: mx.array, cache: Any = None) -> Any:
    if not cache or not isinstance(cache[0], PagedKV):
        return original(module, inputs, cache)
    hidden = module.wte(inputs) + module.wpe(cache[0].offset)[:, None]
    for layer, layer_cache in zip(module.h, cache, strict=True):
        hidden = layer(hidden, None, cache=layer_cache)
    return module.ln_f(hidden)


@_patches("afm7.KVReuseAttention", "tells positions by the number of keys")
def _afm7_reuse(
    original: Call, module: Any, x: mx.array, keys: mx.array, values: mx.array, mask: Any = None
) -> Any:
    if not isinstance(keys, KVHandle) or not isinstance(keys.cache, PagedKV):
        return original(module, x, keys, values, mask)
    rows, length, _ = x.shape
    queries = module.q_proj(x).reshape(rows, length, module.n_heads, -1).transpose(0, 2, 1, 3)
    queries = module.q_norm(module.rope(queries, offset=keys.cache.offset))
    output = keys.cache.attend(queries, scale=module.scale)
    return module.out_proj(output.transpose(0, 2, 1, 3).reshape(rows, length, -1))


@_patches("longcat_flash_ngram.NgramEmbedding", "keeps fewer tokens while there are few")
def _longcat_ngrams(original: Call, module: Any, input_ids: mx.array, cache: Any = None) -> Any:
    embedded = original(module, input_ids, cache)
    if cache is not None and (missing := module.n - 1 - cache[0].shape[1]) > 0:
        # Tokens that are not there count as 0, and so do these.
        cache[0] = mx.pad(cache[0], [(0, 0), (missing, 0)])
    return embedded
