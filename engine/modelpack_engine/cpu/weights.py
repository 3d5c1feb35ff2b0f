"""PackedWeights: a model's weights as the library's matrices and vectors, read from its files."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten
from numpy.typing import NDArray

from modelpack_engine.cpu.library import GROUP, Matrix, Source


class GGUFTensor(Protocol):
    """A tensor of a GGUF file: its type, its shape [rows, columns], and the bytes of its blocks."""

    @property
    def dtype(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def raw(self) -> NDArray[np.uint8]: ...


Decode = Callable[[Any], NDArray[np.float32]]

#: The types of arrays whose rows the library reads as they are.
_DENSE = {mx.float32: Source.F32, mx.float16: Source.F16, mx.bfloat16: Source.BF16}
#: GGUF's types that the library reads as they are; others are held in 8 bits.
_BLOCKS: dict[str, Source] = {
    source.name: source for source in Source if source is not Source.F32_AS_INT8
}


#: phi3's matrix of two halves, which programs read as two.
_FUSED = "mlp.gate_up_proj.weight"
_HALVES = ("mlp.gate_proj.weight", "mlp.up_proj.weight")


@dataclass(frozen=True, slots=True)
class StoredArray:
    """An array of floats in a file: its type, its shape, and the bytes of its elements."""

    dtype: mx.Dtype
    shape: tuple[int, ...]
    raw: NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class PackedWeights:
    """Weights by the names of mlx-lm's parameters: matrices, and float32 vectors."""

    matrices: dict[str, Matrix] = field(default_factory=dict)
    vectors: dict[str, NDArray[np.float32]] = field(default_factory=dict)

    def add_stored(self, name: str, array: StoredArray) -> None:
        """Add a parameter, a matrix [rows, columns] or a vector [elements], from the file."""
        if len(array.shape) == 1:
            values = mx.array(array.raw).view(array.dtype)
            self.vectors[name] = np.array(values.astype(mx.float32))
            return
        self._add(name, _DENSE[array.dtype], array.shape, array.raw)

    def add_tensor(self, name: str, tensor: GGUFTensor, dense: Decode) -> None:
        """Add a tensor of GGUF, as it is or, if the library does not read its type, in 8 bits.

        `dense` decodes it to floats.
        """
        if len(tensor.shape) == 1:
            self.vectors[name] = np.array(dense(tensor), np.float32)  # not a part of the file
            return
        source = _BLOCKS.get(tensor.dtype, Source.F32_AS_INT8)
        rows: NDArray[Any] = dense(tensor) if source is Source.F32_AS_INT8 else tensor.raw
        self._add(name, source, tensor.shape, np.ascontiguousarray(rows))

    def _add(self, name: str, source: Source, shape: Sequence[int], data: NDArray[Any]) -> None:
        rows, columns = shape
        if not name.endswith(_FUSED):
            self.matrices[name] = Matrix(source, rows, columns, data)
            return
        for half, part in zip(_HALVES, np.split(data.reshape(-1), 2), strict=True):
            self.matrices[name.replace(_FUSED, half)] = Matrix(source, rows // 2, columns, part)

    @property
    def nbytes(self) -> int:
        """The bytes of all weights in memory."""
        return sum(w.nbytes for part in (self.matrices, self.vectors) for w in part.values())


def can_pack(model: Any) -> bool:
    """Return whether the types and shapes of all parameters of a model can be packed."""
    parameters: Any = tree_flatten(model.parameters())
    return all(
        array.dtype in _DENSE
        and (array.ndim < 2 or (array.ndim == 2 and array.shape[1] % GROUP == 0))
        for _, array in parameters
    )
