"""Programs of a few operations for the library for CPUs, and random weights for its matrices."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, cast

import mlx.core as mx
import numpy as np
import numpy.typing as npt
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize
from mlx.utils import tree_flatten

from modelpack_engine.cpu.library import (
    Code,
    Matrix,
    Operation,
    Rope,
    Source,
    Span,
    Step,
    library,
)
from modelpack_engine.cpu.weights import PackedWeights, StoredAffine, StoredArray
from tests.engine.processor import processor_flags

Array = npt.NDArray[Any]

#: The instruction sets that the kernels are compiled for, and Linux's name of what each needs.
INSTRUCTION_SETS = {
    "portable": "",
    "avx2": "avx2",
    "avx512": "avx512_vnni",
    "avx512_bf16": "avx512_bf16",
    "amx": "amx_bf16",
    "neon_dot": "asimddp",
    "neon_bf16": "bf16",
}


def usable() -> list[str]:
    """Return the instruction sets that this processor has; AMX only if the library is to use it."""
    flags = {"", *processor_flags()}
    if os.environ.get("MODELPACK_AMX") != "1":
        flags.discard("amx_bf16")
    return [name for name, flag in INSTRUCTION_SETS.items() if flag in flags]


LOGITS = -1
#: The distance of 1 to the next float32; half of it is the most that one rounding changes.
EPS = float(np.finfo(np.float32).eps)

#: GGUF's blocks: where their scales (halves) lie.
SCALES = {
    Source.Q4_0: (0,), Source.Q4_1: (0, 2), Source.Q5_0: (0,), Source.Q8_0: (0,),
    Source.Q4_K: (0, 2), Source.Q6_K: (208,),
}  # fmt: skip
BLOCKS = tuple(SCALES)


def operation(code: Code, **fields: Any) -> Operation:
    """Return an operation; `matrix` takes matrices, `bias`, `norm` and `sinks` arrays."""
    made = Operation(code=code, scale=1.0, rope=-1, eps=1e-5)
    made.kept = fields  # type: ignore[attr-defined]
    for name, value in fields.items():
        if name == "matrix":
            for index, matrix in enumerate(value):
                made.matrix[index] = matrix.pointer
        elif name == "bias":
            for index, bias in enumerate(value):
                made.bias[index] = None if bias is None else _address(bias)
        elif name in ("norm", "second_norm", "sinks"):
            setattr(made, name, None if value is None else _address(value))
        else:
            setattr(made, name, value)
    return made


def _address(array: Array) -> int:
    assert array.dtype == np.float32
    assert array.flags.c_contiguous
    return int(array.ctypes.data)


@dataclass
class Sequence_:
    """Rows of a step that belong to one sequence: its context, and its blocks."""

    context: int
    rows: int
    table: Array


@dataclass
class Steps:
    """What a step is given besides its tokens."""

    positions: Array | None = None
    slots: Array | None = None
    sequences: Sequence[Sequence_] = ()
    block_size: int = 16
    pools: Sequence[Array] = field(default_factory=list)
    sampled: Array | None = None


class Program:
    """A program of the library; freed with this object."""

    def __init__(
        self, operations: Sequence[Operation], widths: Sequence[int], *, rows: int, columns: int,
        ropes: Sequence[Rope] = (),
    ) -> None:  # fmt: skip
        self._kept = operations, ropes
        self._library = library()
        self.pointer = self._library.mp_program_new(
            (Operation * len(operations))(*operations), len(operations),
            (Rope * len(ropes))(*ropes), len(ropes),
            np.array(widths, np.int32).ctypes.data, len(widths), rows, columns,
        )  # fmt: skip

    def __del__(self) -> None:
        if self.pointer:
            self._library.mp_program_free(self.pointer)

    def run(self, tokens: Array, logits: Array, steps: Steps | None = None) -> int:
        """Run a step; return what the library does: 0, or another number for a wrong step."""
        steps = steps or Steps()
        rows = len(tokens)
        zeros = np.zeros(rows, np.int32)
        arrays = [
            np.ascontiguousarray(array, np.int32)
            for array in (
                tokens,
                zeros if steps.positions is None else steps.positions,
                zeros if steps.slots is None else steps.slots,
                zeros if steps.sampled is None else steps.sampled,
            )
        ]
        tables = [np.ascontiguousarray(s.table, np.int32) for s in steps.sequences]
        spans, row = [], 0
        for sequence, table in zip(steps.sequences, tables, strict=True):
            spans.append(Span(row, sequence.rows, table.ctypes.data))
            row += sequence.rows
        pools = (ctypes.c_void_p * max(1, len(steps.pools)))(*(p.ctypes.data for p in steps.pools))
        step = Step(
            rows, len(spans), len(logits) if steps.sampled is None else len(steps.sampled),
            steps.block_size, *(array.ctypes.data for array in arrays),
            (Span * max(1, len(spans)))(*spans), pools, logits.ctypes.data,
        )  # fmt: skip
        return int(self._library.mp_program_run(self.pointer, ctypes.byref(step)))


# Few are kept: a property tries many widths, and one of 8,192 has 268 MB.
@lru_cache(maxsize=2)
def identity(width: int) -> Matrix:
    return Matrix(Source.F32, width, width, np.eye(width, dtype=np.float32))


def compute(
    operations: Sequence[Operation],
    inputs: Mapping[int, Array],
    output: int,
    *,
    ropes: Sequence[Rope] = (),
    steps: Steps | None = None,
    before: Array | None = None,
) -> Array:
    """Run operations on buffers and return one of them, float32 [rows, width].

    `inputs` gives all buffers their first values, whose widths are multiples of 32; a product with
    the identity reads the result. With the output `LOGITS`, operations write the logits, which are
    `before`.
    """
    rows = len(next(iter(inputs.values())))
    widths = [0] * (max(inputs) + 1)
    run: list[Operation] = []
    for buffer, values in inputs.items():
        widths[buffer] = width = values.shape[1]
        matrix = Matrix(Source.F32, len(values), width, np.ascontiguousarray(values, np.float32))
        run.append(operation(Code.EMBED, output=buffer, matrix=[matrix]))
    run += operations
    if output != LOGITS:
        run.append(
            operation(Code.MULTIPLY, input=output, output=LOGITS, matrix=[identity(widths[output])])
        )
        sampled = rows if steps is None or steps.sampled is None else len(steps.sampled)
        before = np.full((sampled, widths[output]), np.nan, np.float32)
    assert before is not None
    logits = before.copy()
    program = Program(run, widths, rows=rows, columns=max(widths), ropes=ropes)
    assert program.run(np.arange(rows), logits, steps) == 0
    return logits


def random_rows(source: Source, rows: int, columns: int, seed: int) -> Array:
    """Return rows in the layout of a file: random numbers, or blocks of any bytes but in scales.

    Values are of a few units.
    """
    rng = np.random.default_rng(seed)
    if source in (Source.F32, Source.F32_AS_INT8):
        return rng.standard_normal((rows, columns), np.float32)
    if source is Source.F16:
        return rng.standard_normal((rows, columns), np.float32).astype(np.float16)
    if source is Source.BF16:
        return to_bfloat16(rng.standard_normal((rows, columns), np.float32))
    elements, size = GGML_QUANT_SIZES[GGMLQuantizationType[source.name]]
    blocks = rng.integers(0, 256, (rows, columns // elements, size), np.uint8)
    for at in SCALES[source]:
        scales = rng.uniform(-1, 1, (rows, columns // elements)) / (
            elements if elements > 32 else 8
        )
        scales = scales.astype(np.float16)
        blocks[..., at : at + 2] = scales[..., None].view(np.uint8)
    return blocks.reshape(rows, -1)


def decode(source: Source, data: Array) -> Array:
    """Return float32 [rows, columns] of rows in the layout of a file, as other programs read it."""
    if source in (Source.F32, Source.F32_AS_INT8, Source.F16):
        return data.astype(np.float32)
    if source is Source.BF16:
        return from_bfloat16(data)
    return dequantize(data, GGMLQuantizationType[source.name]).astype(np.float32)


def packed(source: Source, rows: int, columns: int, seed: int = 0) -> tuple[Matrix, Array]:
    """Return a matrix of random weights, and its values as the library reads them back."""
    matrix = Matrix(source, rows, columns, random_rows(source, rows, columns, seed))
    return matrix, np.stack([matrix.row(i) for i in range(rows)]).astype(np.float64)


def pack(model: Any) -> PackedWeights:
    """Return the weights of a model of mlx-lm for the library, also those in affine codes."""
    packed = PackedWeights()
    arrays = cast(list[tuple[str, mx.array]], tree_flatten(model.parameters()))
    stored = {name: _stored(array) for name, array in arrays}
    for path, module in model.named_modules():
        if "scales" in module:
            codes, scales, biases = (stored.pop(f"{path}.{part}") for part in AFFINE)
            shape = codes.shape[0], codes.shape[1] * 32 // module.bits
            affine = StoredAffine(module.bits, module.group_size, shape, codes, scales, biases)
            packed.add_stored(f"{path}.weight", affine)
    for name, array in stored.items():
        packed.add_stored(name, array)
    return packed


AFFINE = ("weight", "scales", "biases")


def _stored(array: mx.array) -> StoredArray:
    raw = np.array(mx.contiguous(array).reshape(-1).view(mx.uint8))
    return StoredArray(array.dtype, array.shape, raw)


def to_bfloat16(values: Array) -> Array:
    """Return bfloat16 as uint16, rounded to nearest even; values are finite."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def from_bfloat16(bits: Array) -> Array:
    return (bits.astype(np.uint32) << 16).view(np.float32)
