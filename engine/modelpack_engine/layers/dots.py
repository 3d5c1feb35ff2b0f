"""Matmuls of few rows by dot products: one kernel reads weights as fast as memory allows.

With one row, tensor cores have nothing to do, and copies through shared memory only take time. The
kernel also multiplies by the weights of a row's experts, and adds up their outputs, without
sorting.
"""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx

from modelpack_engine.kernels import launch
from modelpack_engine.layers.weights import NO_UP, Weights, random_weights

#: Simdgroups of a threadgroup, and the loads of a lane that wait for memory together.
_SIMDGROUPS, _AHEAD = 8, 4


#: The most inputs of a norm, which shared memory holds.
_MOST_NORMED = 16384


@dataclass(frozen=True, slots=True)
class Normed:
    """The RMS norm, times `weight` [dim], of a row `a` [..., dim] plus the sum of `count` parts.

    `parts` has `count` times the elements of `a`.
    """

    a: mx.array
    parts: mx.array
    count: int
    weight: mx.array
    epsilon: float


def fits(x: mx.array, weights: Weights) -> bool:
    """Return whether the kernel supports rows x and weights of these types and sizes."""
    bits = weights.bits or 16
    if launch.backend() != "cuda" or x.dtype not in (mx.float16, mx.bfloat16):
        return False
    if weights.bias is not None and weights.bias.dtype != x.dtype:
        return False
    if bits == 16:
        return weights.weight.dtype == x.dtype and weights.num_inputs % 8 == 0
    return (
        weights.mode == "affine"
        and bits in (4, 8)
        and weights.group_size % 32 == 0
        and weights.scales is not None
        and weights.scales.dtype == x.dtype
        and weights.biases is not None
    )


def multiply(x: mx.array, weights: Weights, *, swiglu: bool = False) -> mx.array:
    """Return rows x [rows, in] times the weights [out, in]: [rows, out] in x's type.

    With `swiglu`, the first half of the outputs are gates: silu(gate) * other half.
    """
    width = weights.num_outputs // 2 if swiglu else weights.num_outputs
    return _run(x, weights, (x.shape[0], width), swiglu=swiglu)


