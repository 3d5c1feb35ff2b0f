"""Fused kernels of decoder layers: rotation and KV write, add + RMSNorm, gates, dequantisation.

Rotations are those of `mx.fast.rope`: element pair i of a head is rotated by position * scale *
inverse frequency i (RoFormer, https://arxiv.org/abs/2104.09864).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.rope_utils import Llama3RoPE, SuScaledRoPE, YarnRoPE

from modelpack_engine.attention.kv_pools import TokenMajorPools
from modelpack_engine.kernels import launch
from modelpack_engine.kernels.plan import norm_simdgroups, vector_width


@dataclass(frozen=True, slots=True)
class Rotation:
    """A rotation of the first `dims` elements of a head.

    `inverse` float32 [dims / 2] are the inverse frequencies times the scale of positions, and
    `factor` multiplies the elements. `interleaved` pairs are neighbouring elements; otherwise a
    pair has one element from each half.
    """

    inverse: mx.array
    dims: int
    factor: float
    interleaved: bool

    def angles(self, positions: mx.array) -> mx.array:
        """Return cosines and sines at positions [n], times the factor: float32 [n, dims / 2, 2]."""
        return self.angles_by_axes([positions] * 3, _first_axis(self.dims // 2))

    def angles_by_axes(self, axes: Sequence[mx.array], axis_of: mx.array) -> mx.array:
        """Return `angles` where each pair is at the positions of an axis, [n] each (M-RoPE).

        `axis_of` int32 [dims / 2] are the indices of the pairs' axes among the three of `axes`.
        """
        rows, half = axes[0].shape[0], self.dims // 2
        if launch.backend() == "none":
            positions = mx.stack(list(axes), axis=-1)[:, axis_of]
            angles = positions.astype(mx.float32) * self.inverse
            return mx.stack([mx.cos(angles), mx.sin(angles)], axis=-1) * self.factor
        (out,) = launch.run(
            "angles", [*axes, axis_of, self.inverse], [],
            [("HALF", half), ("FACTOR", launch.bits_of(self.factor))],
            threads=rows * half, group=256, shapes=[(rows, half, 2)], dtypes=[mx.float32],
        )  # fmt: skip
        return out


@cache
def _first_axis(half: int) -> mx.array:
    axis_of = mx.zeros((half,), mx.int32)
    mx.eval(axis_of)
    return axis_of


#: One object for equal rotations: the layers of a model have few different ones.
_ROTATIONS: dict[tuple[object, ...], Rotation] = {}


def find_rotation(rope: nn.Module) -> Rotation | None:
    """Return the rotation of a rotary embedding; None for unknown kinds."""
    found: Any = rope
    if type(rope) is nn.RoPE:
        exponents = mx.arange(0, found.dims, 2, dtype=mx.float32) / found.dims
        inverse = mx.power(mx.array(found.base, mx.float32), -exponents) * found.scale
        return _rotation(inverse, found.dims, 1.0, found.traditional)
    if type(rope) in (Llama3RoPE, YarnRoPE):
        factor = getattr(found, "mscale", 1.0)
        return _rotation(1 / found._freqs, found.dims, factor, found.traditional)
    if type(rope) is SuScaledRoPE:
        return _rotation(1 / found._freqs, found.dim, found._scale, False)
    return None


def _rotation(inverse: mx.array, dims: int, factor: Any, interleaved: bool) -> Rotation | None:
    inverse = inverse.astype(mx.float32).reshape(-1)
    if inverse.size != dims // 2 or dims % 2:
        return None
    mx.eval(inverse)
    rotation = Rotation(inverse, dims, float(factor), bool(interleaved))
    key = (str(inverse.tolist()), dims, rotation.factor, rotation.interleaved)
    return _ROTATIONS.setdefault(key, rotation)


@cache
def no_rotation() -> Rotation:
    """Return the rotation of heads that have none."""
    inverse = mx.zeros((8,), mx.float32)
    mx.eval(inverse)
    return Rotation(inverse, 0, 1.0, False)


_SIMDGROUPS = 4


def add_norm(
    a: mx.array,
    parts: mx.array,
    count: int,
    weight: mx.array,
    epsilon: float,
    arranged: int = 0,
) -> tuple[mx.array, mx.array]:
    """Return a + the sum of `count` parts, and its RMS norm times `weight` [dim].

    `a` and both results are [rows, ..., dim] in the type of `a`; each part has as many elements.
    Without parts, `parts` is not read. The norm is in the order that `packed_wide` multiplies by
    codes of so many bits, if `arranged` is not 0: [dim / 64, rows, 64] (CUDA).
    """
    dim, rows = a.shape[-1], a.size // a.shape[-1]
    vector = vector_width(max(a.dtype.size, parts.dtype.size), dim)
    simdgroups = norm_simdgroups(dim, vector)
    threads = 32 * simdgroups
    constants = [
        ("D", dim), ("VEC", vector), ("NSG", simdgroups), ("PARTS", count),
        ("EPSILON", launch.bits_of(epsilon)),
    ]  # fmt: skip
    total, out = launch.run(
        "add_norm_arranged" if arranged else "add_norm",
        [a, parts, weight],
        [("T", a.dtype), ("B", parts.dtype), ("W", weight.dtype)],
        [*constants, ("BITS", arranged)] if arranged else constants,
        threads=rows * threads,
        group=threads,
        shapes=[a.shape, (dim // 64, rows, 64) if arranged else a.shape],
        dtypes=[a.dtype, a.dtype],
    )
    return total, out


def swiglu(joint: mx.array) -> mx.array:
    """Return silu(gate) * up [rows, n] for `joint` [rows, 2 n]: gate and up side by side."""
    rows, width = joint.shape[0], joint.shape[1] // 2
    vector = vector_width(joint.dtype.size, width)
    (out,) = launch.run(
        "swiglu",
        [joint],
        [("T", joint.dtype)],
        [("N", width), ("VEC", vector)],
        threads=rows * (width // vector),
        group=256,
        shapes=[(rows, width)],
        dtypes=[joint.dtype],
    )
    return out


def squared(rows: mx.array) -> mx.array:
    """Return the squares of what is positive in rows [n, dim]."""
    return _elementwise(rows, 1, rows, squared=True)


def gate_heads(rows: mx.array, joint: mx.array, heads: int) -> mx.array:
    """Return rows [n, heads, dim] times the sigmoids of gates, as [n, heads * dim].

    `joint` [n, any] begins with `dim` other columns and the `dim` gates of each head.
    """
    count, dim = rows.shape[0], math.prod(rows.shape[1:]) // heads
    rows = rows.reshape(count, heads * dim)
    return _elementwise(rows, 1, rows, joint, (dim, dim, 2 * dim, 1))


def add_rows(
    given: mx.array, parts: mx.array, count: int, gate: mx.array | None = None
) -> mx.array:
    """Return `given` [n, dim] + the sum of `count` parts, times the sigmoids of `gate` [n, 1]."""
    return _elementwise(parts, count, given, gate, (0, given.shape[1], 0, 0), adds=True)


def copied_after(rows: mx.array, output: mx.array) -> mx.array:
    """Return a copy of rows [n, dim], which the kernel that computed `output` wrote in place."""
    return _elementwise(rows, 1, rows, order=output)


def _elementwise(
    parts: mx.array,
    count: int,
    given: mx.array,
    gate: mx.array | None = None,
    places: tuple[int, int, int, int] = (0, 1, 0, 0),
    *,
    squared: bool = False,
    adds: bool = False,
    order: mx.array | None = None,
) -> mx.array:
    """Run the kernel on the sum of parts, each like `given` [n, dim].

    `places` are the first column of a gate, the number of columns in a group, and how far apart
    the gates of groups and of columns are. `order` is only waited for.
    """
    rows, dim = given.shape
    gated = gate is not None
    if gate is None:
        gate = given if order is None else order.reshape(-1, 1)
    vector = vector_width(max(given.dtype.size, parts.dtype.size), dim)
    (out,) = launch.run(
        "gate",
        [parts, gate, given],
        [("T", given.dtype), ("B", parts.dtype)],
        [
            ("N", dim), ("VEC", vector), ("PARTS", count), ("WIDTH", gate.shape[1]),
            *zip(("AT", "D", "STRIDE", "EACH"), places, strict=True),
            ("SQUARED", squared), ("GATED", gated), ("ADDS", adds),
        ],
        threads=rows * (dim // vector),
        group=256,
        shapes=[(rows, dim)],
        dtypes=[given.dtype],
    )  # fmt: skip
    return out


def rotate_and_write(
    joint: mx.array,
    count: int,
    dtype: mx.Dtype,
    pools: TokenMajorPools,
    positions: mx.array,
    slots: mx.array,
    rotation: Rotation,
    heads: tuple[int, int],
    norms: tuple[mx.array, mx.array, float] | None,
    angles: mx.array | None = None,
    *,
    gated: bool = False,
    values: mx.array | None = None,
) -> mx.array:
    """Return queries [rows, heads, dim] in `dtype`; write keys and values to `slots` of the pools.

    `joint` [rows, (heads + 2 KV heads) * dim] has queries, keys and values, as `count` parts to be
    summed; those without values, if `values` [rows, KV heads * dim] has them. With `gated`, each
    query is followed by as many columns that are not used. `heads` are the numbers of query and KV
    heads. `norms` are the weights [dim] of the query and key norms, and epsilon. `angles` are the
    rows' `Rotation.angles`; without them, the kernel computes them.
    """
    query_heads, kv_heads = heads
    rows, total = positions.shape[0], query_heads + 2 * kv_heads
    dim = joint.shape[-1] // (total + gated * query_heads - (values is not None) * kv_heads)
    weights = (joint, joint) if norms is None else norms[:2]
    value_rows = joint if values is None else values
    itemsize = max(a.size for a in (joint.dtype, value_rows.dtype, dtype, pools.keys.dtype))
    vector, lanes = _rotation_plan(itemsize, dim, rotation.dims, few=angles is None)
    inputs = [
        joint, value_rows, positions, slots,
        rotation.inverse if angles is None else angles, *weights,
        pools.keys, pools.values, pools.last_write(),
    ]  # fmt: skip
    q, token = launch.run(
        "rotate",
        inputs,
        [
            ("T", dtype), ("J", joint.dtype), ("A", value_rows.dtype), ("P", pools.keys.dtype),
            ("W", weights[0].dtype),
        ],
        [
            ("HQ", query_heads), ("HK", kv_heads), ("D", dim), ("DIMS", rotation.dims),
            ("INTERLEAVED", rotation.interleaved), ("QKNORM", norms is not None),
            ("NSG", _SIMDGROUPS), ("VEC", vector), ("LPH", lanes), ("PARTS", count),
            ("TABLE", angles is not None), ("GATED", gated),
            ("OWN_VALUES", values is not None),
            ("EPSILON", launch.bits_of(0.0 if norms is None else norms[2])),
            ("FACTOR", launch.bits_of(rotation.factor)),
        ],
        threads=rows * total * lanes,
        group=_SIMDGROUPS * 32,
        shapes=[(rows, query_heads, dim), (1,)],
        dtypes=[dtype, mx.int32],
    )  # fmt: skip
    pools.set_written(token)
    return q


def _rotation_plan(itemsize: int, dim: int, dims: int, *, few: bool) -> tuple[int, int]:
    """Return how many pairs of elements a lane rotates at once, and how many lanes share a head.

    With `few` rows, each lane rotates one pair and computes its angle.
    """
    vector = 1 if few else vector_width(itemsize, (dims or dim) // 2)
    while (dim - dims) % (2 * vector):
        vector //= 2
    runs = dims // 2 // vector + (dim - dims) // (2 * vector)
    lanes = 1
    while lanes < 32 and lanes < runs:
        lanes *= 2
    return vector, lanes


def take_rows(table: mx.array, index: mx.array) -> mx.array:
    """Return the rows `index` (int32 [n]) of a table [..., rows, dim], as [..., n, dim]."""
    if launch.backend() == "none":
        return mx.take(table, index, axis=-2)
    rows, dim = table.shape[-2:]
    tables = table.reshape(-1, rows, dim)
    vector = vector_width(table.dtype.size, dim)
    (out,) = launch.run(
        "rows",
        [tables, index],
        [("T", table.dtype)],
        [("D", dim), ("VEC", vector)],
        threads=tables.shape[0] * index.size * (dim // vector),
        group=256,
        shapes=[(*table.shape[:-2], index.size, dim)],
        dtypes=[table.dtype],
    )
    return out


def take(numbers: mx.array, index: mx.array) -> mx.array:
    """Return `numbers` [n] at `index` (int32).

    MLX takes two seconds to compile a gather on CUDA.
    """
    if launch.backend() != "cuda" or _takes_numbers(numbers.dtype) is not None:
        return numbers[index]
    return take_rows(numbers[:, None], index)[:, 0]


@launch.Verdict
def _takes_numbers(dtype: mx.Dtype) -> str | None:
    """Return why the kernel does not take numbers of `dtype`, or None."""
    taken = take_rows(mx.arange(5).astype(dtype)[:, None], mx.array([3, 0, 3], mx.int32))
    return None if taken.tolist() == [[3], [0], [3]] else f"it took {taken.tolist()}"


def dequantise(
    weight: mx.array, scales: mx.array, biases: mx.array, group_size: int, bits: int
) -> mx.array:
    """Return affine quantised weights [out, in] in the type of `scales` [out, in / group size]."""
    rows, columns = weight.shape[0], weight.shape[1] * 32 // bits
    (out,) = launch.run(
        "dequantise",
        [weight, scales, biases],
        [("T", scales.dtype)],
        [("K", columns), ("BITS", bits), ("GROUP", group_size)],
        threads=rows * columns // 8,
        group=128,
        shapes=[(rows, columns)],
        dtypes=[scales.dtype],
    )
    return out


def _compare(dtype: mx.Dtype) -> str | None:
    """Compare the kernels with MLX's functions on small random arrays of `dtype`."""
    keys = launch.random_keys(3, 6)
    rows, dim = 5, 320
    a, b = (mx.random.normal((rows, dim), key=key).astype(dtype) for key in keys[:2])
    weight = mx.random.uniform(0.5, 1.5, (dim,), key=keys[2]).astype(dtype)
    total, normed = add_norm(a, mx.stack([b / 4, b / 4, b / 2]), 3, weight, 1e-5)
    found = {"sum": (total, a + b), "norm": (normed, mx.fast.rms_norm(a + b, weight, 1e-5))}
    _, normed = add_norm(a, a, 0, weight, 1e-5)
    found["norm alone"] = normed, mx.fast.rms_norm(a, weight, 1e-5)
    gate, up = mx.split(a, 2, axis=1)
    found["SwiGLU"] = swiglu(a), gate * mx.sigmoid(gate) * up
    found |= _gated(a, a / 4, b / 4)  # the sums of larger ones would be rounded too much
    for bits in (4, 8):
        packed = mx.quantize(mx.random.normal((64, 128), key=keys[3]).astype(dtype), 64, bits)
        found[f"{bits} bits"] = dequantise(*packed, 64, bits), mx.dequantize(*packed, 64, bits)
    index = mx.array([3, 0, 3], mx.int32)
    found["rows"] = take_rows(a, index), a[index]
    for few in (True, False):
        found |= _rotated(dtype, keys[4], few)
    return launch.difference(found, 1e-3 if dtype == mx.float32 else 3e-2)


