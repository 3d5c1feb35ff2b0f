"""Linear attention whose state decays, by a kernel: that of RWKV-7, and Lightning attention.

RWKV-7 (https://arxiv.org/abs/2503.14456) has a decay for each key, and corrects the state.
Lightning attention (https://arxiv.org/abs/2401.04658) has one decay for each head.
"""

from __future__ import annotations

import mlx.core as mx

from modelpack_engine.attention.metadata import Segments, States
from modelpack_engine.kernels import launch
from modelpack_engine.layers.segments import (
    compared,
    example,
    example_states,
    lanes_of,
    segment_by_segment,
)

_SIMDGROUPS = 4

#: What corrects the state of RWKV-7, each [rows, heads, DK]: (state first) second is added to it.
Corrections = tuple[mx.array, mx.array]


def by_segments(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    decay: mx.array,
    states: States,
    segments: Segments,
    corrections: Corrections | None = None,
    *,
    turned: bool = False,
) -> mx.array:
    """Return the outputs [rows, heads, DV] of a step; write the states after its segments.

    Queries and keys are [rows, heads, DK], values [rows, heads, DV]. `decay` has the shape of keys,
    or is float32 [heads]. A state is [heads, DV, DK], or [heads, DK, DV] if it is `turned`.
    """
    (rows, heads, dim), key_dim = v.shape, k.shape[2]
    count = segments.runs.shape[0]
    each, units = lanes_of(key_dim, dim)
    a, b = corrections or (k, k)
    (y,) = launch.run(
        "linear_attention",
        [
            q.astype(v.dtype), k.astype(v.dtype), v, decay, a.astype(v.dtype), b.astype(v.dtype),
            states.rows, states.slots, segments.runs, segments.owners,
        ],
        [("T", v.dtype), ("D", decay.dtype), ("S", states.rows.dtype)],
        [
            ("H", heads), ("DK", key_dim), ("DV", dim), ("R", each), ("NSG", _SIMDGROUPS),
            ("EVERY", decay.ndim == 3), ("CORRECTED", corrections is not None), ("TURNED", turned),
        ],
        threads=(count + 1) * heads * units * 32,
        group=_SIMDGROUPS * 32,
        shapes=[(rows, heads, dim)],
        dtypes=[v.dtype],
    )  # fmt: skip
    return y


def one_by_one(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    decay: mx.array,
    states: States,
    segments: Segments,
    corrections: Corrections | None = None,
    *,
    turned: bool = False,
) -> tuple[mx.array, mx.array, mx.array]:
    """Return outputs, states and snapshots of `by_segments`, segment by segment, in float32."""
    every = decay if decay.ndim == 3 else mx.broadcast_to(decay[:, None], k.shape)

    def rule(
        q: mx.array, k: mx.array, v: mx.array, decay: mx.array, *rest: mx.array
    ) -> tuple[mx.array, mx.array]:
        *corrections, state = rest
        state = state.swapaxes(-1, -2) if turned else state
        state, outputs = state.astype(mx.float32), []
        for t in range(q.shape[1]):
            after = state * decay[:, t, :, None] + v[:, t, :, :, None] * k[:, t, :, None]
            if corrections:
                a, b = corrections
                known = (state * a[:, t, :, None]).sum(axis=-1)
                after = after + known[..., None] * b[:, t, :, None]
            state = after
            outputs.append((state * q[:, t, :, None]).sum(axis=-1))
        return mx.stack(outputs, axis=1), state.swapaxes(-1, -2) if turned else state

    return segment_by_segment(segments, states, rule, q, k, v, every, *(corrections or ()))


def _compare(dtype: mx.Dtype) -> str | None:
    keys = launch.random_keys(8, 7)
    rows, heads, key_dim, dim = 9, 3, 32, 48
    q, k, a = (mx.random.normal((rows, heads, key_dim), key=i).astype(dtype) / 6 for i in keys[:3])
    b = mx.random.normal((rows, heads, key_dim), key=keys[3]).astype(dtype)
    v = mx.random.normal((rows, heads, dim), key=keys[4]).astype(dtype)
    tolerance = 1e-4 if dtype == mx.float32 else 3e-2
    for of_state, turned in ((dtype, False), (mx.float32, True), (dtype, True)):
        shape = (key_dim, dim) if turned else (dim, key_dim)
        given = mx.random.normal((6, heads, *shape), key=keys[5]).astype(of_state)
        of_keys = mx.random.uniform(0.5, 1, (rows, heads, key_dim), key=keys[6]).astype(dtype)
        decay = of_keys[0, :, 0].astype(mx.float32) if turned else of_keys
        corrections = None if turned else (a, b)
        states = example_states(given)
        wanted = one_by_one(q, k, v, decay, states, example(), corrections, turned=turned)
        mx.eval(wanted)
        found = by_segments(q, k, v, decay, states, example(), corrections, turned=turned)
        if problem := launch.difference(compared(found, states, wanted), tolerance):
            return problem
    return None


#: None if the kernel computes the same as MLX's operations for a type, otherwise the problem.
verdict = launch.Verdict(_compare)
