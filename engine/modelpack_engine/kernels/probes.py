"""Probes: compare each kernel with MLX's own functions on this machine before its first use.

A probe returns None or a description of the error. References are computed on the CPU: some GPUs
multiply float32 with 10 bits of mantissa.
"""

from __future__ import annotations

import mlx.core as mx

from modelpack_engine.kernels import launch, reference
from modelpack_engine.kernels.plan import (
    AttentionShape,
    accumulators,
    plan_decode,
    simdgroups,
)
from modelpack_engine.kernels.quantised import Quantisation
from modelpack_engine.kernels.sources import Backend

TOLERANCE = {mx.float32: 2e-4, mx.float16: 4e-3, mx.bfloat16: 3e-2}
_BLOCKS = 41
_WIDTH = 40
_SLOTS = 4096


def probe_decode(shape: AttentionShape, on: Backend, dtype: mx.Dtype, pool: mx.Dtype) -> str | None:
    """Decode random rows of 1 to 600 tokens, in one piece and split."""
    keys = mx.random.split(mx.random.key(7), 8)
    size = shape.block_size
    lines = _BLOCKS * size, shape.num_kv_heads
    longest = (_WIDTH - 2) * size
    context_lens = mx.array([1, size + 1, longest // 2 - 1, longest], mx.int32)
    rows = context_lens.size
    heads = rows, shape.num_heads
    kind = mx.float32 if shape.bits else pool
    k_pool = mx.random.normal((*lines, shape.key_dim), key=keys[0]).astype(kind)
    more = shape.extra_dim if shape.latent else shape.value_dim
    v_pool = mx.random.normal((*lines, more), key=keys[1]).astype(kind) if more else k_pool
    quantised = Quantisation(shape.bits, shape.group) if shape.bits else None
    if quantised is not None:
        k_pool, v_pool = (
            quantised.encode(mx.random.normal((lines[0], 1, lines[1] * dim), key=keys[6 + i]))
            for i, dim in enumerate((shape.key_dim, shape.value_dim))
        )
    q = mx.random.normal((*heads, shape.key_dim), key=keys[2]).astype(dtype)
    q_more = None
    if shape.extra_dim:
        q_more = mx.random.normal((*heads, shape.extra_dim), key=keys[3]).astype(dtype)
    sinks = mx.random.normal((shape.num_heads,), key=keys[4]) if shape.sinks else None
    tables = mx.random.randint(1, _BLOCKS, (rows, _WIDTH), mx.int32, key=keys[5])
    scale = (shape.key_dim + shape.extra_dim) ** -0.5
    softcap = 2.0 if shape.softcap else None
    mx.eval(q, k_pool, v_pool, tables)
    with mx.stream(mx.cpu):
        expected = reference.decode_attention(
            q.astype(mx.float32), k_pool, v_pool, tables, context_lens,
            scale=scale, num_kv_heads=shape.num_kv_heads, window=shape.window, softcap=softcap,
            sinks=sinks, q_more=q_more, value_dim=shape.value_dim if shape.latent else None,
            block_size=size, quantised=quantised,
        )  # fmt: skip
        mx.eval(expected)
    for parts in (1, 4):
        plan = plan_decode(
            shape, k_pool.dtype.size, rows, _WIDTH * size, parts,
            simdgroups=simdgroups(on), max_accumulators=accumulators(on),
        )  # fmt: skip
        out = launch.decode(
            plan, shape, on, q, k_pool, v_pool, tables, context_lens,
            scale=scale, softcap=softcap, sinks=sinks, q_more=q_more,
        )  # fmt: skip
        error = float(mx.max(mx.abs(out.astype(mx.float32) - expected)).item())  # type: ignore[arg-type]
        if not error <= TOLERANCE[dtype]:  # also if it is not a number
            return f"its output is off by {error:.3g} in {parts} parts, allowed {TOLERANCE[dtype]}"
    return None


def probe_write(on: Backend, dtype: mx.Dtype, pool: mx.Dtype) -> str | None:
    """Write rows into pools that others hold: right bytes, no copy, and readers wait for them."""
    rows, width = 32, 512
    key = mx.random.key(11)
    k_pool = mx.random.normal((_SLOTS, 1, width), key=key).astype(pool)
    v_pool = mx.zeros((_SLOTS, 1, width), pool)
    # Small integers are exact in every type.
    k = mx.random.randint(-100, 100, (rows, width), key=key).astype(dtype)
    v = k - 1
    slots = mx.random.permutation(_SLOTS, key=key)[:rows].astype(mx.int32)
    slots = mx.where(mx.arange(rows) == 3, -1, slots)
    kept = mx.arange(rows) != 3
    mx.eval(k, v, k_pool, v_pool, slots, kept)

    mx.synchronize()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    token = launch.write(on, k, v, k_pool, v_pool, slots, None)
    mx.eval(mx.depends([k_pool, v_pool], token))
    copied = mx.get_peak_memory() - before
    if copied >= k_pool.nbytes // 2:
        return f"it copied {copied} bytes of a pool of {k_pool.nbytes}"
    for name, rows_in, written in (("keys", k, k_pool), ("values", v, v_pool)):
        found = written[mx.maximum(slots, 0), 0].astype(dtype)
        if not mx.all((found == rows_in) | ~kept[:, None]).item():
            return f"the {name} read back are not those written"

    # As in a model, each round's rows follow from what the round before has read.
    written = k_pool
    values = k
    indices = mx.arange(1, rows + 1, dtype=mx.int32)
    order: mx.array | None = token
    for _ in range(8):
        order = launch.write(on, values, None, written, None, indices, order)
        written = mx.depends(written, order)
        values = written[indices + order, 0].astype(dtype) + 1
    if not mx.array_equal(values, k + 8).item():
        return "a reader did not wait for the write before it"
    return None


def probe_quantise(on: Backend, dtype: mx.Dtype, quantised: Quantisation) -> str | None:
    """Quantise rows into pools that others hold: the right values, no copy, nothing beside."""
    rows, widths = 32, (512, 256)
    keys = mx.random.split(mx.random.key(13), 4)
    k, v = (
        mx.random.normal((rows, width), key=key).astype(dtype) * 3
        for width, key in zip(widths, keys, strict=False)
    )
    k[5, 70] = mx.nan
    pools = [mx.full((_SLOTS, 1, quantised.words(width)), 7, mx.uint32) for width in widths]
    slots = mx.random.permutation(_SLOTS, key=keys[3])[:rows].astype(mx.int32)
    slots = mx.where(mx.arange(rows) == 3, -1, slots)
    mx.eval(k, v, pools, slots)

    mx.synchronize()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    token = launch.write(on, k, v, pools[0], pools[1], slots, None, quantised)
    mx.eval(mx.depends(pools, token))
    copied = mx.get_peak_memory() - before
    if copied >= pools[0].nbytes // 2:
        return f"it copied {copied} bytes of a pool of {pools[0].nbytes}"
    kept = [row for row in range(rows) if row != 3]
    for name, rows_in, written in (("keys", k, pools[0]), ("values", v, pools[1])):
        with mx.stream(mx.cpu):
            wanted = quantised.encode(rows_in[mx.array(kept)])
            places = slots[mx.array(kept)]
            found = quantised.decode(written[places, 0], mx.float32)
            read = quantised.decode(wanted, mx.float32)
            # A code may be one off where an element lies halfway between two.
            far = mx.abs(found - read) > 24.0 / ((1 << quantised.bits) - 1) * 1.05
            if mx.any(far | (mx.isnan(found) != mx.isnan(read))).item():
                return f"the {name} read back are not those written"
            if not mx.all(mx.sum(written != 7) <= wanted.size).item():
                return f"it wrote {name} to slots that are not its own"
    return None
