"""Matmuls with packed weights: rows times affine quantised weights, converted in registers.

With few rows, the time is that of reading the packed weights. These kernels are for the sizes and
GPUs that `strips` does not support: one for a row of 4 bits, and `multiply` for up to eight rows,
which needs tensor cores. More rows are multiplied by `packed_wide`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import mlx.core as mx

from modelpack_engine.kernels import launch
from modelpack_engine.layers.dots import Normed
from modelpack_engine.layers.weights import Weights, random_weights


@dataclass(frozen=True, slots=True)
class Tile:
    """What a block computes: its rows, warps with strips of 16 outputs, and a step of the inputs.

    `stages` steps are in shared memory, or on their way there.
    """

    rows: int
    warps: int
    strips: int
    depth: int
    stages: int

    @property
    def outputs(self) -> int:
        """The outputs of a block."""
        return self.warps * self.strips * 16

    def span(self, groups: int, group_size: int) -> int | None:
        """The groups of an output whose scales are copied at a time; None if none is possible."""
        fit = (n for n in (8, 4, 2) if groups % n == 0 and n * group_size >= self.depth)
        return next(fit, None)

    def shared_bytes(self, bits: int, group_size: int, span: int) -> int:
        """The bytes of shared memory of all stages, and of the scales."""
        stage = self.rows * self.depth * 2 + self.outputs * self.depth * bits // 8
        places = (self.stages - 1) // max(1, span * group_size // self.depth) + 2
        return self.stages * stage + places * self.outputs * 4 * span


#: The tile, as measured: benchmarks/results/packed-h200.md.
TILE = Tile(8, 2, 2, 256, 4)
#: The bits of codes that the kernel reads; MLX multiplies by others.
CODE_BITS = (4, 8)
#: The blocks that keep a large GPU busy, and the most parts that the next kernel adds up.
_BLOCKS, _MOST_PARTS = 264, 8


def tile_for(x: mx.array, weights: Weights) -> Tile | None:
    """Return the tile by which our kernel multiplies these rows; None if it does not."""
    if x.shape[0] > TILE.rows or not fits(x, weights):
        return None
    size = weights.group_size
    if weights.num_inputs % TILE.depth or TILE.span(weights.num_inputs // size, size) is None:
        return None
    assert weights.bits is not None
    problem = verdict(x.dtype, weights.bits, size, TILE)
    return TILE if problem is None else None


def fits(x: mx.array, weights: Weights) -> bool:
    """Return whether the kernel supports rows x and weights of these types and sizes."""
    return (
        launch.backend() == "cuda"
        and x.dtype in (mx.float16, mx.bfloat16)
        and weights.mode == "affine"
        and weights.bits in CODE_BITS
        and weights.group_size in (32, 64, 128)
        and weights.scales is not None
        and weights.biases is not None
        and weights.scales.dtype == x.dtype
        and (weights.bias is None or weights.bias.dtype == x.dtype)
    )


@cache
def has_warpgroups() -> bool:
    """Return whether the GPU multiplies by warpgroups."""
    return mx.device_info()["compute_capability_major"] == 9


def num_parts(tile: Tile, rows: int, outputs: int, inputs: int) -> int:
    """Return the number of parts to split the inputs into, a power of two."""
    blocks, parts = -(-outputs // tile.outputs) * -(-rows // tile.rows), 1
    while (
        parts < _MOST_PARTS
        and blocks * parts < _BLOCKS
        and inputs % (tile.depth * parts * 2) == 0
        and inputs // (parts * 2) >= 4 * tile.depth
    ):
        parts *= 2
    return parts


def multiply(
    x: mx.array, weights: Weights, tile: Tile, parts: int = 1, *, swiglu: bool = False
) -> mx.array:
    """Return rows x [rows, ...] times the weights: [rows, out], or parts of it to be added up.

    Several parts are float32 [parts, rows, out]. With `swiglu`, the first half of the outputs are
    gates: silu(gate) * other half.
    """
    rows, bits = x.shape[0], weights.bits
    assert bits is not None
    width = weights.num_outputs // 2 if swiglu else weights.num_outputs
    across = tile.outputs // 2 if swiglu else tile.outputs
    out_dtype = x.dtype if parts == 1 else mx.float32
    span = tile.span(weights.num_inputs // weights.group_size, weights.group_size)
    assert span is not None
    threads, shared_bytes = tile.warps * 32, tile.shared_bytes(bits, weights.group_size, span)
    (out,) = launch.run_on_cuda(
        "packed",
        {"x": x, **weights.inputs()},
        shared_bytes,
        template=[
            ("T", x.dtype), ("O", out_dtype), ("BITS", bits), ("GROUP", weights.group_size),
            ("BIAS", weights.bias is not None), ("SWIGLU", swiglu), ("MT", tile.rows),
            ("WARPS", tile.warps), ("STRIPS", tile.strips), ("DEPTH", tile.depth),
            ("STAGES", tile.stages), ("SPAN", span),
        ],
        grid=(-(-rows // tile.rows) * threads, -(-width // across), parts),
        threadgroup=(threads, 1, 1),
        output_shapes=[(rows, width) if parts == 1 else (parts, rows, width)],
        output_dtypes=[out_dtype],
    )  # fmt: skip
    return out


#: For one row: the inputs of a chunk, the chunks of a warp at a time, the warps of a block, the
#: most blocks, and the most inputs that shared memory holds.
_CHUNK, _AT_A_TIME, _WARPS, _ROW_BLOCKS, _MOST_INPUTS = 128, 4, 4, 528, 16384


def fits_row(x: mx.array, weights: Weights) -> bool:
    """Return whether the kernel for one row of weights of 4 bits supports x and the weights."""
    return (
        x.size == weights.num_inputs  # of one row
        and weights.bits == 4
        and weights.num_inputs % _CHUNK == 0
        and weights.num_inputs <= _MOST_INPUTS
        and fits(x, weights)
        and row_verdict(x.dtype, weights.group_size) is None
    )


def num_parts_of_row(outputs: int, inputs: int) -> int:
    """Return the number of parts to split the inputs of one row into, a power of two.

    Few, since each block of the next kernel adds them up.
    """
    strips, chunks, parts = -(-outputs // 16), inputs // _CHUNK, 1
    while (
        parts < _MOST_PARTS
        and strips * parts < _ROW_BLOCKS // 2
        and chunks % (parts * 2) == 0
        and chunks // (parts * 2) >= 2 * _AT_A_TIME * _WARPS
    ):
        parts *= 2
    return parts


def multiply_row(
    x: mx.array,
    weights: Weights,
    parts: int = 1,
    *,
    swiglu: bool = False,
    blocks: int = _ROW_BLOCKS,
) -> mx.array:
    """Return the row x [1, ...] times the weights, by so many blocks: as `multiply`."""
    return _run_row(x, weights, None, parts, blocks, swiglu=swiglu)[0]


def multiply_normed(
    row: Normed, weights: Weights, *, swiglu: bool = False, blocks: int = _ROW_BLOCKS
) -> tuple[mx.array, mx.array]:
    """Return the normed row times the weights [1, out], and the sum in a's shape."""
    out, total = _run_row(row.a, weights, row, 1, blocks, swiglu=swiglu)
    return out, total


