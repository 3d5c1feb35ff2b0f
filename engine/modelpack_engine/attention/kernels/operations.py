"""The two operations as the engine calls them: by kernel where one may run, else by MLX."""

from __future__ import annotations

import mlx.core as mx

from modelpack_engine.attention.kernels import launch, naive, prefill, support
from modelpack_engine.attention.kernels.order import after, token_of, written
from modelpack_engine.attention.kernels.plan import (
    AttentionShape,
    accumulators,
    plan_decode,
    simdgroups,
)
from modelpack_engine.attention.kernels.sources import CONSTANT_BELOW
from modelpack_engine.attention.quantised import Quantisation


def decode_attention(
    q: mx.array,
    k_pool: mx.array,
    v_pool: mx.array | None,
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
    split: int | None = None,
    quantised: Quantisation | None = None,
) -> mx.array:
    """Return attention [B, H, Dv] in q's dtype, of q [B, H, D], one row a sequence.

    Row b sees the last `window` (None: all) of its first `context_lens[b]` tokens, in the blocks
    `block_tables[b]` (int32 [B, width]). `sinks` [H] join the softmax's denominator only; `softcap`
    c squashes scores to c * tanh(score / c). `split` fixes into how many parts contexts are split.

    Latent attention keeps values in the keys: `value_dim` says that values are the first elements
    of k_pool's rows, and v_pool is None, or [slots, Hkv, Dx] and goes on with the keys where k_pool
    ends; `q_more` [B, H, Dx] then goes on with the queries, scaled already as the models do it.

    Pools that are `quantised` are uint32 [slots, 1, words], and neither is for latents.
    """
    pools = (k_pool, k_pool if v_pool is None else v_pool)
    dims = [pool.shape[-1] for pool in pools]
    if quantised is not None:
        assert value_dim is None, "latents are not quantised"
        dims = [quantised.width(words) // num_kv_heads for words in dims]
    shape = AttentionShape(
        num_heads=q.shape[1],
        num_kv_heads=num_kv_heads,
        key_dim=dims[0],
        value_dim=value_dim or dims[1],
        extra_dim=0 if q_more is None else q_more.shape[-1],
        latent=value_dim is not None,
        block_size=block_size,
        window=window,
        softcap=softcap is not None,
        sinks=sinks is not None,
        bits=0 if quantised is None else quantised.bits,
        group=0 if quantised is None else quantised.group,
    )
    assert q.shape[-1] == shape.key_dim, (q.shape, k_pool.shape)
    assert shape.latent or v_pool is not None, "values are in neither pool"
    assert (q_more is None) == (not shape.latent or v_pool is None), "queries and keys differ"
    token = token_of(k_pool)
    if v_pool is None:
        v_pool = k_pool
    if not support.may_decode(shape, q.dtype, k_pool.dtype):
        return naive.decode_attention(
            q, k_pool, v_pool, after(block_tables, k_pool, v_pool), context_lens,
            scale=scale, num_kv_heads=num_kv_heads, window=window, softcap=softcap, sinks=sinks,
            q_more=q_more, value_dim=value_dim, block_size=block_size, quantised=quantised,
        )  # fmt: skip
    plan = plan_decode(
        shape, k_pool.dtype.size, q.shape[0], block_tables.shape[1] * block_size, split,
        simdgroups=simdgroups(launch.backend()),
        max_accumulators=accumulators(launch.backend()),
    )  # fmt: skip
    return launch.decode(
        plan, shape, launch.backend(), q, k_pool, v_pool,
        block_tables.astype(mx.int32), context_lens.astype(mx.int32),
        scale=scale, softcap=softcap, sinks=sinks, q_more=q_more, written=token,
    )  # fmt: skip


def prefill_attention(
    q: mx.array,
    k_pool: mx.array,
    v_pool: mx.array,
    tiles: prefill.Tiles,
    *,
    scale: float,
    num_kv_heads: int,
    window: int | None = None,
    softcap: float | None = None,
    sinks: mx.array | None = None,
    block_size: int = 16,
) -> mx.array | None:
    """Return attention [rows, H, D] of the rows of `tiles`, or None where there is no kernel."""
    shape = AttentionShape(
        num_heads=q.shape[1],
        num_kv_heads=num_kv_heads,
        key_dim=k_pool.shape[-1],
        value_dim=v_pool.shape[-1],
        block_size=block_size,
        window=window,
        softcap=softcap is not None,
        sinks=sinks is not None,
    )
    if not support.may_prefill(shape, q.dtype, k_pool.dtype):
        return None
    return prefill.attend(
        q, k_pool, v_pool, tiles, shape, scale=scale, softcap=softcap, sinks=sinks
    )


def write_kv(
    k: mx.array,
    v: mx.array | None,
    k_pool: mx.array,
    v_pool: mx.array | None,
    slots: mx.array,
    previous_token: mx.array | None = None,
    *,
    quantised: Quantisation | None = None,
) -> tuple[mx.array, mx.array | None]:
    """Write rows k [T, Hkv, D] and v [T, Hkv, Dv] to `slots` (int32 [T]); return the pools.

    Use the returned pools from then on, and drop the ones passed in. With the kernel they share the
    memory of the latter and nothing is copied, whoever else holds them. Rows of negative slots are
    dropped. `previous_token` orders this write after another one; by default, the pools' last.
    Pools that are `quantised` are uint32 [slots, 1, words], and both of them are needed.
    """
    assert (v is None) == (v_pool is None), "values have no pool, or a pool no values"
    # Metal has fewer elements in `constant`, where the kernel does not read vectors.
    tiny = min(k.size, k.size if v is None else v.size) < CONSTANT_BELOW
    if tiny or not support.may_write(k.dtype, k_pool.dtype, quantised):
        slots = after(slots, k_pool, v_pool)
        k_pool = naive.write_rows(k, k_pool, slots, quantised)
        if v is None or v_pool is None:
            return k_pool, None
        return k_pool, naive.write_rows(v, v_pool, slots, quantised)
    rows = k.shape[0]
    token = launch.write(
        launch.backend(),
        k.reshape(rows, -1),
        None if v is None else v.reshape(rows, -1).astype(k.dtype),
        k_pool,
        v_pool,
        slots.astype(mx.int32),
        token_of(k_pool) if previous_token is None else previous_token,
        quantised,
    )
    if v_pool is None:
        return written(mx.depends(k_pool, token), token), None
    pools = mx.depends([k_pool, v_pool], token)
    return written(pools[0], token), written(pools[1], token)
