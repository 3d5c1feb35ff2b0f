"""GGUF tensors as MLX arrays: decoded by several threads, a bounded amount ahead.

numpy lets go of the interpreter while it computes, so tensors are decoded side by side; MLX is
called by the caller's thread alone.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from modelpack_engine.loaders import gguf_blocks
from modelpack_engine.loaders.gguf_blocks import GROUP_SIZE
from modelpack_engine.loaders.gguf_file import GGUFTensor
from modelpack_engine.loaders.precision import available_memory

#: Bytes that may be decoded and not yet handed over, or a part of the memory that is free.
MAX_AHEAD = 128 * 1024 * 1024
_AHEAD_PART = 128
_MAX_THREADS = 16


@dataclass(frozen=True, slots=True)
class Packing:
    """How a weight is held quantised; `bits` of a code, `mode` as MLX names it."""

    bits: int
    mode: str = "affine"

    def options(self) -> dict[str, Any]:
        """Return what `to_quantized` of MLX's modules takes."""
        return {"group_size": GROUP_SIZE, "bits": self.bits, "mode": self.mode}


@dataclass(frozen=True, slots=True)
class Wanted:
    """A tensor that becomes the parameters of a module.

    `path` and `parameter` name it in the model; `shift` is added to its values.
    """

    tensor: GGUFTensor
    path: str
    parameter: str
    packing: Packing | None = None
    shift: float = 0.0

    @property
    def decoded_bytes(self) -> int:
        """About how much memory the decoded tensor takes."""
        packed = self.packing and gguf_blocks.affine_bits(self.tensor.dtype)
        return self.tensor.raw.size * 3 // 2 if packed else self.tensor.elements * 4


Decoded = dict[str, npt.NDArray[Any]]


def arrays_of(wanted: Iterable[Wanted], dtype: mx.Dtype) -> Iterator[tuple[str, mx.array]]:
    """Yield the parameters of all tensors by name; those that are not packed are `dtype`.

    Raises `ModelLoadError` for a type that is not supported.
    """
    with ThreadPoolExecutor(_threads(), thread_name_prefix="decode") as pool:
        waiting: deque[tuple[Wanted, Future[Decoded]]] = deque()
        ahead, limit = 0, max(MAX_AHEAD, (available_memory() or 0) // _AHEAD_PART)
        for item in wanted:
            waiting.append((item, pool.submit(_decode, item)))
            ahead += item.decoded_bytes
            while waiting and ahead > limit:
                first, future = waiting.popleft()
                ahead -= first.decoded_bytes
                yield from _arrays(first, future.result(), dtype)
        while waiting:
            first, future = waiting.popleft()
            yield from _arrays(first, future.result(), dtype)


def packing_of(dtype: str, *, requantize: bool) -> Packing | None:
    """Return how a tensor of this type is held if it is to stay packed, None for dense."""
    if gguf_blocks.is_float(dtype):
        return None
    bits = gguf_blocks.affine_bits(dtype)
    if bits is not None:
        return Packing(bits)
    if dtype == "MXFP4":
        return Packing(4, "mxfp4")
    return Packing(8) if requantize else None


def _decode(item: Wanted) -> Decoded:
    """Return numpy arrays in their final shapes: of the packed parts, or of the values."""
    tensor = item.tensor
    *rows, columns = tensor.shape or (1,)
    groups = (*rows, columns // GROUP_SIZE)
    if item.packing and item.packing.mode == "mxfp4":
        words, exponents = gguf_blocks.mxfp4_blocks(tensor)
        return {"weight": words.reshape(*rows, -1), "scales": exponents.reshape(groups)}
    blocks = gguf_blocks.affine_blocks(tensor) if item.packing else None
    if blocks is not None:
        return {
            "weight": blocks.words().reshape(*rows, -1),
            "scales": blocks.scales.reshape(groups),
            "biases": blocks.biases.reshape(groups),
        }
    if item.shift or not gguf_blocks.is_float(tensor.dtype):
        return {"values": gguf_blocks.dense(tensor) + np.float32(item.shift)}
    return {"values": gguf_blocks.as_stored(tensor)}


def _arrays(item: Wanted, decoded: Decoded, dtype: mx.Dtype) -> Iterator[tuple[str, mx.array]]:
    values = decoded.get("values")
    if values is None:
        for name, part in decoded.items():
            array = mx.array(part)
            floating = mx.issubdtype(array.dtype, mx.floating)
            yield f"{item.path}.{name}", array.astype(dtype) if floating else array
        return
    array = mx.array(values)
    if array.dtype == mx.uint16:  # bfloat16, which numpy does not have
        array = array.view(mx.bfloat16)
    if item.packing is None:
        yield f"{item.path}.{item.parameter}", array.astype(dtype)
        return
    weight, scales, biases = mx.quantize(array, GROUP_SIZE, item.packing.bits)
    yield f"{item.path}.weight", weight
    yield f"{item.path}.scales", scales.astype(dtype)
    yield f"{item.path}.biases", biases.astype(dtype)


def _threads() -> int:
    affinity = getattr(os, "sched_getaffinity", None)
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    return min(cores, _MAX_THREADS)
