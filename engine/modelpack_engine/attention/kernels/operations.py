"""The two operations as the engine calls them: by kernel where one may run, else by MLX."""

from __future__ import annotations

import mlx.core as mx

from modelpack_engine.attention.kernels import launch, naive, support
from modelpack_engine.attention.kernels.order import after, token_of, written
from modelpack_engine.attention.kernels.plan import AttentionShape, plan_decode


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
) -> mx.array:
    """Return attention [B, H, Dv] in q's dtype, of q [B, H, D], one row a sequence.

    Row b sees the last `window` (None: all) of its first `context_lens[b]` tokens, in the blocks
    `block_tables[b]` (int32 [B, width]). `sinks` [H] join the softmax's denominator only; `softcap`
    c squashes scores to c * tanh(score / c). `split` fixes into how many parts contexts are split.

    Latent attention keeps values in the keys: `value_dim` says that values are the first elements
    of k_pool's rows, and v_pool is None, or [slots, Hkv, Dx] and goes on with the keys where k_pool
    ends; `q_more` [B, H, Dx] then goes on with the queries, scaled already as the models do it.
    """
    shape = AttentionShape(
        num_heads=q.shape[1],
        num_kv_heads=num_kv_heads,
        key_dim=k_pool.shape[-1],
        value_dim=value_dim or (k_pool if v_pool is None else v_pool).shape[-1],
        extra_dim=0 if q_more is None else q_more.shape[-1],
        latent=value_dim is not None,
        block_size=block_size,
        window=window,
        softcap=softcap is not None,
        sinks=sinks is not None,
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
            q_more=q_more, value_dim=value_dim, block_size=block_size,
        )  # fmt: skip
    plan = plan_decode(
        shape, k_pool.dtype.size, q.shape[0], block_tables.shape[1] * block_size, split
    )
    return launch.decode(
        plan, shape, launch.backend(), q, k_pool, v_pool,
        block_tables.astype(mx.int32), context_lens.astype(mx.int32),
        scale=scale, softcap=softcap, sinks=sinks, q_more=q_more, written=token,
    )  # fmt: skip


def write_kv(
    k: mx.array,
    v: mx.array | None,
    k_pool: mx.array,
    v_pool: mx.array | None,
    slots: mx.array,
    previous_token: mx.array | None = None,
) -> tuple[mx.array, mx.array | None]:
    """Write rows k [T, Hkv, D] and v [T, Hkv, Dv] to `slots` (int32 [T]); return the pools.

    Use the returned pools from then on, and drop the ones passed in. With the kernel they share the
    memory of the latter and nothing is copied, whoever else holds them. Rows of negative slots are
    dropped. `previous_token` orders this write after another one; by default, the pools' last.
    """
    assert (v is None) == (v_pool is None), "values have no pool, or a pool no values"
    if not support.may_write(k.dtype, k_pool.dtype):
        slots = after(slots, k_pool, v_pool)
        k_pool = naive.write_rows(k, k_pool, slots)
        return k_pool, None if v is None or v_pool is None else naive.write_rows(v, v_pool, slots)
    rows = k.shape[0]
    token = launch.write(
        launch.backend(),
        k.reshape(rows, -1),
        None if v is None else v.reshape(rows, -1).astype(k.dtype),
        k_pool,
        v_pool,
        slots.astype(mx.int32),
        token_of(k_pool) if previous_token is None else previous_token,
    )
    if v_pool is None:
        return written(mx.depends(k_pool, token), token), None
    pools = mx.depends([k_pool, v_pool], token)
    return written(pools[0], token), written(pools[1], token)
