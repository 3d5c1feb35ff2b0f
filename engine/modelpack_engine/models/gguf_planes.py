"""Tensors of GGUF's block types as the rows of words that `layers.blocks` describes.

No code and no scale changes: codes move so that a GPU reads them in whole words, scales of 6 bits
become bytes, and what is subtracted gets a sign. Where columns are reordered, the halves of a
superblock have its factors each.

Source: ggml/src/ggml-quants.c.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from modelpack_engine.layers.blocks import BLOCK_TYPES, BlockType, Words
from modelpack_engine.models.gguf_blocks import in_order
from modelpack_engine.models.gguf_file import Bytes, GGUFTensor

#: The types that stay as they are stored on a GPU: MLX has no layout for their codes, or for those
#: of 5 bits, no fast kernel. Those of 4 and 8 bits have fast kernels in MLX's layout.
KEPT = frozenset({"Q2_K", "Q3_K", "Q5_0", "Q5_1", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS"})
#: On CUDA, MLX compiles its kernels for prompts in MXFP4 for minutes.
KEPT_ON_CUDA = KEPT | {"MXFP4"}

_LOW = np.uint8(0x0F)
_SIGN = np.uint16(0x8000)


@dataclass(frozen=True, slots=True)
class _Blocks:
    """Codes uint8 [blocks, weights], factors float16 bits [blocks, 1 or 2], and bytes of scales."""

    codes: Bytes
    factors: npt.NDArray[np.uint16]
    scales: Bytes | None = None


def block_type(dtype: str, shape: tuple[int, ...], part: int) -> BlockType | None:
    """Return how matrices of this type and shape stay as they are stored; None if they cannot.

    `part` is the number of columns that stay together, all of a row if none are reordered.
    """
    kind = BLOCK_TYPES.get(dtype)
    if kind is None or len(shape) not in (2, 3) or shape[-1] % kind.least:
        return None
    return next((fits for fits in (kind, kind.halved) if part % fits.block == 0), None)


def planes(tensor: GGUFTensor, kind: BlockType) -> Words:
    """Return the words of matrices [..., rows, inputs] for which there is a `block_type`."""
    *outer, inputs = tensor.shape
    rows = int(np.prod(outer))
    size, decode = _DECODERS[kind.name]
    blocks = decode(tensor.raw.reshape(-1, size))
    words = np.zeros((rows, kind.words(inputs)), np.uint32)
    codes = in_order(tensor, blocks.codes)
    codes = _exchanged(codes.reshape(rows, -1, 4, 8)).reshape(rows, inputs)
    at = inputs // 32 * kind.low
    words[:, :at] = _plane(codes & np.uint8((1 << kind.low) - 1), kind.low)
    if kind.high:
        start, at = at, at + inputs // 32 * kind.high
        words[:, start:at] = _plane(codes >> np.uint8(kind.low), kind.high)
    rest = words.view(np.uint8)[:, at * 4 :]
    each = blocks.codes.shape[1] // kind.block  # 2 if halves of superblocks have factors
    factors = in_order(tensor, np.repeat(blocks.factors, each, axis=0))
    factors = np.ascontiguousarray(factors).view(np.uint8).reshape(rows, -1)
    at = factors.shape[1]
    rest[:, :at] = factors
    if blocks.scales is not None:
        scales = in_order(tensor, blocks.scales).reshape(rows, -1)
        if kind.group == 16:  # the scales of halves of 32 weights move with them
            halves = scales.reshape(-1, 2, 4, 2)
            scales = np.stack([halves[:, 0], halves[:, 1, :, ::-1]], axis=1).reshape(rows, -1)
        rest[:, at : at + scales.shape[1]] = scales
    return words.reshape(*outer, -1)


def _exchanged(codes: Bytes) -> Bytes:
    """Reorder groups of 8 codes [rows, units of 32, 4, 8] like `eight` in kernels/blocks.h."""
    moved = np.empty_like(codes)
    for unit in range(8):
        order = [place ^ unit // 2 for place in range(4)]
        moved[:, unit::8] = codes[:, unit::8][:, :, order]
    return moved


def _plane(codes: Bytes, bits: int) -> Words:
    """Pack codes [rows, inputs]; those 2 i and 2 i + 1 of a word at i * bits and 16 + i * bits."""
    pairs = codes.reshape(codes.shape[0], -1, 16 // bits, 2)
    halves = np.zeros((*pairs.shape[:2], 2), np.uint16)
    for i in range(16 // bits):
        halves |= pairs[:, :, i].astype(np.uint16) << np.uint16(i * bits)
    return halves.view(np.uint32)[:, :, 0]


def _shorts(blocks: Bytes, *starts: int) -> npt.NDArray[np.uint16]:
    """Return the 16-bit numbers at these bytes of every block."""
    parts = [blocks[:, start : start + 2] for start in starts]
    return np.ascontiguousarray(np.concatenate(parts, axis=1)).view(np.uint16)


def _with_offset(factors: npt.NDArray[np.uint16]) -> npt.NDArray[np.uint16]:
    """Change the sign of the second factor, which ggml subtracts."""
    factors[:, 1] ^= _SIGN
    return factors


def _spread(packed: Bytes, bits: int, run: int) -> Bytes:
    """Unpack codes: each `run` bytes hold 8 / bits runs of codes, the first in the low bits."""
    shifts = np.arange(0, 8, bits, dtype=np.uint8)[:, None]
    runs = packed.reshape(len(packed), -1, 1, run) >> shifts
    codes: Bytes = runs.reshape(len(packed), -1) & np.uint8((1 << bits) - 1)
    return codes


def _high_bits(packed: Bytes) -> Bytes:
    """Return the bits of 4 bytes as 32 numbers."""
    return np.unpackbits(packed, axis=1, bitorder="little")


def _q4_0(blocks: Bytes) -> _Blocks:
    return _Blocks(_spread(blocks[:, 2:], 4, 16), _shorts(blocks, 0))


def _q4_1(blocks: Bytes) -> _Blocks:
    return _Blocks(_spread(blocks[:, 4:], 4, 16), _shorts(blocks, 0, 2))


def _q5_0(blocks: Bytes) -> _Blocks:
    codes = _spread(blocks[:, 6:], 4, 16) | _high_bits(blocks[:, 2:6]) << np.uint8(4)
    return _Blocks(codes, _shorts(blocks, 0))


def _q5_1(blocks: Bytes) -> _Blocks:
    codes = _spread(blocks[:, 8:], 4, 16) | _high_bits(blocks[:, 4:8]) << np.uint8(4)
    return _Blocks(codes, _shorts(blocks, 0, 2))


def _six_bits(packed: Bytes) -> Bytes:
    """Return the scales and minimums of the 8 groups of Q4_K and Q5_K, in turn: [blocks, 16]."""
    low, middle, high = packed[:, 0:4], packed[:, 4:8], packed[:, 8:12]
    found = np.empty((len(packed), 8, 2), np.uint8)
    found[:, :4, 0], found[:, :4, 1] = low & 0x3F, middle & 0x3F
    found[:, 4:, 0] = (high & _LOW) | ((low >> 2) & 0x30)
    found[:, 4:, 1] = (high >> 4) | ((middle >> 2) & 0x30)
    return found.reshape(-1, 16)


def _q4_k(blocks: Bytes) -> _Blocks:
    codes = _spread(blocks[:, 16:], 4, 32)
    return _Blocks(codes, _with_offset(_shorts(blocks, 0, 2)), _six_bits(blocks[:, 4:16]))


def _q5_k(blocks: Bytes) -> _Blocks:
    codes = _spread(blocks[:, 48:], 4, 32) | _spread(blocks[:, 16:48], 1, 32) << np.uint8(4)
    return _Blocks(codes, _with_offset(_shorts(blocks, 0, 2)), _six_bits(blocks[:, 4:16]))


def _q2_k(blocks: Bytes) -> _Blocks:
    codes = _spread(blocks[:, 16:80], 2, 32)
    return _Blocks(codes, _with_offset(_shorts(blocks, 80, 82)), blocks[:, :16])


def _q3_k(blocks: Bytes) -> _Blocks:
    codes = _spread(blocks[:, 32:96], 2, 32) | _spread(blocks[:, :32], 1, 32) << np.uint8(2)
    low = _spread(blocks[:, 96:104], 4, 8)
    high = _spread(blocks[:, 104:108], 2, 4)
    scales = (low | high << np.uint8(4)) - np.uint8(32)  # modulo 256, as int8
    return _Blocks(codes, _shorts(blocks, 108), scales)


def _q6_k(blocks: Bytes) -> _Blocks:
    codes = _spread(blocks[:, :128], 4, 64) | _spread(blocks[:, 128:192], 2, 32) << np.uint8(4)
    return _Blocks(codes, _shorts(blocks, 208), blocks[:, 192:208])


def _iq4_nl(blocks: Bytes) -> _Blocks:
    return _Blocks(_spread(blocks[:, 2:], 4, 16), _shorts(blocks, 0))


def _iq4_xs(blocks: Bytes) -> _Blocks:
    shifts = np.arange(0, 16, 2, dtype=np.uint16)
    high = (_shorts(blocks, 2) >> shifts).astype(np.uint8) & np.uint8(3)
    scales = (_spread(blocks[:, 4:8], 4, 1) | high << np.uint8(4)) - np.uint8(32)
    return _Blocks(_spread(blocks[:, 8:], 4, 16), _shorts(blocks, 0), scales)


def _mxfp4(blocks: Bytes) -> _Blocks:
    none = np.empty((len(blocks), 0), np.uint16)
    return _Blocks(_spread(blocks[:, 1:], 4, 16), none, blocks[:, :1])


#: The bytes of a block, and its decoder.
_DECODERS: dict[str, tuple[int, Callable[[Any], _Blocks]]] = {
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
