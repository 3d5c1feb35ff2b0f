"""PackedWeights: a model's weights as the library's matrices and vectors, read from its files."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
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
BLOCKS: dict[str, Source] = {
    source.name: source for source in Source if source is not Source.F32_AS_INT8
}


#: phi3's matrix of two halves, which programs read as two.
_FUSED = "mlp.gate_up_proj.weight"
_HALVES = ("mlp.gate_proj.weight", "mlp.up_proj.weight")


@dataclass(frozen=True, slots=True)
class StoredArray:
    """An array in a file: its type, its shape, and the bytes of its elements."""

    dtype: mx.Dtype
    shape: tuple[int, ...]
    raw: NDArray[np.uint8]

    @classmethod
    def of(cls, array: mx.array) -> StoredArray:
        """Return an array of MLX as if it was in a file."""
        raw = np.array(array.reshape(-1).view(mx.uint8))
        return cls(array.dtype, tuple(array.shape), raw)

    @property
    def nbytes(self) -> int:
        """Its bytes in the file."""
        return self.raw.nbytes

    def dense(self) -> mx.array:
        """Return its values in float32."""
        values = mx.array(np.ascontiguousarray(self.raw)).view(self.dtype)
        return values.reshape(self.shape).astype(mx.float32)


@dataclass(frozen=True, slots=True)
class StoredAffine:
    """A matrix in MLX's affine codes, in a file."""

    bits: int
    group_size: int
    shape: tuple[int, ...]
    codes: StoredArray
    scales: StoredArray
    biases: StoredArray

    @property
    def dtype(self) -> mx.Dtype:
        """The type of the values: that of the scales."""
        return self.scales.dtype

    @property
    def nbytes(self) -> int:
        """Its bytes in the file."""
        return self.codes.nbytes + self.scales.nbytes + self.biases.nbytes

    def dense(self) -> mx.array:
        """Return its values in float32."""
        codes = mx.array(np.ascontiguousarray(self.codes.raw)).view(mx.uint32)
        return mx.dequantize(
            codes.reshape(self.codes.shape), self.scales.dense(), self.biases.dense(),
            self.group_size, self.bits,
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class PackedWeights:
    """Weights by the names of mlx-lm's parameters: matrices, and float32 vectors."""

    matrices: dict[str, Matrix] = field(default_factory=dict)
    vectors: dict[str, NDArray[np.float32]] = field(default_factory=dict)

    def add_stored(self, name: str, array: StoredArray | StoredAffine) -> None:
        """Add a parameter, a matrix [rows, columns] or a vector [elements], from the file."""
        if isinstance(array, StoredAffine):
            parts = [array.codes.raw, array.scales.raw, array.biases.raw]
            source, bits, size = _DENSE[array.scales.dtype], array.bits, array.group_size

            def affine(rows: int, columns: int, *data: NDArray[Any]) -> Matrix:
                return Matrix.affine(
                    rows, columns, *data, bits=bits, group_size=size, source=source
                )

            self._add(name, affine, array.shape, *parts)
            return
        if len(array.shape) == 1:
            values = mx.array(array.raw).view(array.dtype)
            self.vectors[name] = np.array(values.astype(mx.float32))
            return
        self._add(name, partial(Matrix, _DENSE[array.dtype]), array.shape, array.raw)

    def add_tensor(self, name: str, tensor: GGUFTensor, dense: Decode) -> None:
        """Add a tensor of GGUF, as it is or, if the library does not read its type, in 8 bits.

        `dense` decodes it to floats.
        """
        if len(tensor.shape) == 1:
            self.vectors[name] = np.array(dense(tensor), np.float32)  # not a part of the file
            return
        source = BLOCKS.get(tensor.dtype, Source.F32_AS_INT8)
        rows: NDArray[Any] = dense(tensor) if source is Source.F32_AS_INT8 else tensor.raw
        self._add(name, partial(Matrix, source), tensor.shape, np.ascontiguousarray(rows))

    def _add(
        self, name: str, make: Callable[..., Matrix], shape: Sequence[int], *data: NDArray[Any]
    ) -> None:
        rows, columns = shape
        if not name.endswith(_FUSED):
            self.matrices[name] = make(rows, columns, *data)
            return
        halves = zip(*(np.split(part.reshape(-1), 2) for part in data), strict=True)
        for half, parts in zip(_HALVES, halves, strict=True):
            self.matrices[name.replace(_FUSED, half)] = make(rows // 2, columns, *parts)

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
