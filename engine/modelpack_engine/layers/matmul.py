"""Matmuls with weights, [rows, in] times [out, in], by the kernel that suits the number of rows.

With few rows, most of the time is spent reading the weights, which MLX's matmuls do at half of the
memory bandwidth. Our kernel computes these matmuls, and may leave partial sums for the next kernel
to add. `dots` multiplies one row. `strips`, `packed` and `packed_wide` multiply by quantised
weights where they can; elsewhere, with many rows, these are dequantised first. `strips` and
`blocks` multiply by the block types of GGUF. MLX computes all other matmuls.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import mlx.core as mx

from modelpack_engine.kernels import launch, recording
from modelpack_engine.layers import blocks, dots, kernels, packed, packed_wide, strips
from modelpack_engine.layers.weights import Weights, random_weights

#: The most rows for which our kernel is used, with quantised weights and with plain ones: see
#: benchmarks/results/engine-h200.md. With more rows, quantised weights are dequantised first.
FEW_ROWS, FEW_ROWS_PLAIN = 128, 64
#: The outputs of one block of our kernel, the inputs that it reads at a time, and its threads.
OUTPUTS, DEPTH, THREADS = 64, 64, 128
#: The tile sizes that the kernels are compiled for, with their pipeline stages, by the bits of a
#: weight: few, as each takes a second or two to compile.
_TILES = {
    4: {32: 4, FEW_ROWS: 3},
    8: {32: 4, FEW_ROWS: 3},
    16: {32: 4, FEW_ROWS_PLAIN: 4},
}
#: Threadgroups that keep a large GPU busy, and the fewest tiles that each of them should have.
_THREADGROUPS, _FEWEST_TILES, _MOST_PARTS = 192, 4, 8


#: Returns rows in the order of `packed_wide` for weights of so many bits, by the kernel that
#: computes the rows.
Arranged = Callable[[int], mx.array]


def _in_order(x: mx.array, weights: Weights, arranged: Arranged | None) -> mx.array:
    assert weights.bits is not None
    return packed_wide.arrange(x, weights) if arranged is None else arranged(weights.bits)


def multiply(x: mx.array, weights: Weights, arranged: Arranged | None = None) -> mx.array:
    """Return x [rows, in] times the weights, plus the bias: [rows, out] in x's type.

    If a kernel can compute x in the order of `packed_wide`, this is `arranged`.
    """
    if few := strips.strips_for(x, weights):
        return strips.multiply(x, weights, few)
    if weights.blocks is not None:
        return blocks.multiply(x, weights.weight, weights.blocks, weights.bias)
    if packed.fits_row(x, weights):
        return packed.multiply_row(x, weights)
    if _takes_one(x, weights):
        return dots.multiply(x, weights)
    if tile := packed.tile_for(x, weights):
        return packed.multiply(x, weights, tile)
    if wide := packed_wide.tile_for(x, weights):
        return packed_wide.multiply(_in_order(x, weights, arranged), weights, wide)
    if _takes(x, weights):
        return _run(x, weights, 1, (x.shape[0], weights.num_outputs))
    return _by_mlx(x, weights)


def embedded(ids: mx.array, weights: Weights) -> mx.array | None:
    """Return the rows `ids` int32 [n] of a table, [n, dim]; None if no kernel returns them."""
    table, scales, biases = weights.weight, weights.scales, weights.biases
    if weights.blocks is not None:
        return None
    if weights.bits is None:
        return kernels.take_rows(table, ids)
    if scales is None or biases is None or not is_affine(weights, biases.dtype):
        return None
    table, scales, biases = (kernels.take_rows(array, ids) for array in (table, scales, biases))
    return kernels.dequantise(table, scales, biases, weights.group_size, weights.bits)


@dataclass(frozen=True, slots=True)
class Parts:
    """Partial sums of a matmul: `count` arrays of the same shape, stacked in `array`.

    Several parts are float32 and must be added; a single part is the result in its own type.
    """

    array: mx.array
    count: int


def multiply_in_parts(x: mx.array, weights: Weights, arranged: Arranged | None = None) -> Parts:
    """Return the partial sums of rows x [rows, ...] times the weights: parts [rows, out]."""
    if few := strips.strips_for(x, weights, parted=True):
        return Parts(strips.multiply(x, weights, few), few.parts)
    if packed.fits_row(x, weights):
        parts = packed.num_parts_of_row(weights.num_outputs, weights.num_inputs)
        return Parts(packed.multiply_row(x, weights, parts), parts)
    if _takes_one(x, weights):
        return Parts(dots.multiply(x, weights), 1)
    parts = num_parts(weights.num_outputs, weights.num_inputs)
    if tile := packed.tile_for(x, weights):
        by_packed = packed.num_parts(tile, x.shape[0], weights.num_outputs, weights.num_inputs)
        # Where `packed` splits no inputs, a few of its blocks take longer than the parts of ours:
        # measured for up to 8 rows.
        if by_packed > 1 or parts == 1 or not _takes(x, weights):
            return Parts(packed.multiply(x, weights, tile, by_packed), by_packed)
    if wide := packed_wide.tile_for(x, weights):
        parts = packed_wide.num_parts(wide, x.shape[0], weights)
        in_order = _in_order(x, weights, arranged)
        return Parts(packed_wide.multiply(in_order, weights, wide, parts), parts)
    if not _takes(x, weights):
        return Parts(multiply(x.reshape(x.shape[0], -1), weights), 1)
    shape = (x.shape[0], weights.num_outputs)
    return Parts(_run(x, weights, parts, shape if parts == 1 else (parts, *shape)), parts)


def swiglu(x: mx.array, weights: Weights, arranged: Arranged | None = None) -> mx.array:
    """Return silu(gate) * up [rows, n] for rows x [rows, ...] and joint weights [2 n, in]."""
    width = weights.num_outputs // 2
    if weights.num_outputs % 2 == 0 and (few := strips.strips_for(x, weights)):
        return strips.multiply(x, weights, few, swiglu=True)
    if weights.num_outputs % 2 == 0 and packed.fits_row(x, weights):
        return packed.multiply_row(x, weights, swiglu=True)
    if weights.num_outputs % 2 == 0 and _takes_one(x, weights, swiglu=True):
        return dots.multiply(x, weights, swiglu=True)
    if weights.num_outputs % 2 == 0 and (tile := packed.tile_for(x, weights)):
        return packed.multiply(x, weights, tile, swiglu=True)
    if wide := packed_wide.tile_for(x, weights, swiglu=True):
        return packed_wide.multiply(_in_order(x, weights, arranged), weights, wide, swiglu=True)
    if _takes(x, weights) and weights.num_outputs % 2 == 0:
        return _run(x, weights, 1, (x.shape[0], width), swiglu=True)
    return kernels.swiglu(multiply(x.reshape(x.shape[0], -1), weights))


def swiglu_in_order(x: mx.array, weights: Weights, arranged: Arranged | None) -> Arranged | None:
    """Return what computes `swiglu` in the order of `packed_wide`; None if that cannot.

    The outputs must be whole steps of what multiplies them, as `packed_wide.tile_for` demands.
    """
    wide = packed_wide.tile_for(x, weights, swiglu=True)
    if wide is None:
        return None
    return lambda bits: packed_wide.multiply(
        _in_order(x, weights, arranged), weights, wide, swiglu=True, arranged_for=bits
    )


def _by_mlx(x: mx.array, weights: Weights) -> mx.array:
    """Multiply by MLX's functions."""
    weight, bits, bias = weights.weight, weights.bits, weights.bias
    if bits is None:
        return recording.multiply(x, weight, bias, weights.transposed)
    scales, biases, group_size = weights.scales, weights.biases, weights.group_size
    assert scales is not None
    alike = bias is None or bias.dtype == x.dtype
    if alike and biases is not None and x.shape[0] > FEW_ROWS and is_affine(weights, x.dtype):
        compute = partial(kernels.dequantise, weight, scales, biases, group_size, bits)
        return recording.multiply_dequantised(x, compute, bias)
    recording.refuse(f"multiplies {x.shape[0]} rows")
    product = mx.quantized_matmul(
        x, weight, scales, biases,
        transpose=True, group_size=group_size, bits=bits, mode=weights.mode,
    )  # fmt: skip
    return product if bias is None else product + bias