def _run_row(
    x: mx.array,
    weights: Weights,
    normed: Normed | None,
    parts: int,
    blocks: int,
    *,
    swiglu: bool,
) -> list[mx.array]:
    width = weights.num_outputs // 2 if swiglu else weights.num_outputs
    strips = -(-width // (8 if swiglu else 16))
    stride = min(strips, max(1, blocks // parts))
    out_dtype = x.dtype if parts == 1 else mx.float32
    shapes: list[tuple[int, ...]] = [(1, width) if parts == 1 else (parts, 1, width)]
    dtypes, more, norm = [out_dtype], x.dtype, x.dtype
    if normed is not None:
        shapes, dtypes = [*shapes, x.shape], [*dtypes, x.dtype]
        more, norm = normed.parts.dtype, normed.weight.dtype
    return launch.run_on_cuda(
        "packed_row",
        {
            "x": x, **weights.inputs(),
            "more": None if normed is None else normed.parts,
            "norm": None if normed is None else normed.weight,
        },
        without=("total",) if normed is None else (),
        template=[
            ("T", x.dtype), ("O", out_dtype), ("B", more), ("V", norm),
            ("GROUP", weights.group_size), ("BIAS", weights.bias is not None),
            ("SWIGLU", swiglu), ("WARPS", _WARPS), ("STRIDE", stride),
            ("NORMED", normed is not None), ("D", weights.num_inputs // parts),
            ("PARTS", 1 if normed is None else normed.count),
            ("EPSILON", 0 if normed is None else launch.bits_of(normed.epsilon)),
        ],
        grid=(stride * _WARPS * 32, 1, parts),
        threadgroup=(_WARPS * 32, 1, 1),
        output_shapes=shapes,
        output_dtypes=dtypes,
    )  # fmt: skip


def _compare(dtype: mx.Dtype, bits: int, group_size: int, tile: Tile) -> str | None:
    keys = launch.random_keys(9, 3)
    rows, outputs, inputs = tile.rows + 5, 208, 1024
    weights, full, bias = random_weights(
        dtype, bits, (outputs, inputs), 1 / 32, keys[0], keys[1], group_size
    )
    x = mx.random.normal((rows, inputs), key=keys[2]).astype(dtype)
    expected = x.astype(mx.float32) @ full.T + bias
    found = multiply(x, weights, tile, 2).sum(axis=0)
    problem = launch.difference({f"the sum of {rows} rows": (found, expected)}, 5e-2)
    if problem is not None:
        return problem
    gate, up = mx.split(expected, 2, axis=1)
    found = multiply(x, weights, tile, swiglu=True)
    return launch.difference({f"SwiGLU of {rows} rows": (found, gate * mx.sigmoid(gate) * up)}, 0.2)


def _compare_row(dtype: mx.Dtype, group_size: int) -> str | None:
    keys = launch.random_keys(15, 5)
    outputs, inputs = 16 * 40 + 8, _CHUNK * 21
    weights, full, bias = random_weights(
        dtype, 4, (outputs, inputs), 1 / 64, keys[0], keys[1], group_size
    )
    a, b = (mx.random.normal((1, inputs), key=key).astype(dtype) for key in keys[2:4])
    norm = mx.random.uniform(0.5, 1.5, (inputs,), key=keys[4]).astype(dtype)
    parts = mx.stack([b / 4, b * 3 / 4]).astype(mx.float32)
    expected = a.astype(mx.float32) @ full.T + bias
    x = mx.fast.rms_norm(a + b, norm, 1e-5).astype(mx.float32)
    gate, up = mx.split(x @ full.T + bias, 2, axis=1)
    short, few, few_bias = random_weights(
        dtype, 4, (outputs, _CHUNK * 2), 1 / 16, keys[0], keys[1], group_size
    )
    out, total = multiply_normed(Normed(a, parts, 2, norm, 1e-5), weights, blocks=12)
    gated, _ = multiply_normed(Normed(a, b, 1, norm, 1e-5), weights, swiglu=True, blocks=40)
    few_x = a[:, : _CHUNK * 2]
    found = {
        "the product of a row": (multiply_row(a, weights), expected),
        "the sum of parts of a row": (
            multiply_row(few_x, short, 2).sum(axis=0),
            few_x.astype(mx.float32) @ few.T + few_bias,
        ),
        "the product of a norm": (out, x @ full.T + bias),
        "the sum before a norm": (total, a + b),
        "SwiGLU of a norm": (gated, gate * mx.sigmoid(gate) * up),
    }
    return launch.difference(found, 1e-1)


#: None if our kernel multiplies as MLX does for a type, weights and a tile, otherwise the problem;
#: that of one row, for a type and a size of groups.
verdict, row_verdict = launch.Verdict(_compare), launch.Verdict(_compare_row)
