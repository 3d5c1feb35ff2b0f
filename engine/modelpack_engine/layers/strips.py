"""Matmuls of up to eight rows with packed weights, by strips of outputs (`kernels/strips.h`).

The kernel is for Hopper (compute capability 9.0): its blocks copy weights far ahead, so that the
time is that of reading them. Weights are affine quantised, as MLX stores them, or have one of
GGUF's block types.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx

from modelpack_engine.kernels import launch
from modelpack_engine.kernels.sources import Body
from modelpack_engine.layers import blocks, packed
from modelpack_engine.layers.blocks import BlockType
from modelpack_engine.layers.dots import Normed
from modelpack_engine.layers.weights import Weights, random_weights

#: The inputs of a unit, the most warps and shared memory of a multiprocessor's blocks, the
#: multiprocessors of a large GPU, the most stages, and the most rows and inputs that are kept.
_UNIT, _MOST_WARPS, _MOST_SHARED, _PROCESSORS, _MOST_STAGES = 256, 16, 224 << 10, 132, 6
_MOST_ROWS, _MOST_KEPT = 8, 1 << 15
#: The most rows of which tensor cores multiply digits with the bytes of block types.
_MOST_IN_DIGITS = 2
#: The most inputs of a row that strips norm: its elements are in registers meanwhile.
MOST_NORMED = 12288
#: The most parts of the inputs, which the next kernel adds up.
_MOST_PARTS = 8


@dataclass(frozen=True, slots=True)
class Format:
    """How weights are stored: in groups of codes of `bits`, or in the block type `blocks`."""

    bits: int
    group_size: int
    blocks: BlockType | None = None

    @classmethod
    def of(cls, weights: Weights) -> Format:
        """Return the format of quantised weights."""
        assert weights.bits is not None
        return cls(weights.bits, weights.group_size, weights.blocks)

    @property
    def step(self) -> int:
        """The inputs of which a stage has a multiple: copies have whole 16 bytes."""
        return _UNIT if self.blocks else max(_UNIT, self.group_size * 8)

    def in_digits(self, rows: int) -> bool:
        """Return whether so many rows are multiplied as digits (`kernels/digit_rows.h`)."""
        kind = self.blocks
        return kind is not None and not kind.exponent and rows <= _MOST_IN_DIGITS

    def stage_bytes(self, units: int, rows: int, *, whole: bool) -> int:
        """Return the bytes of a stage with so many units of 16 outputs, as the kernels lay it.

        Stages of block types that have `whole` rows have them as they are in memory.
        """
        if (kind := self.blocks) is None:
            codes, scales = units * _UNIT * self.bits // 8, units * _UNIT // self.group_size * 2
            pad = self.group_size * self.bits // 8
            lines = codes + (pad if pad < 128 else 16)
            return 16 * lines + 32 * (scales + 16 * (scales % 32 == 0))
        low, high = (1, 1) if self.in_digits(rows) else (kind.low, kind.high)
        if whole:
            row = -(-kind.words(units * _UNIT) * 4 // 128) * 128
            return 16 * (row + 16 * low)
        planes = units * 32 * (kind.low + kind.high) + 16 * (low + (high if kind.high else 0))
        return 16 * (planes + (units * kind.scale_bytes + 47) // 16 * 16)

    def row_bytes(self, inputs: int, rows: int, warps: int) -> int:
        """Return the bytes of rows in shared memory, with the sums of their groups.

        If each of several rows' units is for one warp, that warp has them in registers.
        """
        if not self.in_digits(rows):
            if rows > 1 and inputs // _UNIT <= warps:
                return 0
            return rows * (2 * inputs + (0 if self.blocks else inputs // self.group_size * 4))
        assert self.blocks is not None
        groups = inputs // self.blocks.group if self.blocks.mins else 0
        return rows * (inputs + groups) * 4 + -(-rows * (inputs // _UNIT) // 4) * 16

    @property
    def constants(self) -> list[tuple[str, Any]]:
        """The template arguments of the kernels."""
        if self.blocks is None:
            return [("BITS", self.bits), ("GROUP", self.group_size)]
        return [("H", mx.float16), *self.blocks.constants]


@dataclass(frozen=True, slots=True)
class Strips:
    """How blocks multiply up to `rows` rows by strips of 16 outputs.

    Measured in benchmarks/results/packed-h200.md. `parts` blocks share the inputs of a strip, in
    stages of one unit for each of `warps` warps, of which `stages` are in shared memory or on their
    way there; `blocks` run at a time for each part.
    """

    rows: int
    parts: int
    warps: int
    stages: int
    blocks: int
    shared_bytes: int

    @property
    def threads(self) -> int:
        """The threads of a block: three more warps copy weights, and add up sums."""
        return (self.warps + 3) * 32


def strips_for(x: mx.array, weights: Weights, *, parted: bool = False) -> Strips | None:
    """Return how the kernel multiplies rows x [rows, ...] by the weights; None if it does not.

    Inputs are split into parts only if they may be `parted`.
    """
    rows = x.size // weights.num_inputs
    if rows > _MOST_ROWS or not _fits(x, weights):
        return None
    form = Format.of(weights)
    found = plan(rows, weights.num_inputs, form, parted=parted)
    if (
        found is None
        or not packed.has_warpgroups()
        or verdict(x.dtype, form, found.rows, weights.bias is not None) is not None
    ):
        return None
    return found


def _fits(x: mx.array, weights: Weights) -> bool:
    """Return whether the kernel supports rows x and weights of these types."""
    if weights.blocks is None:
        return packed.fits(x, weights)
    return (
        launch.backend() == "cuda"
        and x.dtype in (mx.float16, mx.bfloat16)
        and (weights.bias is None or weights.bias.dtype == x.dtype)
    )


def plan(rows: int, inputs: int, form: Format, *, parted: bool = False) -> Strips | None:
    """Return how up to 8 rows are multiplied; None if their inputs do not fit."""
    if inputs % form.step:
        return None
    kept, units, parts = 1 << max(0, rows - 1).bit_length(), inputs // _UNIT, 1
    while inputs // parts * kept > _MOST_KEPT:
        parts *= 2
    own, least = units // parts, form.step // _UNIT
    if (parts > 1 and not parted) or parts > _MOST_PARTS or units % parts or own % least:
        return None
    for splits in range(-(-own // _MOST_WARPS), own // least + 1):
        warps = -(-own // (splits * least)) * least
        if warps > _MOST_WARPS:
            continue
        stage = form.stage_bytes(warps, kept, whole=warps == units)
        rest = form.row_bytes(own * _UNIT, kept, warps)
        rest += 2 * warps * kept * 16 * 4 + 96 + 16 * _MOST_STAGES
        for beside in (2, 1) if warps * 2 <= _MOST_WARPS else (1,):
            stages = min(_MOST_STAGES, (_MOST_SHARED // beside - rest) // stage)
            if stages >= 2:
                across = max(1, _PROCESSORS * beside // parts)
                return Strips(kept, parts, warps, stages, across, stages * stage + rest)
    return None


def multiply(x: mx.array, weights: Weights, strips: Strips, *, swiglu: bool = False) -> mx.array:
    """Return rows x [rows, ...] times the weights: [rows, out], or parts of it to be added up.

    Several parts are float32 [parts, rows, out]. With `swiglu`, the first half of the outputs are
    gates: silu(gate) * other half.
    """
    return _run(x, weights, strips, None, swiglu=swiglu)[0]


def multiply_normed(
    row: Normed, weights: Weights, strips: Strips, *, swiglu: bool = False
) -> tuple[mx.array, mx.array]:
    """Return the normed row times the weights [1, out], and the sum in a's shape."""
    out, total = _run(row.a, weights, strips, row, swiglu=swiglu)
    return out, total