def multiply_normed(
    row: Normed, weights: Weights, *, swiglu: bool = False
) -> tuple[mx.array, mx.array]:
    """Return the normed row times the weights [1, out], as `multiply`, and the sum in a's shape."""
    width = weights.num_outputs // 2 if swiglu else weights.num_outputs
    dtype, groups = row.a.dtype, _SIMDGROUPS
    out, total = launch.run_on_cuda(
        "dots",
        {
            "x": row.a, **weights.inputs(), **NO_UP, "chosen": None, "scores": None,
            "more": row.parts, "norm": row.weight,
        },
        template=[
            *_types(dtype, weights, parts=row.parts.dtype, norm=row.weight.dtype),
            *_constants(weights, swiglu=swiglu, normed=row),
        ],
        grid=(-(-width // groups) * groups * 32, 1, 1),
        threadgroup=(groups * 32, 1, 1),
        output_shapes=[(1, width), row.a.shape],
        output_dtypes=[dtype, dtype],
    )  # fmt: skip
    return out, total


def fits_normed(row: Normed, weights: Weights) -> bool:
    """Return whether `multiply_normed` supports a row and weights."""
    dim = row.a.shape[-1]
    return (
        fits(row.a, weights)
        and dim == row.a.size == weights.num_inputs <= _MOST_NORMED
        and dim % 8 == 0
    )


def multiply_experts(
    x: mx.array, weights: Weights, up: Weights | None, chosen: mx.array
) -> mx.array:
    """Return rows x [rows, in] times the weights [experts, out, in] of their experts.

    `chosen` are the experts of each row, uint32 [rows, each], and the result is [rows, each, out].
    With the weights `up`, `weights` are those of the gate: silu(gate) * up.
    """
    shape = (*chosen.shape, weights.num_outputs)
    return _run(x, weights, shape, up=up, chosen=chosen, swiglu=up is not None)


def sum_experts(
    x: mx.array, weights: Weights, chosen: mx.array, scores: mx.array, dtype: mx.Dtype
) -> mx.array:
    """Return the sum over experts of x [rows, each, in] times their weights and scores.

    `chosen` and `scores` are [rows, each], and the result is [rows, out] in `dtype`.
    """
    shape = (x.shape[0], weights.num_outputs)
    return _run(x, weights, shape, chosen=chosen, scores=scores, dtype=dtype)


def _run(
    x: mx.array,
    weights: Weights,
    shape: tuple[int, ...],
    *,
    up: Weights | None = None,
    chosen: mx.array | None = None,
    scores: mx.array | None = None,
    swiglu: bool = False,
    dtype: mx.Dtype | None = None,
) -> mx.array:
    each = 0 if chosen is None else chosen.shape[1]
    out_rows = x.shape[0] * (1 if scores is not None or not each else each)
    ups = NO_UP if up is None else up.inputs("_up")
    (out,) = launch.run_on_cuda(
        "dots",
        {
            "x": x, **weights.inputs(), **ups, "chosen": chosen, "scores": scores,
            "more": None, "norm": None,
        },
        without=("total",),
        template=[
            *_types(x.dtype, weights, None if scores is None else scores.dtype, dtype),
            *_constants(
                weights, swiglu=swiglu, up=up, each=each, summed=1 if scores is None else each
            ),
        ],
        grid=(-(-shape[-1] // _SIMDGROUPS) * _SIMDGROUPS * 32, out_rows, 1),
        threadgroup=(_SIMDGROUPS * 32, 1, 1),
        output_shapes=[shape],
        output_dtypes=[dtype or x.dtype],
    )  # fmt: skip
    return out


def _types(
    dtype: mx.Dtype,
    weights: Weights,
    scores: mx.Dtype | None = None,
    out: mx.Dtype | None = None,
    parts: mx.Dtype | None = None,
    norm: mx.Dtype | None = None,
) -> list[tuple[str, mx.Dtype]]:
    return [
        ("T", dtype), ("W", weights.weight.dtype), ("S", scores or dtype), ("O", out or dtype),
        ("B", parts or dtype), ("V", norm or dtype),
    ]  # fmt: skip


def _constants(
    weights: Weights,
    *,
    swiglu: bool,
    up: Weights | None = None,
    each: int = 0,
    summed: int = 1,
    normed: Normed | None = None,
) -> list[tuple[str, int | bool]]:
    return [
        ("BITS", weights.bits or 16), ("GROUP", weights.group_size or 64),
        ("BIAS", weights.bias is not None), ("SWIGLU", swiglu),
        ("JOINT", swiglu and up is None), ("EACH", each), ("SUMMED", summed),
        ("NSG", _SIMDGROUPS), ("AHEAD", _AHEAD), ("NORMED", normed is not None),
        ("D", 8 if normed is None else normed.a.size),
        ("PARTS", 1 if normed is None else normed.count),
        ("EPSILON", 0 if normed is None else launch.bits_of(normed.epsilon)),
    ]  # fmt: skip


def _compare(dtype: mx.Dtype, bits: int, group_size: int) -> str | None:
    keys = launch.random_keys(12, 4)
    outputs, inputs = 104, 1024
    weights, full, bias = random_weights(
        dtype, bits, (outputs, inputs), 1 / 32, keys[0], keys[1], group_size
    )
    x = mx.random.normal((2, inputs), key=keys[2]).astype(dtype)
    expected = x.astype(mx.float32) @ full.T + bias
    gate, up = mx.split(expected, 2, axis=1)
    found = {
        "the product": (multiply(x, weights), expected),
        "SwiGLU": (multiply(x, weights, swiglu=True), gate * mx.sigmoid(gate) * up),
    }
    return launch.difference(found, 1e-1)


def _compare_experts(dtype: mx.Dtype, bits: int, group_size: int) -> str | None:
    keys = launch.random_keys(13, 4)
    experts, outputs, inputs, rows, each = 5, 104, 256, 3, 2
    shape = (experts, outputs, inputs)
    (first, gate, gate_bias), (second, up, up_bias) = (
        random_weights(dtype, bits, shape, 1 / 16, key, key, group_size) for key in keys[:2]
    )
    x = mx.random.normal((rows, inputs), key=keys[2]).astype(dtype)
    chosen = mx.random.randint(0, experts - 1, (rows, each), mx.int32, key=keys[3])
    scores = mx.random.uniform(0, 1, (rows, each), key=keys[3]).astype(dtype)
    chosen = chosen.astype(mx.uint32)
    wide = mx.broadcast_to(x[:, None], (rows, each, inputs))

    def product(full: mx.array, bias: mx.array) -> mx.array:
        by_expert = mx.einsum("rei,reoi->reo", wide.astype(mx.float32), full[chosen])
        return by_expert + bias[chosen]

    gates, ups = product(gate, gate_bias), product(up, up_bias)
    total = (ups * scores.astype(mx.float32)[..., None]).sum(axis=1)
    found = {
        "the product of few experts": (multiply_experts(x, second, None, chosen), ups),
        "SwiGLU of few experts": (
            multiply_experts(x, first, second, chosen), gates * mx.sigmoid(gates) * ups,
        ),
        "the sum of few experts": (
            sum_experts(mx.contiguous(wide), second, chosen, scores, dtype), total
        ),
    }  # fmt: skip
    return launch.difference(found, 2e-1)


def _compare_normed(dtype: mx.Dtype, bits: int, group_size: int) -> str | None:
    keys = launch.random_keys(14, 5)
    outputs, inputs = 104, 1024
    weights, full, bias = random_weights(
        dtype, bits, (outputs, inputs), 1 / 32, keys[0], keys[1], group_size
    )
    a, b = (mx.random.normal((1, inputs), key=key).astype(dtype) for key in keys[2:4])
    norm = mx.random.uniform(0.5, 1.5, (inputs,), key=keys[4]).astype(dtype)
    row = Normed(a, mx.stack([b / 4, b * 3 / 4]).astype(mx.float32), 2, norm, 1e-5)
    x = mx.fast.rms_norm(a + b, norm, 1e-5).astype(mx.float32)
    expected = x @ full.T + bias
    gate, up = mx.split(expected, 2, axis=1)
    out, total = multiply_normed(row, weights)
    gated, _ = multiply_normed(Normed(a, b, 1, norm, 1e-5), weights, swiglu=True)
    found = {
        "the product of a norm": (out, expected),
        "the sum before a norm": (total, a + b),
        "SwiGLU of a norm": (gated, gate * mx.sigmoid(gate) * up),
    }
    return launch.difference(found, 1e-1)


#: None if the kernel multiplies as MLX does for a type, bits of a weight and size of a group of
#: quantised ones, otherwise the problem; for linear layers, for experts, and with a norm before.
verdict, experts_verdict = launch.Verdict(_compare), launch.Verdict(_compare_experts)
normed_verdict = launch.Verdict(_compare_normed)
