"""The block types of ggml, as numbers or as MLX's packed words.

Most types are affine: a block of 32 codes q stands for `scale * q + bias`. Those go to MLX's
affine quantisation with groups of 32 without any loss, since a float16 times a small integer is
exact in float32; the same product makes `dense` equal to ggml's own dequantisation bit for bit.
The others have groups of 16 or codebooks and are dequantised by `gguf.quants`.

`mx.load` is not used for GGUF: its values of Q4_K are wrong, it leaves out MXFP4 tensors, and it
returns float16 scales, which are very slow on a CPU.

Source: ggml/src/ggml-quants.c; the layout of MLX: mlx/backend/cpu/quantized.cpp.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from modelpack_engine.errors import ModelLoadError
from modelpack_engine.models.gguf_file import Bytes, GGUFTensor

Floats = npt.NDArray[np.float32]
Words = npt.NDArray[np.uint32]

GROUP_SIZE = 32

_ONE, _FOUR, _LOW = np.uint8(1), np.uint8(4), np.uint8(0x0F)
_BIT_NUMBERS = np.arange(32, dtype=np.uint32)


@dataclass(frozen=True, slots=True)
class AffineBlocks:
    """Codes uint8 [blocks, 32] below 2^bits; scales and biases float32 [blocks]."""

    bits: int
    codes: Bytes
    scales: Floats
    biases: Floats

    def dense(self) -> Floats:
        """Return scale * code + bias, [blocks, 32]."""
        values = self.codes.astype(np.float32)
        with np.errstate(invalid="ignore"):
            values *= self.scales[:, None]
            values += self.biases[:, None]
        return values

    def words(self) -> Words:
        """Return the codes as a stream of bits, lowest first, in words: [blocks, bits]."""
        codes = self.codes
        if self.bits == 8:
            return codes.view(np.uint32)
        if self.bits == 4:
            return _pairs(codes)
        # Eight codes of five bits are five bytes.
        eights = codes.reshape(-1, 8)
        packed = np.zeros(len(eights), np.uint64)
        for at in range(8):
            packed |= eights[:, at].astype(np.uint64) << np.uint64(self.bits * at)
        stream = packed.view(np.uint8).reshape(-1, 8)[:, : self.bits]
        return stream.reshape(-1).view(np.uint32).reshape(len(codes), self.bits)


def affine_blocks(tensor: GGUFTensor) -> AffineBlocks | None:
    """Return the tensor as affine blocks, or None if its type is not affine.

    None too if its columns are reordered by parts that are not whole groups.
    """
    found = _affine(tensor)
    if found is None or tensor.columns is None:
        return found
    if tensor.shape[-1] // len(tensor.columns) % GROUP_SIZE:
        return None
    parts = (in_order(tensor, part) for part in (found.codes, found.scales, found.biases))
    return AffineBlocks(found.bits, *parts)


def in_order(tensor: GGUFTensor, stored: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Return codes, scales or values of a tensor in the order of its columns, in their shape."""
    if tensor.columns is None:
        return stored
    return reordered(stored, int(np.prod(tensor.shape[:-1], dtype=np.int64)), tensor.columns)


