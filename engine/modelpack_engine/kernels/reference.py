"""Reference operations by MLX's functions: slow, simple, and correct on every device.

Kernels are compared with them, and they run where no kernel does.
"""

from __future__ import annotations

import mlx.core as mx

from modelpack_engine.kernels.quantised import Quantisation

#: The largest difference that a probe allows between a kernel's outputs and the reference.
TOLERANCE = {mx.float32: 2e-4, mx.float16: 4e-3, mx.bfloat16: 3e-2}


def decode_attention(
    q: mx.array,
    k_pool: mx.array,
    v_pool: mx.array,
    block_tables: mx.array,
    context_lens: mx.array,
    *,
    scale: float,
    num_kv_heads: int,
    window: int | None = None,
    softcap: float | None = None,
    sinks: mx.array | None = None,
    q_more: mx.array | None = None,
    value_dim: int | None = None,
    block_size: int = 16,
    quantised: Quantisation | None = None,
) -> mx.array:
    """Compute decode attention in float32, over the whole width of the block tables."""
    rows, num_heads, _ = q.shape
    group = num_heads // num_kv_heads
    width = block_tables.shape[1] * block_size
    offsets = mx.arange(block_size, dtype=mx.int32)
    slots = (block_tables[:, :, None] * block_size + offsets).reshape(rows, width)
    keys = _rows(k_pool, slots, num_kv_heads, quantised)
    values = keys[..., :value_dim] if value_dim else _rows(v_pool, slots, num_kv_heads, quantised)
    scaled = q.astype(mx.float32) * scale
    if q_more is not None:
        keys = mx.concatenate([keys, v_pool[slots].astype(mx.float32)], axis=-1)
        scaled = mx.concatenate([scaled, q_more.astype(mx.float32)], axis=-1)
    grouped = scaled.reshape(rows, num_kv_heads, group, -1)
    scores = grouped @ keys.transpose(0, 2, 3, 1)  # [rows, kv heads, group, width]
    if softcap is not None:
        scores = mx.tanh(scores / softcap) * softcap
    positions = mx.arange(width, dtype=mx.int32)[None]
    ends = mx.minimum(context_lens, width)[:, None]
    seen = positions < ends
    if window is not None:
        seen = seen & (positions >= ends - window)
    seen = seen[:, None, None, :]
    scores = mx.where(seen, scores, -mx.inf)
    top = mx.max(scores, axis=-1, keepdims=True)
    if sinks is not None:
        sink = sinks.astype(mx.float32).reshape(1, num_kv_heads, group, 1)
        top = mx.maximum(top, sink)
    weights = mx.where(seen, mx.exp(scores - top), 0.0)
    total = weights.sum(axis=-1, keepdims=True)
    if sinks is not None:
        total = total + mx.exp(sink - top)
    # A row without visible tokens is zero, not NaN.
    weights = weights / mx.where(total > 0, total, 1.0)
    out = weights @ values.transpose(0, 2, 1, 3)
    return out.reshape(rows, num_heads, -1).astype(q.dtype)


def _rows(pool: mx.array, slots: mx.array, heads: int, quantised: Quantisation | None) -> mx.array:
    """Return float32 [rows, width, heads, dim]."""
    found = pool[slots]
    if quantised is None:
        return found.astype(mx.float32)
    return quantised.decode(found[..., 0, :], mx.float32).reshape(*slots.shape, heads, -1)


def write_rows(
    rows: mx.array, pool: mx.array, slots: mx.array, quantised: Quantisation | None = None
) -> mx.array:
    """Scatter `rows` into `pool` at `slots`; negative slots become slot 0, in the null block.

    MLX writes in place if there is no other reference to the pool, and copies it otherwise.
    """
    if quantised is not None:
        rows = quantised.encode(rows.reshape(rows.shape[0], -1))
    pool[mx.maximum(slots, 0)] = rows.reshape(-1, *pool.shape[1:]).astype(pool.dtype)
    return pool