def _gated(gates: mx.array, a: mx.array, b: mx.array) -> dict[str, tuple[mx.array, mx.array]]:
    """Return results of the elementwise kernel for rows [n, 256 or more], with expected ones."""
    rows, halves = a.shape[0], mx.stack([b, b]).astype(mx.float32) / 2
    pairs, heads = gates[:, :256].reshape(rows, 2, 2, 64), b[:, :128].reshape(rows, 2, 64)
    by_head, by_row = mx.sigmoid(pairs[:, :, 1]), mx.sigmoid(gates[:, :1])
    return {
        "squares": (squared(a), nn.relu2(a)),
        "gates of heads": (gate_heads(heads, gates, 2), (heads * by_head).reshape(rows, 128)),
        "gates of rows": (add_rows(a, halves, 2, gates[:, :1]), a + b * by_row),
        "sums of rows": (add_rows(a, halves, 2), a + b),
    }


def _compare_own_values(dtype: mx.Dtype) -> str | None:
    (key,) = launch.random_keys(4, 1)
    found = _rotated(dtype, key, few=True, own_values=True)
    found |= _rotated(dtype, key, few=False, own_values=True)
    # The last bit of numbers above 4 is 0.03 in bfloat16.
    return launch.difference(found, 1e-3 if dtype == mx.float32 else 0.1)