def reordered(stored: npt.NDArray[Any], rows: int, columns: tuple[int, ...]) -> npt.NDArray[Any]:
    """Reorder the equal parts of rows: part i becomes the stored part `columns[i]`."""
    parts = stored.reshape(rows, len(columns), stored.size // (rows * len(columns)))
    return parts[:, columns].reshape(stored.shape)


def _affine(tensor: GGUFTensor) -> AffineBlocks | None:
    found = _AFFINE.get(tensor.dtype)
    if found is None:
        return None
    size, _, decode = found
    with np.errstate(invalid="ignore"):  # a damaged file may hold infinite scales
        return decode(tensor.raw.reshape(-1, size))


def widened(tensor: GGUFTensor) -> GGUFTensor:
    """Return a tensor of Q4_K as Q5_K: the same codes and scales, and fifth bits that are 0."""
    blocks = tensor.raw.reshape(-1, _AFFINE["Q4_K"][0])
    fifth = np.zeros((len(blocks), 32), np.uint8)
    raw = np.concatenate([blocks[:, :16], fifth, blocks[:, 16:]], axis=1)
    return replace(tensor, dtype="Q5_K", raw=raw.reshape(-1))


def affine_bits(dtype: str) -> int | None:
    """Return the bits per code of a type that is repacked without loss, else None."""
    return _AFFINE[dtype][1] if dtype in _AFFINE else None


def is_float(dtype: str) -> bool:
    """Return whether the type is a plain float, which needs no dequantisation."""
    return dtype in _FLOATS


def as_stored(tensor: GGUFTensor) -> npt.NDArray[Any]:
    """Return a tensor of plain floats in the type of the file; uint16 for BF16."""
    return in_order(tensor, tensor.raw.view(_STORED[tensor.dtype]).reshape(tensor.shape))


def dense(tensor: GGUFTensor) -> Floats:
    """Return the tensor as float32 in its shape; raise `ModelLoadError` for unsupported types."""
    blocks = _affine(tensor)
    if blocks is not None:
        values = blocks.dense()
    elif tensor.dtype in _FLOATS:
        values = _FLOATS[tensor.dtype](tensor.raw)
    elif tensor.dtype in _DEQUANTIZED:
        values = _by_gguf(tensor)
    else:
        raise ModelLoadError(
            f"the tensor {tensor.name!r} has the type {tensor.dtype}, which is not supported",
            hint="quantise the model again, to Q4_K_M or Q8_0 for example",
        )
    return in_order(tensor, values.reshape(tensor.shape))


def mxfp4_blocks(tensor: GGUFTensor) -> tuple[Words, Bytes]:
    """Return an MXFP4 tensor in MLX's layout: words [blocks, 4], exponents [blocks]."""
    blocks = tensor.raw.reshape(-1, 17)
    codes = in_order(tensor, _nibbles(blocks[:, 1:]))
    return _pairs(codes), np.ascontiguousarray(in_order(tensor, blocks[:, 0]))


def _by_gguf(tensor: GGUFTensor) -> Floats:
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize

    kind = GGMLQuantizationType[tensor.dtype]
    rows = tensor.raw.reshape(int(np.prod(tensor.shape[:-1], dtype=np.int64)), -1)
    values: Floats = dequantize(rows, kind)
    return values


def _pairs(codes: Bytes) -> Words:
    """Pack two 4-bit codes per byte, the first in the low half; return the bytes as words."""
    packed = codes[:, ::2] | (codes[:, 1::2] << _FOUR)
    return packed.view(np.uint32)


def _halves(blocks: Bytes, start: int) -> Floats:
    """Return the float16 at byte `start` of every block."""
    return np.ascontiguousarray(blocks[:, start : start + 2]).view(np.float16)[:, 0].astype("f4")


def _nibbles(packed: Bytes) -> Bytes:
    """Unpack n bytes to 2n codes of 4 bits: all low halves, then all high halves."""
    blocks, size = packed.shape
    codes = np.empty((blocks, 2 * size), np.uint8)
    np.bitwise_and(packed, _LOW, out=codes[:, :size])
    np.right_shift(packed, _FOUR, out=codes[:, size:])
    return codes


def _fifth_bits(packed: Bytes) -> Bytes:
    """Unpack 4 bytes to the top bits (bit 4) of 32 codes."""
    words = np.ascontiguousarray(packed).view(np.uint32)
    return ((words >> _BIT_NUMBERS).astype(np.uint8) & _ONE) << _FOUR


def _q4_0(blocks: Bytes) -> AffineBlocks:
    scales = _halves(blocks, 0)
    return AffineBlocks(4, _nibbles(blocks[:, 2:]), scales, -8 * scales)


def _q4_1(blocks: Bytes) -> AffineBlocks:
    return AffineBlocks(4, _nibbles(blocks[:, 4:]), _halves(blocks, 0), _halves(blocks, 2))


def _q5_0(blocks: Bytes) -> AffineBlocks:
    scales = _halves(blocks, 0)
    codes = _nibbles(blocks[:, 6:]) | _fifth_bits(blocks[:, 2:6])
    return AffineBlocks(5, codes, scales, -16 * scales)


def _q5_1(blocks: Bytes) -> AffineBlocks:
    codes = _nibbles(blocks[:, 8:]) | _fifth_bits(blocks[:, 4:8])
    return AffineBlocks(5, codes, _halves(blocks, 0), _halves(blocks, 2))


def _q8_0(blocks: Bytes) -> AffineBlocks:
    scales = _halves(blocks, 0)
    return AffineBlocks(8, blocks[:, 2:] ^ np.uint8(0x80), scales, -128 * scales)


def _k_scales(blocks: Bytes) -> tuple[Floats, Floats]:
    """Return the scales and biases of the 8 groups in each superblock, flattened."""
    packed = blocks[:, 4:16]
    low, middle, high = packed[:, 0:4], packed[:, 4:8], packed[:, 8:12]
    scales = np.concatenate([low & 0x3F, (high & 0x0F) | ((low >> 2) & 0x30)], axis=1)
    minimums = np.concatenate([middle & 0x3F, (high >> 4) | ((middle >> 2) & 0x30)], axis=1)
    return (
        (_halves(blocks, 0)[:, None] * scales).reshape(-1),
        (-_halves(blocks, 2)[:, None] * minimums).reshape(-1),
    )


def _k_codes(packed: Bytes) -> Bytes:
    """Return the 4-bit codes of a superblock as 8 groups: [blocks, 8, 32]."""
    pairs = packed.reshape(-1, 4, 1, 32) >> np.array([0, 4], np.uint8)[:, None]
    return (pairs & _LOW).reshape(-1, 8, 32)


def _q4_k(blocks: Bytes) -> AffineBlocks:
    codes = _k_codes(blocks[:, 16:])
    return AffineBlocks(4, codes.reshape(-1, 32), *_k_scales(blocks))


def _q5_k(blocks: Bytes) -> AffineBlocks:
    # Byte i of `high` has bit 4 of the i-th code of all groups.
    high = blocks[:, 16:48].reshape(-1, 1, 32) >> np.arange(8, dtype=np.uint8)[:, None]
    codes = _k_codes(blocks[:, 48:]) | ((high & _ONE) << _FOUR)
    return AffineBlocks(5, codes.reshape(-1, 32), *_k_scales(blocks))


# type -> bytes of a block, bits of a code, decoder
_AFFINE: dict[str, tuple[int, int, Callable[[Bytes], AffineBlocks]]] = {
    "Q4_0": (18, 4, _q4_0),
    "Q4_1": (20, 4, _q4_1),
    "Q5_0": (22, 5, _q5_0),
    "Q5_1": (24, 5, _q5_1),
    "Q8_0": (34, 8, _q8_0),
    "Q4_K": (144, 4, _q4_k),
    "Q5_K": (176, 5, _q5_k),
}

_FLOATS: dict[str, Callable[[Bytes], Floats]] = {
    "F32": lambda raw: raw.view(np.float32),
    "F16": lambda raw: raw.view(np.float16).astype(np.float32),
    "BF16": lambda raw: (raw.view(np.uint16).astype(np.uint32) << 16).view(np.float32),
}

_STORED = {"F32": np.float32, "F16": np.float16, "BF16": np.uint16}

# Types that the gguf package dequantises. Ternary types are missing: no tool writes them for the
# supported architectures, so there is no result to compare with.
_DEQUANTIZED = frozenset(
    {"Q2_K", "Q3_K", "Q6_K", "MXFP4", "NVFP4", "IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S"}
    | {"IQ3_XXS", "IQ3_S", "IQ4_NL", "IQ4_XS"}
)

#: Every tensor type that loads.
SUPPORTED_TYPES = frozenset(_AFFINE) | frozenset(_FLOATS) | _DEQUANTIZED
