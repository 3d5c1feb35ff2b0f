"""Tensors of GGUF's block types, and MLX's floats of 4 bits, as rows of words (`layers.blocks`).

No code and no scale changes: codes move so that a GPU reads them in whole words, scales of 6 bits
become bytes, and what is subtracted gets a sign. Where columns are reordered, the halves of a
superblock have its factors each. MLX moves them, on the GPU if there is one.

Source: ggml/src/ggml-quants.c; MLX's documentation of `mx.quantize`, modes `mxfp4` and `nvfp4`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.nn.layers.quantized import QuantizedEmbedding, QuantizedLinear
from mlx.utils import tree_unflatten

from modelpack_engine.errors import ModelLoadError
from modelpack_engine.layers.blocks import (
    BLOCK_TYPES,
    PLACES_OF_FLOATS,
    SUPERBLOCK,
    BlockType,
    bit_of_pair,
    layer_of,
    order_of_eights,
)
from modelpack_engine.models.gguf_file import GGUFTensor
from modelpack_engine.models.load_budget import checkpoint

#: The types that stay as they are stored on a GPU: MLX has no layout for their codes, or for those
#: of 5 bits, no fast kernel. Those of 4 and 8 bits have fast kernels in MLX's layout.
KEPT = frozenset({"Q2_K", "Q3_K", "Q5_0", "Q5_1", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS"})
#: On CUDA, MLX compiles its kernels for prompts in floats of 4 bits for minutes.
KEPT_ON_CUDA = KEPT | {"MXFP4", "NVFP4"}

#: The codes that are moved at a time, for each of which that takes 14 bytes of memory.
_CODES_AT_ONCE = 1 << 24


@dataclass(frozen=True, slots=True)
class _Blocks:
    """Codes uint8 [blocks, weights], factors float16 bits [blocks, 1 or 2], and bytes of scales.

    `_words` takes them by row: [rows, weights of a row], and so on.
    """

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


def of_blocks(tensor: GGUFTensor, kind: BlockType) -> mx.array:
    """Return the words of matrices for which there is a `block_type`: uint32 [..., rows, words]."""
    *outer, inputs = tensor.shape
    stored = tensor.raw.reshape(int(np.prod(outer)), -1)

    def some(first: int, last: int) -> _Blocks:
        return _blocks_of_rows(mx.array(stored[first:last]), inputs, kind, tensor.columns)

    return _rows(some, len(stored), inputs, kind).reshape(*outer, -1)


def hold_floats(model: Any, dtype: mx.Dtype) -> None:
    """Hold MLX's floats of 4 bits as block types: layers in its modes `mxfp4` and `nvfp4`.

    Embeddings return `dtype`. Layers with a scale of all weights, or with rows of no whole blocks,
    stay as they are. Raises `ModelLoadError` for a file that MLX reads only now, and cannot.
    """
    replaced: list[tuple[str, Any]] = []
    made: dict[int, Any] = {}  # by the layer's id, as a layer may be at several paths
    for path, module in model.named_modules():
        checkpoint()
        try:
            held = made.get(id(module)) or _held(module, dtype)
        except (RuntimeError, ValueError) as error:
            raise ModelLoadError(f"the weights cannot be read: {error}") from error
        if held is not None:
            made[id(module)] = held
            replaced.append((path, held))
            # MLX's arrays go now: a model in memory twice might not fit.
            module.weight = module.scales = None
    model.update_modules(tree_unflatten(replaced))


def _held(module: Any, dtype: mx.Dtype) -> Any:
    """Return what holds a layer's weights as a block type; None if that is not possible."""
    from mlx_lm.models.switch_layers import QuantizedSwitchLinear

    known = QuantizedLinear, QuantizedEmbedding, QuantizedSwitchLinear
    kind = BLOCK_TYPES.get(str(getattr(module, "mode", "")).upper())
    if kind is None or type(module) not in known or module.get("global_scale") is not None:
        return None
    weight, scales = module["weight"], module["scales"]
    *outer, groups = scales.shape
    inputs, rows = groups * kind.group, int(np.prod(outer))
    if inputs % kind.least:
        return None
    words, scales = weight.reshape(rows, -1), scales.reshape(rows, -1)

    def some(first: int, last: int) -> _Blocks:
        codes = words[first:last, :, None] >> mx.arange(0, 32, 4, mx.uint32) & 15
        return _Blocks(codes.astype(mx.uint8).reshape(-1, inputs), None, scales[first:last])

    embedding, bias = type(module) is QuantizedEmbedding, "bias" in module
    held: Any = layer_of(kind, (*outer, inputs), dtype, embedding=embedding, bias=bias)
    held.weight = _rows(some, rows, inputs, kind).reshape(*outer, -1)
    if bias:
        held.bias = module["bias"]
    return held


