"""Matmuls of 9 to 768 rows with packed weights, by the warpgroups of Hopper (wgmma).

Rows are put in the order in which tensor cores multiply them: by the kernel that computes them
where that is a norm or SwiGLU, otherwise by one of its own. Blocks copy rows and weights far ahead,
and convert codes in registers.
"""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx

from modelpack_engine.kernels import launch
from modelpack_engine.layers import kernels, packed
from modelpack_engine.layers.weights import Weights, random_weights


@dataclass(frozen=True, slots=True)
class WideTile:
    """What a block computes: its rows, and warpgroups with 64 outputs each.

    `stages` steps of 64 bytes of each output's codes are in shared memory, or on their way there.
    So many blocks as `beside` run on a multiprocessor.
    """

    rows: int
    width: int
    stages: int
    beside: int = 1

    @property
    def outputs(self) -> int:
        """The outputs of a block."""
        return self.width * 64

    @property
    def threads(self) -> int:
        """The threads of a block: four more warps bring rows and weights."""
        return self.width * 128 + 128

    def shared_bytes(self, bits: int, group_size: int, span: int) -> int:
        """The bytes of shared memory of all stages, scales and barriers."""
        depth = step_of(bits)
        places = self.stages // (span * group_size // depth) + 2
        stage = self.rows * depth * 2 + self.outputs * 64
        return self.stages * stage + places * self.outputs * 4 * span + 16 * self.stages


#: The tiles by the rows that they are for, as measured: benchmarks/results/packed-h200.md. Few, as
#: each takes half a second to compile.
TILES = (WideTile(32, 2, 4, 2), WideTile(64, 2, 4), WideTile(128, 2, 3))
#: The tile for SwiGLU of 33 to 64 rows: there are enough outputs for larger blocks.
GATED = WideTile(64, 4, 4)
#: With more rows, a copy of the weights in full and the vendor's matmul are faster: without and
#: with SwiGLU, whose weights are the largest.
MOST_ROWS, MOST_GATED_ROWS = 512, 768
#: The multiprocessors of a large GPU, and the most parts that the next kernel adds up.
_PROCESSORS, _MOST_PARTS = 132, 8


def step_of(bits: int) -> int:
    """Return the inputs of a step, whose codes have 64 bytes."""
    return 512 // bits


def span_of(inputs: int, bits: int, group_size: int) -> int | None:
    """Return the groups of an output whose scales are copied at a time; None if none fits."""
    groups = inputs // group_size
    fit = (n for n in (8, 4, 2) if groups % n == 0 and n * group_size % step_of(bits) == 0)
    return next(fit, None)


def tile_for(x: mx.array, weights: Weights, *, swiglu: bool = False) -> WideTile | None:
    """Return the tile by which rows x [rows, ...] are multiplied; None if they are not."""
    rows, bits, size = x.shape[0], weights.bits, weights.group_size
    most = MOST_GATED_ROWS if swiglu else MOST_ROWS
    if not packed.TILE.rows < rows <= most or not packed.fits(x, weights):
        return None
    if not packed.has_warpgroups():
        return None
    assert bits is not None
    inputs, outputs = weights.num_inputs, weights.num_outputs
    if inputs % step_of(bits) or span_of(inputs, bits, size) is None or (swiglu and outputs % 2):
        return None
    tile = next((tile for tile in TILES if tile.rows >= rows), TILES[-1])
    if swiglu and tile.rows == GATED.rows:
        tile = GATED
    problem = verdict(x.dtype, bits, size, tile, weights.bias is not None)
    return tile if problem is None else None


