"""PackedWeights: a model's weights as the library's matrices and vectors, read from its files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten
from numpy.typing import NDArray

from modelpack_engine.cpu.library import GROUP, Matrix, Source

#: The types of arrays whose rows the library reads as they are, and how numpy sees them.
_DENSE = {
    mx.float32: (Source.F32, mx.float32),
    mx.float16: (Source.F16, mx.float16),
    mx.bfloat16: (Source.BF16, mx.uint16),  # which numpy does not have
}
#: GGUF's types that the library reads as they are; others are held in 8 bits.
_BLOCKS = {source.name: source for source in Source if source is not Source.F32_AS_INT8}


@dataclass(frozen=True, slots=True)
class PackedWeights:
    """Weights by the names of mlx-lm's parameters: matrices, and float32 vectors."""

    matrices: Mapping[str, Matrix]
    vectors: Mapping[str, NDArray[np.float32]]

    @property
    def nbytes(self) -> int:
        """The bytes of all weights in memory."""
        return sum(w.nbytes for part in (self.matrices, self.vectors) for w in part.values())


def from_array(array: mx.array) -> Matrix | NDArray[np.float32]:
    """Return a parameter [rows, columns] as a matrix, or [elements] as a vector."""
    if array.ndim == 1:
        return np.array(array.astype(mx.float32))
    source, seen = _DENSE[array.dtype]
    rows = np.array(mx.contiguous(array).view(seen), copy=False)
    return Matrix(source, array.shape[0], array.shape[1], rows)


def from_blocks(dtype: str, shape: tuple[int, ...], raw: NDArray[np.uint8]) -> Matrix | None:
    """Return a tensor of GGUF [rows, columns]; None for a type that the library does not read."""
    source = _BLOCKS.get(dtype)
    if source is None:
        return None
    return Matrix(source, shape[0], shape[1], np.ascontiguousarray(raw))


def from_floats(values: NDArray[np.float32]) -> Matrix:
    """Return weights [rows, columns] rounded to 8 bits, in groups of 32 columns."""
    rows, columns = values.shape
    return Matrix(Source.F32_AS_INT8, rows, columns, np.ascontiguousarray(values, np.float32))


def unpackable(model: Any) -> str | None:
    """Return why the arrays of a model cannot be packed, or None."""
    parameters: Any = tree_flatten(model.parameters())
    for name, array in parameters:
        if array.dtype not in _DENSE:
            return f"{name} has the type {array.dtype}"
        if array.ndim > 2 or (array.ndim == 2 and array.shape[1] % GROUP):
            return f"{name} has the shape {list(array.shape)}"
    return None