def _rotated(
    dtype: mx.Dtype, key: mx.array, few: bool, *, own_values: bool = False
) -> dict[str, tuple[mx.array, mx.array]]:
    """Return the queries, keys and values of the kernel, each with its expected array."""
    from modelpack_engine.attention.kv_pools import KVLayout

    rows, query_heads, kv_heads, dim = 5, 4, 2, 64
    heads = query_heads + 2 * kv_heads
    joint = mx.random.normal((rows, heads * dim), key=key).astype(dtype)
    positions = mx.array([0, 1, 17, 1000, 5], mx.int32)
    slots = mx.array([16, 33, 18, 40, 31], mx.int32)
    weights = [mx.random.uniform(0.5, 1.5, (dim,), key=key).astype(dtype) for _ in range(2)]
    inverse = mx.power(mx.array(10000.0), -mx.arange(0, dim, 2, dtype=mx.float32) / dim)
    pools = TokenMajorPools(KVLayout(kv_heads, dim, kv_heads, dim, dtype), 3, 16)
    mx.eval(joint, pools.keys, pools.values)
    rotation = Rotation(inverse, dim, 1.0, False)
    given, values = mx.split(joint, [(heads - kv_heads * own_values) * dim], axis=1)
    q = rotate_and_write(
        mx.stack([given / 2, given / 2]), 2, dtype, pools, positions, slots, rotation,
        (query_heads, kv_heads), (weights[0], weights[1], 1e-6),
        None if few else rotation.angles(positions), values=values if own_values else None,
    )  # fmt: skip
    parts = joint.reshape(rows, heads, 1, dim)

    def rotated(part: mx.array, weight: mx.array) -> mx.array:
        normed = mx.fast.rms_norm(part, weight, 1e-6)
        return mx.fast.rope(
            normed, dim, traditional=False, base=10000.0, scale=1.0, offset=positions
        )[:, :, 0]

    at = slots + pools.last_write()
    how = "by angles" if few else "by a table"
    return {
        f"queries {how}": (q, rotated(parts[:, :query_heads], weights[0])),
        f"keys {how}": (pools.keys[at], rotated(parts[:, query_heads:-kv_heads], weights[1])),
        f"values {how}": (pools.values[at], parts[:, -kv_heads:, 0]),
    }


#: None if the kernels compute the same as MLX's functions for a type, otherwise the problem.
verdict = launch.Verdict(_compare)
#: The same of rotations where values are those of another matmul.
own_values_verdict = launch.Verdict(_compare_own_values)