def is_affine(weights: Weights, dtype: mx.Dtype) -> bool:
    """Return whether our kernels support these quantised weights, with scales of a type."""
    return (
        weights.mode == "affine"
        and weights.bits in (4, 8)
        and weights.group_size % 32 == 0
        and weights.scales is not None
        and weights.scales.dtype == dtype
    )


def multiply_normed(
    row: dots.Normed, weights: Weights, *, swiglu: bool = False
) -> tuple[mx.array, mx.array] | None:
    """Return the normed row times the weights [1, out], and the sum that was normed.

    With `swiglu`, the first half of the outputs are gates. None if no kernel does all of it.
    """
    few = strips.strips_for(row.a, weights)
    if few and weights.num_inputs <= strips.MOST_NORMED:
        return strips.multiply_normed(row, weights, few, swiglu=swiglu)
    if packed.fits_row(row.a, weights):
        return packed.multiply_normed(row, weights, swiglu=swiglu)
    bits = weights.bits or 16
    if (
        (bits != 4 or swiglu)
        and dots.fits_normed(row, weights)
        and dots.normed_verdict(row.a.dtype, bits, weights.group_size or 64) is None
    ):
        return dots.multiply_normed(row, weights, swiglu=swiglu)
    return None


def _takes_one(x: mx.array, weights: Weights, *, swiglu: bool = False) -> bool:
    """Return whether `dots` multiplies x, which has one row."""
    bits = weights.bits or 16
    return (
        x.shape[0] == 1
        and (bits != 4 or swiglu)  # `packed` is faster
        and dots.fits(x, weights)
        and dots.verdict(x.dtype, bits, weights.group_size or 64) is None
    )