def num_parts(tile: WideTile, rows: int, weights: Weights) -> int:
    """Return the number of parts to split the inputs into, a power of two.

    All blocks run at the same time, each of them at least `tile.stages` steps.
    """
    assert weights.bits is not None
    blocks, parts = -(-weights.num_outputs // tile.outputs) * -(-rows // tile.rows), 1
    steps = weights.num_inputs // step_of(weights.bits)
    while (
        parts < _MOST_PARTS
        and blocks * parts * 2 <= _PROCESSORS * tile.beside
        and steps % (parts * 2) == 0
        and steps // (parts * 2) >= tile.stages
    ):
        parts *= 2
    return parts


def arrange(x: mx.array, weights: Weights) -> mx.array:
    """Return rows x [rows, ...] in the order of `multiply`, [inputs / 64, rows, 64]."""
    rows, inputs, group = x.shape[0], x.size // x.shape[0], 128
    (out,) = launch.run_on_cuda(
        "arrange",
        {"x": x},
        template=[("T", x.dtype), ("BITS", weights.bits), ("D", inputs)],
        grid=(-(-rows * inputs // 8 // group) * group, 1, 1),
        threadgroup=(group, 1, 1),
        output_shapes=[(inputs // 64, rows, 64)],
        output_dtypes=[x.dtype],
    )
    return out


def multiply(
    arranged: mx.array,
    weights: Weights,
    tile: WideTile,
    parts: int = 1,
    *,
    swiglu: bool = False,
    arranged_for: int = 0,
) -> mx.array:
    """Return arranged rows times the weights: [rows, out], or parts of it to be added up.

    Several parts are float32 [parts, rows, out]. With `swiglu`, the first half of the outputs are
    gates: silu(gate) * other half; it is arranged for weights of so many bits, if not 0.
    """
    rows, bits, size = arranged.shape[1], weights.bits, weights.group_size
    assert bits is not None
    width = weights.num_outputs // 2 if swiglu else weights.num_outputs
    across = tile.outputs // 2 if swiglu else tile.outputs
    out_dtype = arranged.dtype if parts == 1 else mx.float32
    span = span_of(weights.num_inputs, bits, size)
    assert span is not None
    if arranged_for:
        assert swiglu and parts == 1 and width % step_of(arranged_for) == 0  # noqa: PT018
    shape = (rows, width) if parts == 1 else (parts, rows, width)
    (out,) = launch.run_on_cuda(
        "packed_wide",
        {"x": arranged, **weights.inputs()},
        tile.shared_bytes(bits, size, span),
        template=[
            ("T", arranged.dtype), ("O", out_dtype), ("BITS", bits), ("GROUP", size),
            ("BIAS", weights.bias is not None), ("SWIGLU", swiglu), ("MT", tile.rows),
            ("WIDTH", tile.width), ("STAGES", tile.stages), ("SPAN", span),
            ("ARRANGED", arranged_for),
        ],
        grid=(-(-rows // tile.rows) * tile.threads, -(-width // across), parts),
        threadgroup=(tile.threads, 1, 1),
        output_shapes=[(width // 64, rows, 64) if arranged_for else shape],
        output_dtypes=[out_dtype],
    )  # fmt: skip
    return out


def _compare(
    dtype: mx.Dtype, bits: int, group_size: int, tile: WideTile, biased: bool
) -> str | None:
    keys = launch.random_keys(17, 4)
    rows, inputs, outputs = tile.rows + 5, 1024, 2 * tile.outputs + 48

    def made(outputs: int) -> tuple[Weights, mx.array, mx.array]:
        return random_weights(
            dtype, bits, (outputs, inputs), 1 / 32, keys[0], keys[1], group_size, biased=biased
        )

    x, more = (mx.random.normal((rows, inputs), key=key).astype(dtype) for key in keys[2:])
    (weights, full, bias), (whole, _, _) = made(outputs), made(512)
    expected = x.astype(mx.float32) @ full.T + bias
    gate, up = mx.split(expected, 2, axis=1)
    arranged, norm = arrange(x, weights), mx.ones((inputs,), dtype)
    in_rows = multiply(arranged, whole, tile, swiglu=True)
    product = multiply(arranged, weights, tile, swiglu=True), gate * mx.sigmoid(gate) * up
    problem = launch.difference({f"SwiGLU of {rows} rows": product}, 0.2)
    if problem is not None:
        return problem
    found = {
        "SwiGLU in order": (
            multiply(arranged, whole, tile, swiglu=True, arranged_for=bits),
            arrange(in_rows, weights),
        ),
        "a norm in order": (
            kernels.add_norm(x, more, 1, norm, 1e-5, bits)[1],
            arrange(kernels.add_norm(x, more, 1, norm, 1e-5)[1], weights),
        ),
    }
    if tile is not GATED:
        sums = multiply(arranged, weights, tile, 2).sum(axis=0)
        found[f"the sum of {rows} rows"] = sums, expected
    return launch.difference(found, 5e-2)


#: None if the kernels compute as MLX does for a type, weights (also whether they have a bias) and a
#: tile, otherwise the problem.
verdict = launch.Verdict(_compare)
