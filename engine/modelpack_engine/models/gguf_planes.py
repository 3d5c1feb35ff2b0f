"""Tensors of GGUF's block types as the rows of words that `layers.blocks` describes.

No code and no scale changes: codes move so that a GPU reads them in whole words, scales of 6 bits
become bytes, and what is subtracted gets a sign. Where columns are reordered, the halves of a
superblock have its factors each. MLX moves them, on the GPU if there is one.

Source: ggml/src/ggml-quants.c.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from modelpack_engine.layers.blocks import BLOCK_TYPES, BlockType, bit_of_pair, order_of_eights
from modelpack_engine.models.gguf_file import GGUFTensor

#: The types that stay as they are stored on a GPU: MLX has no layout for their codes, or for those
#: of 5 bits, no fast kernel. Those of 4 and 8 bits have fast kernels in MLX's layout.
KEPT = frozenset({"Q2_K", "Q3_K", "Q5_0", "Q5_1", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS"})
#: On CUDA, MLX compiles its kernels for prompts in MXFP4 for minutes.
KEPT_ON_CUDA = KEPT | {"MXFP4"}

#: The codes that are moved at a time, for each of which that takes 14 bytes of memory.
_CODES_AT_ONCE = 1 << 24


@dataclass(frozen=True, slots=True)
class _Blocks:
    """Codes uint8 [blocks, weights], factors float16 bits [blocks, 1 or 2], and bytes of scales."""

    codes: mx.array
    factors: mx.array | None
    scales: mx.array | None = None


def block_type(dtype: str, shape: tuple[int, ...], part: int) -> BlockType | None:
    """Return how matrices of this type and shape stay as they are stored; None if they cannot.

    `part` is the number of columns that stay together, all of a row if none are reordered.
    """
    kind = BLOCK_TYPES.get(dtype)
    if kind is None or len(shape) not in (2, 3) or shape[-1] % kind.least:
        return None
    return next((fits for fits in (kind, kind.halved) if part % fits.block == 0), None)


def planes(tensor: GGUFTensor, kind: BlockType) -> mx.array:
    """Return the words of matrices for which there is a `block_type`: uint32 [..., rows, words]."""
    *outer, inputs = tensor.shape
    stored = tensor.raw.reshape(int(np.prod(outer)), -1)
    step = max(1, _CODES_AT_ONCE // inputs)
    words = mx.zeros((len(stored), kind.words(inputs)), mx.uint32)
    for first in range(0, len(stored), step):
        some = mx.array(stored[first : first + step])
        words[first : first + step] = _planes_of_rows(some, inputs, kind, tensor.columns)
        mx.eval(words)  # the memory of its steps is free for the next one
    return words.reshape(*outer, -1)


def _planes_of_rows(
    stored: mx.array, inputs: int, kind: BlockType, columns: tuple[int, ...] | None
) -> mx.array:
    """Return the words of rows of blocks, uint8 [rows, bytes]."""
    rows = stored.shape[0]

    def in_order(parts: mx.array) -> mx.array:
        """Return what the blocks of a row have, [rows, ...], in the order of its columns."""
        if columns is not None:
            parts = parts.reshape(rows, len(columns), -1)[:, mx.array(columns)]
        return parts.reshape(rows, -1)

    size, decode = _DECODERS[kind.name]
    blocks = decode(stored.reshape(-1, size))
    codes = in_order(blocks.codes).reshape(rows, -1, 8)
    codes = mx.take(codes, order_of_eights(inputs), axis=1)
    found = [_plane(codes & ((1 << kind.low) - 1), kind.low)]
    if kind.high:
        found.append(_plane(codes >> kind.low, kind.high))
    if blocks.factors is not None:
        each = blocks.codes.shape[1] // kind.block  # 2 if halves of superblocks have factors
        found.append(in_order(mx.repeat(blocks.factors, each, axis=0)).view(mx.uint8))
    if blocks.scales is not None:
        scales = in_order(blocks.scales)
        if kind.group == 16:  # the scales of halves of 32 weights move with them
            halves = scales.reshape(-1, 2, 4, 2)
            scales = mx.stack([halves[:, 0], halves[:, 1, :, ::-1]], axis=1).reshape(rows, -1)
        found.append(scales)
    missing = kind.words(inputs) * 4 - sum(part.shape[1] for part in found)
    found.append(mx.zeros((rows, missing), mx.uint8))
    return mx.concatenate(found, axis=1).view(mx.uint32)


def _plane(codes: mx.array, bits: int) -> mx.array:
    """Pack codes [rows, ...] to bytes of words: the second of a pair is 16 bits after the first."""
    pairs = codes.reshape(codes.shape[0], -1, 16 // bits, 2).astype(mx.uint16)
    halves = pairs[:, :, 0]
    for i in range(1, 16 // bits):
        halves = halves | pairs[:, :, i] << bit_of_pair(bits, i)
    return halves.reshape(codes.shape[0], -1).view(mx.uint8)


def _shorts(blocks: mx.array, *starts: int) -> mx.array:
    """Return the 16-bit numbers at these bytes of every block."""
    return mx.concatenate([blocks[:, at : at + 2] for at in starts], axis=1).view(mx.uint16)


def _with_offset(factors: mx.array) -> mx.array:
    """Change the sign of the second factor, which ggml subtracts."""
    return factors ^ mx.array([0, 0x8000], mx.uint16)


def _spread(packed: mx.array, bits: int, run: int) -> mx.array:
    """Unpack codes: each `run` bytes hold 8 / bits runs of codes, the first in the low bits."""
    shifts = mx.arange(0, 8, bits, mx.uint8)[:, None]
    runs = packed.reshape(len(packed), -1, 1, run) >> shifts
    return runs.reshape(len(packed), -1) & ((1 << bits) - 1)


def _q4_0(blocks: mx.array) -> _Blocks:
    return _Blocks(_spread(blocks[:, 2:], 4, 16), _shorts(blocks, 0))


def _q4_1(blocks: mx.array) -> _Blocks:
    return _Blocks(_spread(blocks[:, 4:], 4, 16), _shorts(blocks, 0, 2))


def _q5_0(blocks: mx.array) -> _Blocks:
    codes = _spread(blocks[:, 6:], 4, 16) | _spread(blocks[:, 2:6], 1, 1) << 4
    return _Blocks(codes, _shorts(blocks, 0))


def _q5_1(blocks: mx.array) -> _Blocks:
    codes = _spread(blocks[:, 8:], 4, 16) | _spread(blocks[:, 4:8], 1, 1) << 4
    return _Blocks(codes, _shorts(blocks, 0, 2))


def _six_bits(packed: mx.array) -> mx.array:
    """Return the scales and minimums of the 8 groups of Q4_K and Q5_K, in turn: [blocks, 16]."""
    low, middle, high = packed[:, 0:4], packed[:, 4:8], packed[:, 8:12]
    scales = mx.concatenate([low & 0x3F, (high & 0x0F) | ((low >> 2) & 0x30)], axis=1)
    minimums = mx.concatenate([middle & 0x3F, (high >> 4) | ((middle >> 2) & 0x30)], axis=1)
    return mx.stack([scales, minimums], axis=2).reshape(len(packed), -1)


def _q4_k(blocks: mx.array) -> _Blocks:
    codes = _spread(blocks[:, 16:], 4, 32)
    return _Blocks(codes, _with_offset(_shorts(blocks, 0, 2)), _six_bits(blocks[:, 4:16]))


def _q5_k(blocks: mx.array) -> _Blocks:
    codes = _spread(blocks[:, 48:], 4, 32) | _spread(blocks[:, 16:48], 1, 32) << 4
    return _Blocks(codes, _with_offset(_shorts(blocks, 0, 2)), _six_bits(blocks[:, 4:16]))


def _q2_k(blocks: mx.array) -> _Blocks:
    codes = _spread(blocks[:, 16:80], 2, 32)
    return _Blocks(codes, _with_offset(_shorts(blocks, 80, 82)), blocks[:, :16])


def _q3_k(blocks: mx.array) -> _Blocks:
    codes = _spread(blocks[:, 32:96], 2, 32) | _spread(blocks[:, :32], 1, 32) << 2
    low = _spread(blocks[:, 96:104], 4, 8)
    high = _spread(blocks[:, 104:108], 2, 4)
    return _Blocks(codes, _shorts(blocks, 108), _less_32(low | high << 4))


def _q6_k(blocks: mx.array) -> _Blocks:
    codes = _spread(blocks[:, :128], 4, 64) | _spread(blocks[:, 128:192], 2, 32) << 4
    return _Blocks(codes, _shorts(blocks, 208), blocks[:, 192:208])


def _iq4_nl(blocks: mx.array) -> _Blocks:
    return _Blocks(_spread(blocks[:, 2:], 4, 16), _shorts(blocks, 0))


def _iq4_xs(blocks: mx.array) -> _Blocks:
    high = (_shorts(blocks, 2) >> mx.arange(0, 16, 2, mx.uint16)).astype(mx.uint8) & 3
    scales = _less_32(_spread(blocks[:, 4:8], 4, 1) | high << 4)
    return _Blocks(_spread(blocks[:, 8:], 4, 16), _shorts(blocks, 0), scales)


def _less_32(scales: mx.array) -> mx.array:
    """Return scales of 6 bits less 32, as the bytes of int8."""
    return (scales.astype(mx.int8) - 32).view(mx.uint8)


def _mxfp4(blocks: mx.array) -> _Blocks:
    return _Blocks(_spread(blocks[:, 1:], 4, 16), None, blocks[:, :1])


#: The bytes of a block, and its decoder.
_DECODERS: dict[str, tuple[int, Callable[[mx.array], _Blocks]]] = {
    "Q2_K": (84, _q2_k),
    "Q3_K": (110, _q3_k),
    "Q4_K": (144, _q4_k),
    "Q5_K": (176, _q5_k),
    "Q6_K": (210, _q6_k),
    "Q4_0": (18, _q4_0),
    "Q4_1": (20, _q4_1),
    "Q5_0": (22, _q5_0),
    "Q5_1": (24, _q5_1),
    "IQ4_NL": (18, _iq4_nl),
    "IQ4_XS": (136, _iq4_xs),
    "MXFP4": (17, _mxfp4),
}