def _rows(some: Callable[[int, int], _Blocks], rows: int, inputs: int, kind: BlockType) -> mx.array:
    """Return the words of all rows, uint32 [rows, words]; `some` has those from one to another."""
    step = max(1, _CODES_AT_ONCE // inputs)
    words = mx.zeros((rows, kind.words(inputs)), mx.uint32)
    for first in range(0, rows, step):
        words[first : first + step] = _words(some(first, min(rows, first + step)), kind)
        mx.eval(words)  # the memory of its steps is free for the next one
    return words


def _blocks_of_rows(
    stored: mx.array, inputs: int, kind: BlockType, columns: tuple[int, ...] | None
) -> _Blocks:
    """Return the parts of rows of blocks, uint8 [rows, bytes]: each [rows, ...]."""
    rows = stored.shape[0]

    def in_order(parts: mx.array) -> mx.array:
        """Return what the blocks of a row have, [rows, ...], in the order of its columns."""
        if columns is not None:
            parts = parts.reshape(rows, len(columns), -1)[:, mx.array(columns)]
        return parts.reshape(rows, -1)

    size, decode = _DECODERS[kind.name]
    blocks = decode(stored.reshape(-1, size))
    factors = blocks.factors
    if factors is not None:
        each = blocks.codes.shape[1] // kind.block  # 2 if halves of superblocks have factors
        factors = in_order(mx.repeat(factors, each, axis=0))
    scales = None if blocks.scales is None else in_order(blocks.scales)
    return _Blocks(in_order(blocks.codes), factors, scales)


def _words(blocks: _Blocks, kind: BlockType) -> mx.array:
    """Return the words of rows, whose codes and scales are in the order of their columns."""
    rows, inputs = blocks.codes.shape
    codes = mx.take(blocks.codes.reshape(rows, -1, 8), order_of_eights(inputs), axis=1)
    if kind.exponent:
        found = [_plane_of_floats(codes)]
    else:
        found = [_plane(codes & ((1 << kind.low) - 1), kind.low)]
    if kind.high:
        found.append(_plane(codes >> kind.low, kind.high))
    parts: list[mx.array] = []
    if blocks.scales is not None:
        scales = blocks.scales
        if kind.group == 16:  # they move with the halves of 32 weights
            scales = mx.take(scales, order_of_eights(inputs)[::2] // 2, axis=1)
        parts.append(scales)
    if blocks.factors is not None:
        parts.append(blocks.factors.view(mx.uint8))
    if len(parts) == 2:
        of_superblocks = [part.reshape(rows, inputs // SUPERBLOCK, -1) for part in parts]
        parts = [mx.concatenate(of_superblocks, axis=2).reshape(rows, -1)]
    found += parts
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


def _plane_of_floats(codes: mx.array) -> mx.array:
    """Pack floats [rows, eights, 8] to bytes of words."""
    pairs = codes.reshape(codes.shape[0], -1, 4, 2).astype(mx.uint16)
    halves = mx.zeros_like(pairs[:, :, 0])
    for i, (place, sign) in enumerate(PLACES_OF_FLOATS):
        halves = halves | (pairs[:, :, i] & 7) << place | (pairs[:, :, i] >> 3) << sign
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


def _nvfp4(blocks: mx.array) -> _Blocks:
    scales = blocks[:, :4] & 127  # they have no sign, and what is no number stands for 0
    return _Blocks(_spread(blocks[:, 4:], 4, 8), None, mx.where(scales == 127, 0, scales))


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
    "NVFP4": (36, _nvfp4),
}
