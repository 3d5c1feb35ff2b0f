"""Layers and embeddings whose weights keep the codes and scales of a block type: GGUF's, or FP4.

A row of whole blocks is held as words: a plane of the codes' low bits, one of their high bits, and
one of scales: bytes of a superblock's groups, and then its float16 factors. Rows are padded to 16
bytes. That takes at most 4 % more than the file in rows of 2,048 weights or more, and 6 % where
halves have factors.
`kernels/blocks.h` reads it; `models/planes.py` makes it.

Few rows are multiplied by kernels that read these words; for many, a layer's weights, those of all
experts, are computed in full for the time of its matmul.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache, lru_cache, partial

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import numpy.typing as npt

from modelpack_engine.kernels import launch, recording
from modelpack_engine.layers.kernels import take_rows

Words = npt.NDArray[np.uint32]

#: The values of IQ4_NL's and IQ4_XS's codes, and those of floats of 4 bits (OCP's E2M1).
_IQ4 = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
_FP4 = (0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6)
#: The weights of a superblock, whose groups have a byte of scale each.
SUPERBLOCK = 256
_ROW_BYTES = 16


@dataclass(frozen=True, slots=True)
class BlockType:
    """A block type: codes of `low` + `high` bits, in groups with a scale each.

    A code stands for (code - `zero`) * scale + offset, or with a `table`, for one of its values. If
    `scaled`, a scale is a superblock's factor times a byte. With `mins`, groups have offsets. With
    `exponent` bits, codes and scales are floats: there are no factors, and a scale is a byte with
    so many bits of exponent, 8 (OCP's E8M0) or 4 (E4M3).

    `shared` weights have the same factors in a `scaled` type: 128 if halves were reordered.
    """

    name: str
    low: int
    high: int
    group: int
    scaled: bool
    mins: bool
    zero: int
    table: tuple[float, ...] = ()
    exponent: int = 0
    shared: int = SUPERBLOCK

    @property
    def block(self) -> int:
        """The weights that share factors; of floats, those whose scales are read at once."""
        return 32 if self.exponent else self.shared if self.scaled else self.group

    @property
    def least(self) -> int:
        """The weights of which a row is a multiple: a block of the file, or a superblock."""
        return 32 if self.exponent else SUPERBLOCK if self.scaled else self.group

    @property
    def factors(self) -> int:
        """The factors of a block: that of scales, and with `mins` that of offsets."""
        return 0 if self.exponent else 2 if self.mins else 1

    @property
    def group_bytes(self) -> int:
        """The bytes of scales and offsets of 32 weights; Q2_K has both in one byte."""
        return (2 if self.group == 16 or self.mins else 1) if self.scaled else 0

    @property
    def scale_bytes(self) -> int:
        """The bytes of a superblock's scales, and of its factors after them."""
        return SUPERBLOCK // 32 * self.group_bytes + SUPERBLOCK // self.block * self.factors * 2

    @property
    def halved(self) -> BlockType:
        """The type with factors for each half of a superblock, so that halves can be reordered."""
        return replace(self, shared=SUPERBLOCK // 2) if self.block == SUPERBLOCK else self

    def words(self, inputs: int) -> int:
        """Return the words of a row of so many weights."""
        return -(-self._bytes(inputs) // _ROW_BYTES) * _ROW_BYTES // 4

    def inputs(self, words: int) -> int:
        """Return the weights of a row of so many words: the padding is less than a block."""
        found = words * 4 // self._bytes(self.least) * self.least
        assert self.words(found) == words, "a row has whole blocks"
        return found

    def _bytes(self, inputs: int) -> int:
        codes = inputs * (self.low + self.high) // 8
        return codes + inputs * self.scale_bytes // SUPERBLOCK

    @property
    def constants(self) -> list[tuple[str, int | bool]]:
        """The template arguments of the kernels."""
        return [
            ("LOW", self.low), ("HIGH", self.high), ("GROUP", self.group), ("BLOCK", self.block),
            ("SCALED", self.scaled), ("MINS", self.mins), ("ZERO", self.zero),
            ("TABLE", self.table == _IQ4), ("EXPONENT", self.exponent),
        ]  # fmt: skip


BLOCK_TYPES: dict[str, BlockType] = {
    kind.name: kind
    for kind in (
        BlockType("Q2_K", 2, 0, 16, scaled=True, mins=True, zero=0),
        BlockType("Q3_K", 2, 1, 16, scaled=True, mins=False, zero=4),
        BlockType("Q4_K", 4, 0, 32, scaled=True, mins=True, zero=0),
        BlockType("Q5_K", 4, 1, 32, scaled=True, mins=True, zero=0),
        BlockType("Q6_K", 4, 2, 16, scaled=True, mins=False, zero=32),
        BlockType("Q4_0", 4, 0, 32, scaled=False, mins=False, zero=8),
        BlockType("Q4_1", 4, 0, 32, scaled=False, mins=True, zero=0),
        BlockType("Q5_0", 4, 1, 32, scaled=False, mins=False, zero=16),
        BlockType("Q5_1", 4, 1, 32, scaled=False, mins=True, zero=0),
        BlockType("IQ4_NL", 4, 0, 32, scaled=False, mins=False, zero=0, table=_IQ4),
        BlockType("IQ4_XS", 4, 0, 32, scaled=True, mins=False, zero=0, table=_IQ4),
        BlockType("MXFP4", 4, 0, 32, scaled=True, mins=False, zero=0, table=_FP4, exponent=8),
        BlockType("NVFP4", 4, 0, 16, scaled=True, mins=False, zero=0, table=_FP4, exponent=4),
    )
}


class BlockLinear(nn.Module):  # type: ignore[misc]  # MLX has no types here
    """A linear layer with weights [outputs, words] of a block type."""

    def __init__(
        self, kind: BlockType, inputs: int, outputs: int, dtype: mx.Dtype, *, bias: bool = False
    ) -> None:
        super().__init__()
        self.kind, self.dtype = kind, dtype
        self.weight = mx.zeros((outputs, kind.words(inputs)), mx.uint32)
        if bias:
            self.bias = mx.zeros((outputs,), dtype)

    def __call__(self, x: mx.array) -> mx.array:
        rows = x.reshape(-1, x.shape[-1])
        product = multiply(rows, self.weight, self.kind, self.get("bias"))
        return product.reshape(*x.shape[:-1], -1)


class BlockEmbedding(nn.Module):  # type: ignore[misc]  # MLX has no types here
    """An embedding with weights [tokens, words] of a block type, whose rows have type `dtype`."""

    def __init__(self, kind: BlockType, dims: int, tokens: int, dtype: mx.Dtype) -> None:
        super().__init__()
        self.kind, self.dtype = kind, dtype
        self.weight = mx.zeros((tokens, kind.words(dims)), mx.uint32)

    def __call__(self, x: mx.array) -> mx.array:
        ids = x.reshape(-1)
        # MLX takes two seconds to compile a gather on CUDA.
        by_kernel = launch.backend() == "cuda" and ids.dtype == mx.int32
        rows = take_rows(self.weight, ids) if by_kernel else mx.take(self.weight, ids, axis=0)
        return values(rows, self.kind, self.dtype).reshape(*x.shape, -1)

    def as_linear(self, x: mx.array) -> mx.array:
        """Multiply by the table, as a head does."""
        rows = x.reshape(-1, x.shape[-1])
        return multiply(rows, self.weight, self.kind).reshape(*x.shape[:-1], -1)


class BlockSwitchLinear(nn.Module):  # type: ignore[misc]  # MLX has no types here
    """The linear layers of experts, with weights [experts, outputs, words] of a block type."""

    def __init__(
        self,
        kind: BlockType,
        inputs: int,
        outputs: int,
        experts: int,
        dtype: mx.Dtype,
        *,
        bias: bool = False,
    ) -> None:
        super().__init__()
        self.kind, self.dtype = kind, dtype
        self.weight = mx.zeros((experts, outputs, kind.words(inputs)), mx.uint32)
        if bias:
            self.bias = mx.zeros((experts, outputs), dtype)

    def __call__(self, x: mx.array, indices: mx.array, sorted_indices: bool = False) -> mx.array:
        """Multiply rows x [..., 1, inputs] by the weights of their experts."""
        bias, experts = self.get("bias"), self.weight.shape[0]
        given = _rows_of_experts(x, indices)
        if (
            given is not None
            and indices.size <= MOST_PAIRS * experts
            and launch.backend() != "none"
            and x.dtype in _TOLERANCES
            and (bias is None or bias.dtype == x.dtype)
            and experts_verdict(x.dtype, self.kind, bias is not None) is None
        ):
            chosen = indices.reshape(-1).astype(mx.uint32)
            found = run_dots(given, self.weight, self.kind, bias, chosen)
            return found.reshape(*indices.shape, 1, -1)
        full = layer_values(self, x.dtype).swapaxes(-1, -2)
        found = mx.gather_mm(x, full, rhs_indices=indices, sorted_indices=sorted_indices)
        return found if bias is None else found + mx.expand_dims(bias[indices], -2)

    def of_spans(
        self, x: mx.array, spans: mx.array, rows: int, source: mx.array | None = None
    ) -> mx.array | None:
        """Return rows sorted by expert times their weights; None if no kernel does that.

        `spans`, of at most `rows` rows each, and `source` are those of `run_tiles`.
        """
        bias, tile = self.get("bias"), next((tile for tile in TILES if tile.rows >= rows), None)
        pairs = x.shape[0] if source is None else source.size
        if (
            tile is None
            or pairs > MOST_ROWS * self.weight.shape[0]
            or not _has_tensor_cores()
            or x.dtype not in (mx.float16, mx.bfloat16)
            or (bias is not None and bias.dtype != x.dtype)
            or spans_verdict(x.dtype, self.kind, tile, bias is not None) is not None
        ):
            return None
        return run_tiles(x, self.weight, self.kind, tile, bias, spans, source)


def _rows_of_experts(x: mx.array, indices: mx.array) -> mx.array | None:
    """Return the rows of x [..., 1, inputs], of which each has as many of `indices`, in order.

    None if rows and experts are paired in another way.
    """
    *outer, one, inputs = x.shape
    if one != 1 or tuple(outer) not in (indices.shape, (*indices.shape[:-1], 1)):
        return None
    return x.reshape(-1, inputs)


def layer_of(
    kind: BlockType, shape: Sequence[int], dtype: mx.Dtype, *, embedding: bool, bias: bool
) -> BlockLinear | BlockEmbedding | BlockSwitchLinear:
    """Return a layer for weights [outputs, inputs], or those of experts."""
    *experts, rows, inputs = shape
    if embedding:
        return BlockEmbedding(kind, inputs, rows, dtype)
    if experts:
        return BlockSwitchLinear(kind, inputs, rows, experts[0], dtype, bias=bias)
    return BlockLinear(kind, inputs, rows, dtype, bias=bias)


#: The layers that hold a block type.
BLOCK_LAYERS = (BlockLinear, BlockEmbedding, BlockSwitchLinear)


def layer_values(
    layer: BlockLinear | BlockEmbedding | BlockSwitchLinear, dtype: mx.Dtype
) -> mx.array:
    """Return the weights of a layer in a type of floats: [..., outputs, inputs]."""
    weight = layer.weight
    found = values(weight.reshape(-1, weight.shape[-1]), layer.kind, dtype)
    return found.reshape(*weight.shape[:-1], -1)


@dataclass(frozen=True, slots=True)
class Tile:
    """A block on tensor cores: its rows, its warps, which share the inputs, and their loads."""

    rows: int
    warps: int
    ahead: int


#: The most rows for the dot products and for the tensor cores. More rows dequantise the weights.
#: 64 are the rows of the largest tile; 16 are chosen without a measurement.
FEW_ROWS, MOST_ROWS = 16, 64
#: The most pairs of row and expert for the dot products, as a multiple of the experts: each pair
#: reads its expert's weights. Computing all weights in full reads and writes about six times their
#: bytes. That is computed, not measured.
MOST_PAIRS = 4
TILES = (Tile(8, 16, 1), Tile(32, 4, 2), Tile(64, 2, 1))
#: The one for up to 8 rows and at least so many outputs: more blocks need fewer warps each.
MANY_OUTPUTS, TILE_OF_MANY = 6144, Tile(8, 8, 1)
#: Simdgroups of a threadgroup, outputs of a simdgroup, loads of a lane that wait together.
_SIMDGROUPS, _LINES, _AHEAD = 4, 2, 2


def multiply(
    x: mx.array, weight: mx.array, kind: BlockType, bias: mx.array | None = None
) -> mx.array:
    """Return rows x [rows, inputs] times the weights [outputs, words]: [rows, outputs]."""
    rows = x.shape[0]
    if bias is not None and bias.dtype != x.dtype:
        recording.refuse(f"adds a bias in {bias.dtype}")
        return multiply(x, weight, kind) + bias
    if launch.backend() != "none" and x.dtype in _TOLERANCES:
        if rows <= MOST_ROWS and x.dtype != mx.float32 and _has_tensor_cores():
            tile = tile_for(rows, weight.shape[0])
            if tiles_verdict(x.dtype, kind, tile, bias is not None) is None:
                return run_tiles(x, weight, kind, tile, bias)
        if rows <= FEW_ROWS and verdict(x.dtype, kind, _together(rows), bias is not None) is None:
            return run_dots(x, weight, kind, bias)
    return recording.multiply_dequantised(x, partial(values, weight, kind, x.dtype), bias)


def most_rows() -> int:
    """Return the most rows that are multiplied without the values of all weights in memory."""
    if launch.backend() == "none":
        return 0
    return MOST_ROWS if _has_tensor_cores() else FEW_ROWS


def tile_for(rows: int, outputs: int) -> Tile:
    """Return the smallest tile that holds so many rows, or the largest."""
    if rows <= TILE_OF_MANY.rows and outputs >= MANY_OUTPUTS:
        return TILE_OF_MANY
    return next((tile for tile in TILES if tile.rows >= rows), TILES[-1])


#: The types of rows, and by how much of the largest product kernels may differ from float32.
_TOLERANCES = {mx.float16: 3e-3, mx.bfloat16: 2e-2, mx.float32: 1e-4}


def values(weight: mx.array, kind: BlockType, dtype: mx.Dtype) -> mx.array:
    """Return the values of weights [rows, words] in a type of floats: [rows, inputs]."""
    if launch.backend() == "none" or values_verdict(dtype, kind) is not None:
        return computed_values(weight, kind, dtype)
    return run_values(weight, kind, dtype)


def _has_tensor_cores() -> bool:
    """Return whether the GPU has the instructions of the kernel `block_tiles`."""
    return launch.backend() == "cuda" and _compute_capability() >= 9


@cache
def _compute_capability() -> int:
    return int(mx.device_info()["compute_capability_major"])


def computed_values(weight: mx.array, kind: BlockType, dtype: mx.Dtype) -> mx.array:
    """Return what `values` does, by MLX's functions: on a CPU, and to compare kernels with."""
    rows, inputs = weight.shape[0], kind.inputs(weight.shape[1])
    highs = inputs // 32 * kind.low
    factors = highs + inputs // 32 * kind.high
    codes = (
        _codes_of_floats(weight[:, :highs])
        if kind.exponent
        else _codes(weight[:, :highs], kind.low)
    )
    if kind.high:
        codes = codes | _codes(weight[:, highs:factors], kind.high) << kind.low
    numbers = mx.array(kind.table, mx.float32)[codes] if kind.table else _signed(codes, kind.zero)
    blocks = inputs // kind.block
    rest = weight[:, factors:].view(mx.uint8)[:, : inputs * kind.scale_bytes // SUPERBLOCK]
    given = rest
    if kind.scaled and kind.factors:
        given, rest = mx.split(
            rest.reshape(rows, -1, kind.scale_bytes), [SUPERBLOCK // 32 * kind.group_bytes], axis=2
        )
    scales = offsets = mx.ones((rows, blocks, 1))
    if kind.factors:
        halves = mx.contiguous(rest).view(mx.float16).astype(mx.float32)
        of_blocks = halves.reshape(rows, blocks, kind.factors, 1)
        scales, offsets = of_blocks[:, :, 0], of_blocks[:, :, -1]
    if kind.scaled:
        given = given.reshape(rows, blocks, -1)
        if kind.mins and kind.group == 16:
            scales, offsets = scales * (given & 15), offsets * (given >> 4)
        elif kind.mins:
            scales, offsets = scales * given[:, :, ::2], offsets * given[:, :, 1::2]
        elif kind.exponent:
            scales = _powers(given) if kind.exponent == 8 else _small_floats(given)
        else:
            scales = scales * given.view(mx.int8)
    found = numbers.reshape(rows, -1, kind.group) * scales.reshape(rows, -1, 1)
    if kind.mins:
        found = found + offsets.reshape(rows, -1, 1)
    in_order = mx.take(found.reshape(rows, inputs // 8, 8), order_of_eights(inputs), axis=1)
    return in_order.reshape(rows, inputs).astype(dtype)


@lru_cache(maxsize=16)
def order_of_eights(inputs: int) -> mx.array:
    """Return the place in words of each eight weights of a row (`eight` in kernels/blocks.h)."""
    units, places = np.divmod(np.arange(inputs // 8), 4)
    return mx.array(units * 4 + (places ^ units // 2 % 4))


#: Where the exponent and mantissa of the first float of each pair of an eight are, and its sign:
#: most are a bfloat16's bits, once they are shifted (`place` and `sign` in kernels/blocks.h).
PLACES_OF_FLOATS = ((6, 15), (3, 12), (0, 14), (9, 13))


def bit_of_pair(bits: int, pair: int) -> int:
    """Return where the code of the first weight of a pair is (`bit` in kernels/blocks.h)."""
    return (pair // 2 % 2 * (8 // bits) + pair // 4 % (4 // bits) * 2 + pair % 2) * bits


def _codes(plane: mx.array, bits: int) -> mx.array:
    """Return the codes of a plane [rows, words]: [rows, codes]."""
    shifts = mx.array(
        [bit_of_pair(bits, i // 2) + i % 2 * 16 for i in range(32 // bits)], mx.uint32
    )
    codes = (plane[:, :, None] >> shifts) & ((1 << bits) - 1)
    return codes.reshape(plane.shape[0], -1)


def _codes_of_floats(plane: mx.array) -> mx.array:
    """Return the codes of a plane of floats [rows, words]: [rows, codes]."""
    at, signs = (
        [place[i] + half for place in PLACES_OF_FLOATS for half in (0, 16)] for i in (0, 1)
    )
    words = plane[:, :, None]
    codes = words >> mx.array(at, mx.uint32) & 7 | (words >> mx.array(signs, mx.uint32) & 1) << 3
    return codes.reshape(plane.shape[0], -1)


def _powers(exponents: mx.array) -> mx.array:
    """Return 2 to the power of each byte - 127 in float32."""
    given = exponents.astype(mx.uint32)
    return mx.where(given > 0, given << 23, mx.array(0x400000, mx.uint32)).view(mx.float32)


def _small_floats(given: mx.array) -> mx.array:
    """Return bytes, which are floats with 4 bits of exponent and 3 of mantissa, in float32."""
    magnitudes = given.astype(mx.uint32) & 127
    normal = ((magnitudes << 20) + (120 << 23)).view(mx.float32)
    found = mx.where(magnitudes < 8, magnitudes / 512, normal)
    return mx.where(given > 127, -found, found)


def _signed(codes: mx.array, zero: int) -> mx.array:
    return codes.astype(mx.float32) - zero


def run_dots(
    x: mx.array,
    weight: mx.array,
    kind: BlockType,
    bias: mx.array | None = None,
    chosen: mx.array | None = None,
    *,
    lines: int = _LINES,
    ahead: int = _AHEAD,
    simdgroups: int = _SIMDGROUPS,
) -> mx.array:
    """Return rows x times the weights by dot products; a simdgroup computes `lines` outputs.

    With `chosen`, uint32 [rows * each], weights are those of experts, and each row has several: the
    result is [rows * each, outputs].
    """
    rows, outputs = x.shape[0], weight.shape[-2]
    each, together = 0, _together(rows)
    if chosen is not None:
        each, together, rows = chosen.size // rows, 1, chosen.size
    inputs, on = [x, weight, bias if bias is not None else x], launch.backend()
    inputs.append(weight if chosen is None else chosen)
    across = -(-outputs // (lines * simdgroups))
    constants = [
        *kind.constants, ("BIAS", bias is not None), ("ROWS", together), ("LINES", lines),
        ("NSG", simdgroups), ("AHEAD", ahead), ("EACH", each),
    ]  # fmt: skip
    (out,) = launch.kernel("block_dots", on)(
        inputs=inputs,
        template=launch.template(_types(x.dtype), constants, inputs, on),
        grid=(across * simdgroups * 32, -(-rows // together), 1),
        threadgroup=(simdgroups * 32, 1, 1),
        output_shapes=[(rows, outputs)],
        output_dtypes=[x.dtype],
    )
    return out


def _together(rows: int) -> int:
    """Return how many rows a simdgroup multiplies, of those that kernels are compiled for."""
    return next(size for size in (1, 2, 4, 8) if size >= min(rows, 8))


def run_tiles(
    x: mx.array,
    weight: mx.array,
    kind: BlockType,
    tile: Tile,
    bias: mx.array | None = None,
    spans: mx.array | None = None,
    source: mx.array | None = None,
) -> mx.array:
    """Return rows x times the weights by tensor cores.

    With `spans`, int32 [blocks, 3], weights are those of experts, and rows are sorted by expert: a
    block has an expert, its first row, and the number of its rows. With `source`, int32 [rows],
    these are rows of x by index.
    """
    rows, outputs = x.shape[0] if source is None else source.size, weight.shape[-2]
    blocks = -(-rows // tile.rows) if spans is None else spans.shape[0]
    (out,) = launch.run_on_cuda(
        "block_tiles",
        {"x": x, "weight": weight, "bias": bias, "source": source, "spans": spans},
        template=[
            *_types(x.dtype), *kind.constants, ("BIAS", bias is not None),
            ("TILES", tile.rows // 8), ("WARPS", tile.warps), ("AHEAD", tile.ahead),
            ("EXPERTS", spans is not None), ("GATHER", source is not None),
        ],
        grid=(-(-outputs // 16) * tile.warps * 32, blocks, 1),
        threadgroup=(tile.warps * 32, 1, 1),
        output_shapes=[(rows, outputs)],
        output_dtypes=[x.dtype],
    )  # fmt: skip
    return out


def run_values(weight: mx.array, kind: BlockType, dtype: mx.Dtype) -> mx.array:
    """Return the values of weights by our kernel."""
    rows, inputs, threads = weight.shape[0], kind.inputs(weight.shape[1]), _SIMDGROUPS * 32
    (out,) = launch.run(
        "block_values",
        [weight],
        [("T", dtype), ("H", mx.float16)],
        [*kind.constants, ("NSG", _SIMDGROUPS)],
        threads=rows * -(-inputs // 8 // threads) * threads,
        group=threads,
        shapes=[(rows, inputs)],
        dtypes=[dtype],
    )
    return out


def _types(dtype: mx.Dtype) -> list[tuple[str, mx.Dtype]]:
    return [("T", dtype), ("O", dtype), ("H", mx.float16)]


def random_words(kind: BlockType, outputs: int, inputs: int, seed: int = 0) -> Words:
    """Return random weights of a type: any codes and scales, of 0.03 or so. For tests."""
    random = np.random.default_rng(seed)
    words = random.integers(0, 1 << 32, (outputs, kind.words(inputs)), dtype=np.uint32)
    count = inputs // kind.block * kind.factors
    code = 64 if kind.table else 1 << (kind.low + kind.high - 2)
    number = 1 if not kind.scaled else 8 if kind.mins and kind.group == 16 else 64
    small = random.uniform(-1, 1, (outputs, count)) * (0.06 / code / number)
    numbers = words[:, inputs // 32 * (kind.low + kind.high) :]
    if kind.mins and kind.group == 32:  # numbers of 6 bits
        numbers &= 0x3F3F3F3F
    if kind.exponent == 8:  # scales of 2 ** -15 to 2 ** -8
        numbers &= 0x07070707
        numbers |= 0x70707070
    elif kind.exponent:  # of 2 ** -9 to 2 ** -4 or so, some of them negative
        numbers &= 0x9F9F9F9F
    scales = words.view(np.uint8)[:, inputs // 8 * (kind.low + kind.high) :]
    halves = small.astype(np.float16).view(np.uint8)
    size, own = kind.scale_bytes, SUPERBLOCK // kind.block * kind.factors * 2
    for superblock in range(-(-inputs // SUPERBLOCK)):
        some = halves[:, superblock * own : (superblock + 1) * own]
        at = (superblock + 1) * size - own
        scales[:, at : at + some.shape[1]] = some
    return words


def _inputs(kind: BlockType, most: int) -> int:
    """Return how many weights a row of a test has: no multiple of 256, if the type allows it."""
    return most if kind.least == SUPERBLOCK else most - 3 * kind.least


def _compare_values(dtype: mx.Dtype, kind: BlockType) -> str | None:
    weight = mx.array(random_words(kind, 5, _inputs(kind, 768)))
    pair = run_values(weight, kind, dtype), computed_values(weight, kind, dtype)
    tolerance = 1e-6 if dtype == mx.float32 else 2e-3
    return launch.difference({f"the values of {kind.name}": pair}, tolerance)


def _case(
    dtype: mx.Dtype, kind: BlockType, rows: int, biased: bool
) -> tuple[mx.array, mx.array, mx.array | None, mx.array]:
    """Return rows, weights, maybe a bias, and what their product should be.

    Some warps of the largest blocks multiply two chunks of inputs.
    """
    inputs = _inputs(kind, 2560)
    weight = mx.array(random_words(kind, 43, inputs))
    full = computed_values(weight, kind, mx.float32)
    x = mx.random.normal((rows, inputs), key=mx.random.key(rows)).astype(dtype)
    expected = _product(x, full)
    if not biased:
        return x, weight, None, expected
    bias = (mx.arange(43) / 16 - 1).astype(dtype)
    return x, weight, bias, expected + bias


def _product(x: mx.array, full: mx.array) -> mx.array:
    """Return rows x [rows, in] times weights [out, in], or each row's own [rows, out, in].

    Not by a matmul: MLX rounds those of float32 to TF32 on CUDA, which has ten bits.
    """
    return (x.astype(mx.float32)[:, None] * full).sum(axis=-1)


def _problem(found: mx.array, expected: mx.array, dtype: mx.Dtype) -> str | None:
    largest = mx.abs(expected).max()
    pair = found.astype(mx.float32) / largest, expected / largest
    return launch.difference({f"the product of {found.shape[0]} rows": pair}, _TOLERANCES[dtype])


def _compare(dtype: mx.Dtype, kind: BlockType, rows: int, biased: bool = True) -> str | None:
    x, weight, bias, expected = _case(dtype, kind, rows, biased)
    return _problem(run_dots(x, weight, kind, bias), expected, dtype)


def _compare_tiles(dtype: mx.Dtype, kind: BlockType, tile: Tile, biased: bool = True) -> str | None:
    x, weight, bias, expected = _case(dtype, kind, tile.rows + 3, biased)
    return _problem(run_tiles(x, weight, kind, tile, bias), expected, dtype)


def _compare_experts(dtype: mx.Dtype, kind: BlockType, biased: bool) -> str | None:
    experts, outputs, inputs, rows, each = 3, 19, _inputs(kind, 512), 4, 2
    words = random_words(kind, experts * outputs, inputs)
    weight = mx.array(words).reshape(experts, outputs, -1)
    full = computed_values(mx.array(words), kind, mx.float32).reshape(experts, outputs, inputs)
    x = mx.random.normal((rows, inputs), key=mx.random.key(31)).astype(dtype)
    chosen = mx.array([2, 0, 1, 1, 0, 2, 2, 1], mx.uint32)
    bias = (mx.arange(experts * outputs).reshape(experts, -1) / 16 - 1).astype(dtype)
    wide = mx.repeat(x, each, axis=0)
    expected = _product(wide, full[chosen]) + (bias[chosen] if biased else 0)
    found = run_dots(x, weight, kind, bias if biased else None, chosen)
    return _problem(found, expected, dtype)


def _compare_spans(dtype: mx.Dtype, kind: BlockType, tile: Tile, biased: bool) -> str | None:
    experts, outputs, inputs, count = 3, 19, _inputs(kind, 512), tile.rows + 3
    words = mx.array(random_words(kind, experts * outputs, inputs))
    full = computed_values(words, kind, mx.float32).reshape(experts, outputs, inputs)
    x = mx.random.normal((count, inputs), key=mx.random.key(32)).astype(dtype)
    # The first rows are those of expert 2, one is that of expert 0, and some are in the next span.
    spans = mx.array([[2, 0, tile.rows], [0, tile.rows, 1], [1, 0, 0], [2, tile.rows + 1, 2]])
    chosen = mx.array([2] * tile.rows + [0, 2, 2])
    source = (mx.arange(count) * 7 % count).astype(mx.int32)
    offsets = (mx.arange(experts * outputs).reshape(experts, -1) / 16 - 1).astype(dtype)
    bias = offsets if biased else None
    weight = words.reshape(experts, outputs, -1)
    for rows in (source, None):
        expected = _product(x if rows is None else x[rows], full[chosen])
        expected = expected + offsets[chosen] if biased else expected
        found = run_tiles(x, weight, kind, tile, bias, spans.astype(mx.int32), rows)
        if problem := _problem(found, expected, dtype):
            return problem
    return None


#: None if a kernel computes as MLX's functions do, for types of floats and blocks, a number of
#: rows, and with a bias or without; otherwise the problem.
verdict, values_verdict = launch.Verdict(_compare), launch.Verdict(_compare_values)
tiles_verdict, experts_verdict = launch.Verdict(_compare_tiles), launch.Verdict(_compare_experts)
spans_verdict = launch.Verdict(_compare_spans)
