"""Attention over gathered keys and values by MLX's own functions; works on every device.

Shapes: queries [batch, heads, queries, dim], keys and values [batch, kv heads, keys, dim]. Masks
are None, "causal" (aligned at the bottom right) or bool, broadcast over [batch, heads, queries,
keys].
"""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx

from modelpack_engine.attention import cpu

Mask = mx.array | str | None

#: MLX's own attention function, whatever replaces it in the process (`patches.functions`).
native_attention: Callable[..., mx.array] = mx.fast.scaled_dot_product_attention


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
    if on_cpu and cpu.worthwhile(queries, keys):
        return cpu.attend(queries, keys, values, mask, scale=scale, sinks=sinks, second=second)
    batch, heads, length, _ = queries.shape
    kv_heads = keys.shape[1]
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
    scores = query_pe @ rotary_keys.swapaxes(-1, -2)
    scores = _masked(scores, mask)
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
