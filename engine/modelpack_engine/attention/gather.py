"""Attention over gathered keys and values by MLX's functions; works on every device.

Shapes: queries [batch, heads, queries, dim], keys and values [batch, kv heads, keys, dim]. Masks
are None, "causal" (aligned at the bottom right) or bool, broadcast over [batch, heads, queries,
keys].

On CPUs, `attend_on_cpu` computes float32 attention two to three times as fast as MLX's function.
MLX's softmax spends most of its time in `exp`; powers of two are cheaper. The query heads of one KV
head are the rows of one matrix, so that keys are read once. A long chunk is split into blocks of
queries: a block needs no keys after its own, and its scores fit the processor's cache.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext

import mlx.core as mx

Mask = mx.array | str | None

#: MLX's own attention function, whatever replaces it in the process (`patches.functions`).
native_attention: Callable[..., mx.array] = mx.fast.scaled_dot_product_attention

#: Queries per block.
BLOCK = 32

#: With fewer scores, MLX's single call is faster.
FEW_SCORES = 4096


def attend(
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    mask: Mask,
    *,
    scale: float,
    sinks: mx.array | None = None,
    softcap: float | None = None,
    query_pe: mx.array | None = None,
    on_cpu: bool = False,
    second: mx.Stream | None = None,
) -> mx.array:
    """Return [batch, heads, queries, value dim].

    With `query_pe`, `keys` are latents that are the values as well, and `values` the rotary keys.
    On a CPU, the stream `second` may do part of the work.
    """
    if query_pe is not None:
        return _latent(queries, keys, values, query_pe, mask, scale=scale)
    if softcap is not None:
        return _softcapped(queries, keys, values, mask, scale=scale, softcap=softcap)
    batch, heads, length, _ = queries.shape
    kv_heads, num_keys = keys.shape[1:3]
    float32 = queries.dtype == keys.dtype == mx.float32
    if on_cpu and float32 and batch * heads * length * num_keys >= FEW_SCORES:
        return attend_on_cpu(queries, keys, values, mask, scale=scale, sinks=sinks, second=second)
    if on_cpu and length == 1 and sinks is None and heads > kv_heads:
        # The query heads of a KV head become rows of one matmul, which reads the keys once.
        folded = queries.reshape(batch, kv_heads, heads // kv_heads, -1)
        out = native_attention(folded, keys, values, scale=scale, mask=mask)
        return out.reshape(batch, heads, 1, -1)
    return native_attention(queries, keys, values, scale=scale, mask=mask, sinks=sinks)


def _latent(
    queries: mx.array,
    latents: mx.array,
    rotary_keys: mx.array,
    query_pe: mx.array,
    mask: Mask,
    *,
    scale: float,
) -> mx.array:
    """Attend in the latent space; the model has already scaled `query_pe`."""
    scores = _masked(query_pe @ rotary_keys.swapaxes(-1, -2), mask)
    return native_attention(queries, latents, latents, scale=scale, mask=scores)


def _softcapped(
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    mask: Mask,
    *,
    scale: float,
    softcap: float,
) -> mx.array:
    """Attend with scores squashed to (-softcap, softcap), as Gemma 2 does."""
    batch, heads, length, dim = queries.shape
    kv_heads = keys.shape[1]
    grouped = (queries * scale).reshape(batch, kv_heads, heads // kv_heads, length, dim)
    scores = grouped @ keys[:, :, None].swapaxes(-1, -2)
    scores = mx.tanh(scores / softcap) * softcap
    scores = _masked(scores.reshape(batch, heads, length, -1), mask)
    weights = mx.softmax(scores, axis=-1, precise=True)
    weights = weights.reshape(batch, kv_heads, heads // kv_heads, length, -1)
    return (weights @ values[:, :, None]).reshape(batch, heads, length, -1)


def _masked(scores: mx.array, mask: Mask) -> mx.array:
    """Return `scores` with masked positions set to the lowest value of the dtype."""
    if mask is None:
        return scores
    if isinstance(mask, str):
        queries, keys = scores.shape[-2:]
        mask = mx.arange(keys)[None] <= mx.arange(keys - queries, keys)[:, None]
    return mx.where(mask, scores, mx.array(mx.finfo(scores.dtype).min, scores.dtype))


def attend_on_cpu(
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    mask: Mask,
    *,
    scale: float,
    sinks: mx.array | None = None,
    second: mx.Stream | None = None,
) -> mx.array:
    """Return attention [batch, heads, length, value dim].

    `mask` is None, "causal" (aligned at the bottom right), bool [length, keys] (causal as well), or
    bool [batch, 1, 1, keys] for single queries. Every other block of queries runs on the stream
    `second`, if given.
    """
    batch, heads, length, _ = queries.shape
    kv_heads, total = keys.shape[1:3]
    group = heads // kv_heads
    queries = (queries * (scale / math.log(2))).reshape(batch, kv_heads, group, length, -1)
    if sinks is not None:
        sinks = (sinks / math.log(2)).reshape(1, kv_heads, group, 1, 1)
    outputs: list[mx.array] = []
    for start in range(0, length, BLOCK):
        stop = min(start + BLOCK, length)
        seen = total - length + stop if length > 1 else total
        if isinstance(mask, str):
            last = mx.arange(seen - (stop - start), seen)[:, None]
            visible: mx.array | None = mx.arange(seen)[None] <= last
        elif mask is None or length == 1:
            visible = mask if mask is None else mask[:, :, None]
        else:
            visible = mask[start:stop, :seen]
        parts = queries[:, :, :, start:stop], keys[:, :, :seen], values[:, :, :seen]
        stream = second if len(outputs) % 2 else None
        with nullcontext() if stream is None else mx.stream(stream):
            outputs.append(_attend_block(*parts, visible, sinks))
    output = outputs[0] if len(outputs) == 1 else mx.concatenate(outputs, axis=3)
    return output.reshape(batch, heads, length, -1)


def _attend_block(
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    visible: mx.array | None,
    sinks: mx.array | None,
) -> mx.array:
    """Attend from [batch, kv heads, group, length, dim], scaled for powers of two."""
    batch, kv_heads, group, length, dim = queries.shape
    scores = queries.reshape(batch, kv_heads, group * length, dim) @ keys.swapaxes(-1, -2)
    scores = scores.reshape(batch, kv_heads, group, length, -1)
    if visible is not None:
        scores = mx.where(visible, scores, -mx.inf)
    top = mx.max(scores, axis=-1, keepdims=True)
    if sinks is not None:
        top = mx.maximum(top, sinks)
    weights = mx.power(2.0, scores - top)
    total = mx.sum(weights, axis=-1, keepdims=True)
    if sinks is not None:
        total = total + mx.power(2.0, sinks - top)
    output = weights.reshape(batch, kv_heads, group * length, -1) @ values
    return output.reshape(batch, kv_heads, group, length, -1) / total
