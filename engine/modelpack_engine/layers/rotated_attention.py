"""Decode attention of rows that are not rotated yet: one kernel instead of `rotate` and `decode`.

Rows attend to their earlier tokens, which the kernel reads while the matmul before it runs, and to
their own, which it writes into the pools.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import mlx.core as mx

from modelpack_engine.attention.kv_pools import KVLayout, TokenMajorPools
from modelpack_engine.kernels import grouped, launch, operations
from modelpack_engine.kernels.plan import (
    MAX_SHARED_BYTES,
    SPLIT_CONTEXT,
    AttentionShape,
    DecodePlan,
    accumulators,
    plan_decode,
    simdgroups,
)
from modelpack_engine.kernels.reference import TOLERANCE
from modelpack_engine.kernels.sources import CONSTANT_BELOW
from modelpack_engine.layers.kernels import Rotation, rotate_and_write

Norms = tuple[mx.array, mx.array, float]

#: With at most so many heads of all rows, each has a threadgroup of its own, and so many
#: simdgroups: what an H200 runs at a time (benchmarks/results/packed-h200.md).
_FEW_HEADS, _SIMDGROUPS = 264, 8


@dataclass(frozen=True, slots=True)
class Kind:
    """What is compiled into the kernel, beside the shape of attention.

    `dtype` is the type of results, `joint` that of projections, which are `count` parts to be
    summed, and `pool` that of pools. `dims`, `interleaved` and `factor` are those of a `Rotation`.
    `norms` is the type of the norms' weights, with `epsilon`, and `values` that of values of
    another matmul: each is None if there are none.
    """

    dtype: mx.Dtype
    joint: mx.Dtype
    count: int
    pool: mx.Dtype
    dims: int
    interleaved: bool
    factor: float = 1.0
    norms: mx.Dtype | None = None
    epsilon: float = 0.0
    values: mx.Dtype | None = None


def attend(
    joint: mx.array,
    count: int,
    dtype: mx.Dtype,
    pools: TokenMajorPools,
    positions: mx.array,
    slots: mx.array,
    rotation: Rotation,
    heads: tuple[int, int],
    norms: Norms | None,
    block_tables: mx.array,
    context_lens: mx.array,
    *,
    scale: float,
    window: int | None = None,
    block_size: int = 16,
    values: mx.array | None = None,
) -> mx.array | None:
    """Return attention [rows, heads, dim] in `dtype`, and write keys and values to `slots`.

    The arguments are those of `rotate_and_write` and of `kernels.decode_attention`. The last token
    of a row's context is its own, in its slot, and no other row attends to it. None if there is no
    kernel for these rows, or they are better computed by two.
    """
    dim = pools.keys.shape[-1]
    shape = AttentionShape(heads[0], heads[1], dim, dim, block_size=block_size, window=window)
    rows, pool = positions.shape[0], pools.keys.dtype
    if grouped.takes(shape, rows) or not operations.may_decode(shape, dtype, pool):
        return None
    plan = _plan(shape, pool, rows, block_tables.shape[1] * block_size)
    kind = Kind(
        dtype, joint.dtype, count, pool, rotation.dims, rotation.interleaved, rotation.factor,
        None if norms is None else norms[0].dtype, 0.0 if norms is None else norms[2],
        None if values is None else values.dtype,
    )  # fmt: skip
    if not _fits(plan, pool) or verdict(shape, kind) is not None:
        return None
    return _run(
        plan, shape, joint, count, dtype, pools, positions, slots, rotation, norms, block_tables,
        context_lens, scale=scale, values=values,
    )  # fmt: skip


def _plan(
    shape: AttentionShape, pool: mx.Dtype, rows: int, most: int, split: int | None = None
) -> DecodePlan:
    on = launch.backend()
    few = on == "cuda" and rows * shape.num_heads <= _FEW_HEADS
    if few and min(most, shape.window or most) < SPLIT_CONTEXT:
        return plan_decode(shape, pool.size, rows, most, split, _SIMDGROUPS, max_accumulators=1)
    return plan_decode(
        shape, pool.size, rows, most, split,
        simdgroups=simdgroups(on), max_accumulators=accumulators(on),
    )  # fmt: skip


def _fits(plan: DecodePlan, pool: mx.Dtype) -> bool:
    """Return whether heads are whole vectors, threadgroups have as many each, and rows fit."""
    given = dict(plan.constants)
    return (
        given["DK"] % (given["VEC"] * given["LPT"]) == 0
        and given["G"] % given["HEADS"] == 0
        and plan.shared_bytes + 2 * given["DK"] * pool.size <= MAX_SHARED_BYTES
        and given["DK"] <= given["VEC"] * plan.threads  # which write the row's key
    )


def _run(
    plan: DecodePlan,
    shape: AttentionShape,
    joint: mx.array,
    count: int,
    dtype: mx.Dtype,
    pools: TokenMajorPools,
    positions: mx.array,
    slots: mx.array,
    rotation: Rotation,
    norms: Norms | None,
    block_tables: mx.array,
    context_lens: mx.array,
    *,
    scale: float,
    values: mx.array | None,
) -> mx.array:
    on, rows, split = launch.backend(), positions.shape[0], plan.parts > 1
    weights = (_no_norm(), _no_norm()) if norms is None else norms[:2]
    value_rows, factors = joint if values is None else values, launch.factors(1.0, None)
    inputs = [
        joint, value_rows, positions, slots, rotation.inverse, *weights, pools.keys, pools.values,
        block_tables, context_lens, factors, launch.factors(scale, None), pools.last_write(),
    ]  # fmt: skip
    out_dtype = mx.float32 if split else dtype
    types = [
        ("T", dtype), ("J", joint.dtype), ("A", value_rows.dtype), ("P", pools.keys.dtype),
        ("W", weights[0].dtype), ("S", factors.dtype), ("O", out_dtype),
    ]  # fmt: skip
    constants: list[tuple[str, int | bool]] = [
        *plan.constants, ("DIMS", rotation.dims), ("INTERLEAVED", rotation.interleaved),
        ("QKNORM", norms is not None), ("PARTS", count), ("OWN_VALUES", values is not None),
        ("EPSILON", launch.bits_of(0.0 if norms is None else norms[2])),
        ("FACTOR", launch.bits_of(rotation.factor)),
    ]  # fmt: skip
    across = (plan.parts,) if split else ()
    shapes: list[tuple[int, ...]] = [(rows, shape.num_heads, *across, shape.value_dim), (1,)]
    dtypes = [out_dtype, mx.int32]
    if split:
        shapes, dtypes = [*shapes, (rows, shape.num_heads, *across, 2)], [*dtypes, mx.float32]
    out, token, *stats = launch.kernel("rotate_decode", on, split=split)(
        inputs=inputs,
        template=launch.template(types, constants, inputs, on),
        grid=(shape.num_kv_heads * plan.groups * plan.threads, rows, plan.parts),
        threadgroup=(plan.threads, 1, 1),
        output_shapes=shapes,
        output_dtypes=dtypes,
    )
    pools.set_written(token)
    return launch.merge([out, *stats], shape, on, dtype, factors) if split else out


@cache
def _no_norm() -> mx.array:
    """Return what stands for a norm's weights: no step writes it, so that no kernel waits for it.

    It has so many elements that Metal passes it as it passes weights.
    """
    return mx.zeros((CONSTANT_BELOW,), mx.float32)


def _compare(shape: AttentionShape, kind: Kind) -> str | None:
    """Compare rows with 1 to 600 tokens with those of two kernels, with and without splits."""
    keys = launch.random_keys(8, 7)
    size, width, heads, dim = shape.block_size, 38, shape.num_kv_heads, shape.key_dim
    lengths = [1, size + 1, width // 2 * size - 1, width * size]
    rows, count, dtype, pool = len(lengths), kind.count, kind.dtype, kind.pool
    tables = 1 + mx.arange(rows * width).reshape(rows, width)
    last = [(length - 1) // size for length in lengths]
    slots = [
        (1 + row * width + last[row]) * size + (length - 1) % size
        for row, length in enumerate(lengths)
    ]
    columns = shape.num_heads + (1 if kind.values else 2) * heads
    given = mx.random.normal((count, rows, columns * dim), key=keys[0]) * count**-0.5
    given = given.astype(kind.joint)
    values = None
    if kind.values:
        values = mx.random.normal((rows, heads * dim), key=keys[1]).astype(kind.values)
    norms: Norms | None = None
    if kind.norms:
        by = [mx.random.uniform(0.5, 1.5, (dim,), key=key).astype(kind.norms) for key in keys[2:4]]
        norms = by[0], by[1], kind.epsilon
    dims = max(kind.dims, 2)
    inverse = mx.power(mx.array(10000.0), -mx.arange(0, dims, 2) / dims)
    rotation = Rotation(inverse, kind.dims, kind.factor, kind.interleaved)
    layout = KVLayout(heads, dim, heads, dim, pool)
    contexts, at = mx.array(lengths, mx.int32), mx.array(slots, mx.int32)
    positions = contexts - 1
    old = [
        mx.random.normal(((1 + rows * width) * size * heads * dim,), key=key).astype(pool)
        for key in keys[4:6]
    ]
    # The plans of few rows and of more, and that of long contexts.
    plans = [_plan(shape, pool, few, 1, 1) for few in (1, _FEW_HEADS // shape.num_heads + 1)]
    if (shape.window or SPLIT_CONTEXT) >= SPLIT_CONTEXT:
        plans.append(_plan(shape, pool, rows, width * size, 4))
    found = {}
    for plan in dict.fromkeys(plans):
        for ours in (False, True):
            pools = TokenMajorPools(layout, 1 + rows * width, size)
            pools.keys, pools.values = (one.reshape(-1, heads, dim) + 0 for one in old)
            mx.eval(pools.keys, pools.values, tables, positions, given)
            if ours:
                out = _run(
                    plan, shape, given, count, dtype, pools, positions, at, rotation, norms, tables,
                    contexts, scale=dim**-0.5, values=values,
                )  # fmt: skip
            else:
                q = rotate_and_write(
                    given, count, dtype, pools, positions, at, rotation,
                    (shape.num_heads, heads), norms, values=values,
                )  # fmt: skip
                out = operations.decode_attention(
                    q, pools.keys, pools.values, tables, contexts,
                    scale=dim**-0.5, num_kv_heads=heads, window=shape.window, block_size=size,
                    split=plan.parts,
                )  # fmt: skip
            written = at + pools.last_write()
            found[ours] = [out, pools.keys[written], pools.values[written]]
            mx.eval(found[ours])
        output, *rows_of_pools = zip(found[True], found[False], strict=True)
        tolerance = TOLERANCE[dtype]
        problem = launch.difference({f"its output in {plan.parts} parts": output}, tolerance)
        # Keys are up to 8: the last bit of such numbers counts more.
        of_rows = dict(zip(("its keys", "its values"), rows_of_pools, strict=True))
        if problem := problem or launch.difference(of_rows, 4 * tolerance):
            return problem
    return None


#: None if the kernel computes what `rotate` and `decode` do, otherwise the problem.
verdict = launch.Verdict(_compare)