def _run(
    x: mx.array, weights: Weights, strips: Strips, normed: Normed | None, *, swiglu: bool
) -> list[mx.array]:
    rows, parts = x.size // weights.num_inputs, strips.parts
    width = weights.num_outputs // 2 if swiglu else weights.num_outputs
    stride = min(strips.blocks, -(-width // (8 if swiglu else 16)))
    out_dtype = x.dtype if parts == 1 else mx.float32
    shapes: list[tuple[int, ...]] = [(rows, width) if parts == 1 else (parts, rows, width)]
    dtypes, more, norm = [out_dtype], x.dtype, x.dtype
    if normed is not None:
        shapes, dtypes = [*shapes, x.shape], [*dtypes, x.dtype]
        more, norm = normed.parts.dtype, normed.weight.dtype
    form = Format.of(weights)
    body: Body = "packed_strips"
    given: Mapping[str, mx.array | None] = weights.inputs()
    constants = form.constants
    if form.blocks is not None:
        in_digits = form.in_digits(strips.rows)
        body = "digit_strips" if in_digits else "block_strips"
        given = {"weight": weights.weight, "bias": weights.bias}
        whole = strips.warps * _UNIT == weights.num_inputs
        constants = [*constants, ("DIGITS", in_digits), ("WHOLE", whole)]
    return launch.run_on_cuda(
        body,
        {
            "x": x, **given,
            "more": None if normed is None else normed.parts,
            "norm": None if normed is None else normed.weight,
        },
        strips.shared_bytes,
        without=("total",) if normed is None else (),
        template=[
            ("T", x.dtype), ("O", out_dtype), ("B", more), ("V", norm),
            *constants,
            ("BIAS", weights.bias is not None), ("SWIGLU", swiglu), ("ROWS", strips.rows),
            ("WARPS", strips.warps), ("STAGES", strips.stages), ("STRIDE", stride),
            ("NORMED", normed is not None),
            ("D", weights.num_inputs // parts), ("PARTS", 1 if normed is None else normed.count),
            ("EPSILON", 0 if normed is None else launch.bits_of(normed.epsilon)),
        ],
        grid=(stride * strips.threads, 1, parts),
        threadgroup=(strips.threads, 1, 1),
        output_shapes=shapes,
        output_dtypes=dtypes,
    )  # fmt: skip


def random_weights_of(
    dtype: mx.Dtype, form: Format, shape: tuple[int, int], *, biased: bool
) -> tuple[Weights, mx.array, mx.array]:
    """Return random weights of a format for a test, and what they and their bias stand for."""
    key, of_bias = launch.random_keys(16, 2)
    if (kind := form.blocks) is None:
        return random_weights(
            dtype, form.bits, shape, 1 / 128, key, of_bias, form.group_size, biased=biased
        )
    words = mx.array(blocks.random_words(kind, *shape))
    bias = (mx.random.normal(shape[:1], key=of_bias) * biased).astype(dtype)
    weights = Weights(
        words, None, None, bias if biased else None, form.bits, kind.group, "gguf", blocks=kind
    )
    return weights, blocks.computed_values(words, kind, mx.float32), bias.astype(mx.float32)


def _compare(dtype: mx.Dtype, form: Format, rows: int, biased: bool) -> str | None:
    keys = launch.random_keys(17, 3)
    # Rows are whole in a stage. Their halves are in two, of which the last is shorter unless groups
    # are too large; of 8 rows, warps have them in registers. Scales of block types do not begin at
    # whole 16 bytes there.
    units = 14 if form.blocks else 16
    outputs, inputs = 16 * 20 + 8, _UNIT * units
    weights, full, bias = random_weights_of(dtype, form, (outputs, inputs), biased=biased)
    a, b = (mx.random.normal((rows, inputs), key=key).astype(dtype) for key in keys[:2])
    whole = plan(rows, inputs, form)
    assert whole is not None
    whole = replace(whole, blocks=12)
    fewer = 4 if form.blocks or form.group_size == 128 else 6
    halves = replace(whole, parts=2, warps=units // 2 if rows == 8 else fewer)
    expected = a.astype(mx.float32) @ full.T + bias
    gate, up = mx.split(expected, 2, axis=1)
    found = {
        f"the product of {rows} rows": (multiply(a, weights, whole), expected),
        "the sum of parts": (multiply(a, weights, halves).sum(axis=0), expected),
        "SwiGLU": (multiply(a, weights, whole, swiglu=True), gate * mx.sigmoid(gate) * up),
    }
    if rows == 1:
        norm = mx.random.uniform(0.5, 1.5, (inputs,), key=keys[2]).astype(dtype)
        x = mx.fast.rms_norm(a + b, norm, 1e-5).astype(mx.float32)
        parts = mx.stack([b / 4, b * 3 / 4]).astype(mx.float32)
        row = Normed(a, parts, 2, norm, 1e-5)
        for stages, strips in (("a stage", whole), ("stages", replace(whole, warps=fewer))):
            out, total = multiply_normed(row, weights, strips)
            found[f"the product of a norm in {stages}"] = out, x @ full.T + bias
            found[f"the sum before a norm in {stages}"] = total, a + b
    largest = {name: mx.abs(wanted).max() for name, (_, wanted) in found.items()}
    relative = {name: (a / largest[name], b / largest[name]) for name, (a, b) in found.items()}
    return launch.difference(relative, 0.02)


#: None if the kernel multiplies as MLX does for a type, a format, a number of rows, and with a bias
#: or without; otherwise the problem.
verdict = launch.Verdict(_compare)
