"""What LoRA adapters add to the products of fused layers: two kernels for each product.

Each row has its own adapter (Punica, https://arxiv.org/abs/2310.18547): the first kernel multiplies
a row by the first matrices of its adapter, the second adds the product with the second ones to the
output. Several layers with the same input are computed together.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import mlx.core as mx

from modelpack_engine.kernels import launch
from modelpack_engine.kernels.plan import vector_width
from modelpack_engine.layers.matmul import Parts

#: Ranks are padded to a multiple of this, and so many products of a row are computed together.
RANK_STEP, _TOGETHER = 8, 4
#: The most layers of one product, and the loads of a thread before more threads share them.
MOST_LAYERS, _LOADS, _MOST_SIMDGROUPS = 3, 2, 8


def add(
    parts: Parts, x: mx.array, a: mx.array, b: mx.array, slots: mx.array, sizes: Sequence[int]
) -> mx.array:
    """Return the sum of `parts` [rows, outputs] and the rows' adapters: [rows, outputs] like x.

    x is [rows, ...]; a [slots, layers * rank, inputs] and b [slots, rank, outputs] are the matrices
    of all adapters, and `slots` int32 [rows] those of the rows, 0 for none. `sizes` are the numbers
    of outputs of each layer.
    """
    rows, (_, products, inputs), outputs = x.shape[0], a.shape, b.shape[2]
    assert slots.shape == (rows,), "each row has a slot"
    vector = vector_width(max(x.dtype.size, a.dtype.size), inputs)
    simdgroups = min(_MOST_SIMDGROUPS, max(1, inputs // (vector * 32 * _LOADS)))
    types = [("T", x.dtype), ("A", a.dtype)]
    (inner,) = launch.run(
        "shrink",
        [x.reshape(rows, inputs), a, slots],
        types,
        [
            ("IN", inputs), ("N", products), ("VEC", vector), ("NSG", simdgroups),
            ("EACH", _TOGETHER),
        ],
        threads=rows * (products // _TOGETHER) * simdgroups * 32,
        group=simdgroups * 32,
        shapes=[(rows, products)],
        dtypes=[mx.float32],
    )  # fmt: skip
    size = max(x.dtype.size, a.dtype.size, parts.array.dtype.size)
    vector = min(vector_width(size, width) for width in sizes)
    ends = [*accumulate(sizes), *[outputs] * MOST_LAYERS]
    (out,) = launch.run(
        "expand",
        [parts.array, inner, b, slots],
        [*types, ("J", parts.array.dtype)],
        [
            ("OUT", outputs), ("N", products), ("RANK", b.shape[1]), ("VEC", vector),
            ("PARTS", parts.count), ("END0", ends[0]), ("END1", ends[1]),
        ],
        threads=rows * (outputs // vector),
        group=256,
        shapes=[(rows, outputs)],
        dtypes=[x.dtype],
    )  # fmt: skip
    return out


def _compare(dtype: mx.Dtype) -> str | None:
    """Compare the kernels with MLX's functions: three layers, rows with and without one."""
    keys = launch.random_keys(31, 4)
    inputs, rank, sizes = 640, 2 * RANK_STEP, (64, 32, 96)
    outputs, of_rows = sum(sizes), [2, 0, 1, 2, 1]
    slots = mx.array(of_rows, mx.int32)
    x = mx.random.normal((5, inputs), key=keys[0]).astype(dtype)
    a = (mx.random.normal((3, 3 * rank, inputs), key=keys[1]) / inputs**0.5).astype(dtype)
    b = (mx.random.normal((3, rank, outputs), key=keys[2]) / rank**0.5).astype(dtype)
    given = mx.random.normal((2, 5, outputs), key=keys[3])
    expected = given.sum(axis=0)
    for row, slot in enumerate(of_rows):
        inner = x[row].astype(mx.float32) @ a[slot].astype(mx.float32).T
        by, start = b[slot].astype(mx.float32), 0
        for layer, size in enumerate(sizes):
            own = inner[layer * rank : (layer + 1) * rank] @ by[:, start : start + size]
            if slot:
                expected[row, start : start + size] += own
            start += size
    found = add(Parts(given, 2), x, a, b, slots, sizes)
    base = add(Parts(found, 1), x, a[:, :rank], b, mx.zeros_like(slots), (outputs,))
    return launch.difference(
        {"products with adapters": (found, expected), "the base": (base, found)},
        1e-3 if dtype == mx.float32 else 5e-2,
    )


#: None if the kernels compute the same as MLX's functions for a type, otherwise the problem.
verdict = launch.verdict(_compare)