def _takes(x: mx.array, weights: Weights) -> bool:
    """Return whether our kernel multiplies these rows."""
    return (
        x.shape[0] <= (FEW_ROWS if weights.bits else FEW_ROWS_PLAIN)
        and fits(x, weights)
        and verdict(x.dtype, weights.bits or 16, weights.bias is not None) is None
    )


def fits(x: mx.array, weights: Weights) -> bool:
    """Return whether our kernels support rows x and weights of these types and sizes."""
    return (
        x.dtype in (mx.float16, mx.bfloat16)
        and launch.backend() == "cuda"
        and weights.num_inputs % DEPTH == 0
        and (weights.bias is None or weights.bias.dtype == x.dtype)
        and (is_affine(weights, x.dtype) if weights.bits else weights.weight.dtype == x.dtype)
    )


def stage_bytes(bits: int, tile: int) -> int:
    """Return the bytes of shared memory of one pipeline stage, for tiles of `tile` rows."""
    return OUTPUTS * DEPTH * bits // 8 + tile * DEPTH * 2


def num_parts(num_outputs: int, num_inputs: int) -> int:
    """Return the number of parts to split the inputs into, a power of two."""
    tiles, groups = num_inputs // DEPTH, -(-num_outputs // OUTPUTS)
    parts = 1
    while (
        parts < _MOST_PARTS
        and groups * parts < _THREADGROUPS
        and tiles % (2 * parts) == 0
        and tiles // (2 * parts) >= _FEWEST_TILES
    ):
        parts *= 2
    return parts


def _run(
    x: mx.array, weights: Weights, parts: int, shape: tuple[int, ...], *, swiglu: bool = False
) -> mx.array:
    """Return the output of our kernel in this shape: outputs in parts, or SwiGLU of them."""
    rows, outputs = x.shape[0], weights.num_outputs
    bits = weights.bits or 16
    tile, stages = next(item for item in _TILES[bits].items() if item[0] >= rows)
    out_dtype = x.dtype if parts == 1 else mx.float32
    (out,) = launch.run_on_cuda(
        "product",
        {"x": x, **weights.inputs()},
        stages * stage_bytes(bits, tile),
        template=[
            ("T", x.dtype), ("O", out_dtype), ("BITS", bits), ("GROUP", weights.group_size or 64),
            ("BIAS", weights.bias is not None), ("MT", tile), ("STAGES", stages),
            ("SWIGLU", swiglu),
        ],
        grid=(-(-outputs // OUTPUTS) * THREADS, 1, parts),
        threadgroup=(THREADS, 1, 1),
        output_shapes=[shape],
        output_dtypes=[out_dtype],
    )  # fmt: skip
    return out


def _compare(dtype: mx.Dtype, bits: int, biased: bool) -> str | None:
    keys = launch.random_keys(9, 3)
    outputs, inputs = 208, 1024
    weights, full, bias = random_weights(
        dtype, bits, (outputs, inputs), 1 / 32, keys[0], keys[1], biased=biased
    )
    for rows in (13, max(_TILES[bits])):
        x = mx.random.normal((rows, inputs), key=keys[2]).astype(dtype)
        expected = x.astype(mx.float32) @ full.T + bias
        parts = _run(x, weights, 4, (4, rows, outputs)).sum(axis=0)
        gate, up = mx.split(expected, 2, axis=1)
        found = _run(x, weights, 1, (rows, outputs // 2), swiglu=True)
        problem = launch.difference({f"the sum of {rows} rows": (parts, expected)}, 5e-2)
        problem = problem or launch.difference(
            {f"SwiGLU of {rows} rows": (found, gate * mx.sigmoid(gate) * up)}, 2e-1
        )
        if problem is not None:
            return problem
    return None


#: None if our kernel multiplies as MLX does for a type and the bits of a weight, with a bias or
#: without, otherwise the problem.
verdict = launch.Verdict(_compare)
