"""RMS norms of groups of a row, with a gate, as recurrent layers have at their end, by a kernel."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn

from modelpack_engine.kernels import launch


def gated_norm(
    x: mx.array,
    gate: mx.array,
    columns: mx.array,
    weight: mx.array,
    epsilon: float,
    *,
    before: bool = False,
) -> mx.array:
    """Return the RMS norms of the groups of rows x [rows, n], times `weight` and the gate's SiLU.

    `columns`, int32, has for each group the column of `gate` [rows, any] where its gate begins. The
    weight has n elements, or those of a group. With `before`, the gate is multiplied before the
    norm.
    """
    rows, width = x.shape
    size = width // columns.shape[0]
    (out,) = launch.run(
        "gated_norm",
        [x, gate, columns, weight],
        [("T", x.dtype), ("W", weight.dtype)],
        [
            ("C", width), ("D", size), ("WIDTH", gate.shape[1]), ("BEFORE", before),
            ("SAME", weight.size != width), ("VEC", 4 if size % 128 == 0 else 1),
            ("NSG", 4), ("EPSILON", launch.bits_of(epsilon)),
        ],
        threads=rows * columns.shape[0] * 32,
        group=128,
        shapes=[x.shape],
        dtypes=[x.dtype],
    )  # fmt: skip
    return out


def _compare(dtype: mx.Dtype) -> str | None:
    keys = launch.random_keys(8, 3)
    x = mx.random.normal((3, 256), key=keys[0]).astype(dtype)
    gate = mx.random.normal((3, 300), key=keys[1]).astype(dtype)
    weights = mx.random.uniform(0.5, 1.5, (256,), key=keys[2]).astype(dtype)
    found = {}
    for size, before in ((128, False), (32, True)):
        columns = [40 + size * group for group in range(256 // size)][::-1]
        weight = weights if before else weights[:size]
        taken = mx.concatenate([gate[:, first : first + size] for first in columns], axis=1)
        activated = nn.silu(taken.astype(mx.float32))
        groups = (x * activated if before else x).reshape(3, -1, size).astype(mx.float32)
        normed = mx.fast.rms_norm(groups, None, 1e-5).reshape(x.shape)
        normed = normed * mx.tile(weight, x.shape[1] // weight.size)
        ours = gated_norm(x, gate, mx.array(columns, mx.int32), weight, 1e-5, before=before)
        found[f"norm of {size}"] = ours, normed if before else normed * activated
    return launch.difference(found, 1e-4 if dtype == mx.float32 else 5e-2)


#: None if the kernel computes the same as MLX's operations for a type, otherwise the problem.
verdict = launch.Verdict(_compare)
