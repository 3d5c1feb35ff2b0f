"""GGUF files opened for loading: typed metadata, long arrays included, and the bytes of tensors.

`modelpack.formats.gguf` checks the header first, so every offset here lies inside its file. Tensor
data is mapped, not read. `gguf.GGUFReader` would take two seconds for the vocabulary of a small
model; here the arrays are read in one pass.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from modelpack.errors import ModelpackError
from modelpack.formats.gguf import (
    GGUFHeader,
    MetadataArray,
    MetadataValue,
    ValueType,
    read_gguf_header,
)
from modelpack.formats.tensors import TensorInfo
from modelpack_engine.errors import ModelLoadError

Bytes = npt.NDArray[np.uint8]

_LENGTH = struct.Struct("<Q")
_ARRAY_HEAD = 4 + 8  # the type of the items and their number
_NUMPY_TYPES: dict[ValueType, str] = {
    ValueType.UINT8: "u1",
    ValueType.INT8: "i1",
    ValueType.UINT16: "<u2",
    ValueType.INT16: "<i2",
    ValueType.UINT32: "<u4",
    ValueType.INT32: "<i4",
    ValueType.FLOAT32: "<f4",
    ValueType.BOOL: "u1",
    ValueType.UINT64: "<u8",
    ValueType.INT64: "<i8",
    ValueType.FLOAT64: "<f8",
}


class Metadata:
    """The metadata of one file. Methods raise `ModelLoadError` for a value of another type."""

    def __init__(self, header: GGUFHeader, data: Bytes) -> None:
        self.path = header.path
        self._values = header.metadata
        self._data = data

    def __contains__(self, key: str) -> bool:
        return key in self._values

    def text(self, key: str, default: str | None = None) -> str:
        """Return a string; the key is required unless there is a default."""
        return str(self._checked(key, default, str, "a string"))

    def integer(self, key: str, default: int | None = None) -> int:
        """Return a whole number."""
        return int(self._checked(key, default, int, "a whole number"))

    def number(self, key: str, default: float | None = None) -> float:
        """Return a number as float."""
        return float(self._checked(key, default, (int, float), "a number"))

    def flag(self, key: str, default: bool | None = None) -> bool:
        """Return a boolean."""
        return bool(self._checked(key, default, bool, "a boolean"))

    def is_array(self, key: str) -> bool:
        """Whether the value is an array."""
        value = self._values.get(key)
        return value is not None and isinstance(value.value, MetadataArray)

    def strings(self, key: str) -> list[bytes]:
        """Return an array of strings, each as undecoded bytes."""
        array, start = self._array(key)
        if array.element_type is not ValueType.STRING:
            raise self._wrong(key, "an array of strings", array.element_type.name)
        # One copy of the array's bytes: slicing a mapped file item by item is far slower.
        data = self._data[start : self._end_of(start)].tobytes()
        found, at, unpack = [], 0, _LENGTH.unpack_from
        for _ in range(array.length):
            length = unpack(data, at)[0]
            at += 8
            found.append(data[at : at + length])
            at += length
        return found

    def numbers(self, key: str) -> npt.NDArray[Any]:
        """Return an array of numbers or booleans."""
        array, start = self._array(key)
        kind = _NUMPY_TYPES.get(array.element_type)
        if kind is None:
            raise self._wrong(key, "an array of numbers", array.element_type.name)
        size = array.length * np.dtype(kind).itemsize
        return self._data[start : start + size].copy().view(kind)

    def error(self, message: str, *, hint: str | None = None) -> ModelLoadError:
        """Return a `ModelLoadError` about this file."""
        return ModelLoadError(f"{self.path}: {message}", hint=hint)

    def _array(self, key: str) -> tuple[MetadataArray, int]:
        value = self._value(key)
        if not isinstance(value.value, MetadataArray):
            raise self._wrong(key, "an array", value.type.name)
        return value.value, value.offset + _ARRAY_HEAD

    def _end_of(self, start: int) -> int:
        """Return where the value that starts at `start` ends: where the next value starts."""
        later = (value.offset for value in self._values.values() if value.offset > start)
        return min(later, default=len(self._data))

    def _value(self, key: str) -> MetadataValue:
        value = self._values.get(key)
        if value is None:
            raise self.error(f"the metadata has no {key!r}")
        return value

    def _checked(self, key: str, default: Any, kind: Any, expected: str) -> Any:
        if key not in self._values and default is not None:
            return default
        found = self._value(key)
        value = found.value
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise self._wrong(key, expected, found.type.name)
        return value

    def _wrong(self, key: str, expected: str, got: str) -> ModelLoadError:
        return self.error(f"{key!r} is {got}, expected {expected}")


@dataclass(frozen=True, slots=True)
class GGUFTensor:
    """One tensor; the fastest-varying dimension of `shape` is the last, as in numpy and MLX.

    With `columns`, a row is cut into so many equal parts, and part i of the decoded row is the
    stored part `columns[i]`.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    raw: Bytes
    columns: tuple[int, ...] | None = None

    @property
    def elements(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64))


class GGUFFile:
    """A model in GGUF: one file, or all its shards; the metadata are those of the first."""

    def __init__(self, metadata: Metadata, shards: Sequence[tuple[GGUFHeader, Bytes]]) -> None:
        self.metadata = metadata
        self._maps: list[Any] = [data.base for _, data in shards]
        self._tensors: dict[str, tuple[TensorInfo, Bytes]] = {}
        for header, data in shards:
            for info in header.tensors:
                if info.name in self._tensors:
                    raise ModelLoadError(f"{header.path}: {info.name!r} is in two shards")
                start = header.data_offset + info.offset
                self._tensors[info.name] = info, data[start : start + info.size]

    @classmethod
    def open(cls, paths: Sequence[Path]) -> GGUFFile:
        """Open the file or the shards at `paths`, in any order.

        Raises `ModelLoadError` for shards that are missing or of different models, and the errors
        of `read_gguf_header` for a damaged file.
        """
        shards = [_opened(path) for path in paths]
        numbered = [_split(Metadata(header, data)) for header, data in shards]
        counts = {count for _, count, _ in numbered}
        if len(paths) > 1 or counts != {1}:
            _check_split(paths, numbered)
        order = sorted(range(len(shards)), key=lambda at: numbered[at][0])
        first, data = shards[order[0]]
        return cls(Metadata(first, data), [shards[at] for at in order])

    @property
    def names(self) -> tuple[str, ...]:
        """The names of all tensors, in file order."""
        return tuple(self._tensors)

    def release(self) -> None:
        """Give back the memory of the pages that were read; they are read again if needed."""
        for mapped in self._maps:
            if isinstance(mapped, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
                mapped.madvise(mmap.MADV_DONTNEED)

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def __iter__(self) -> Iterator[GGUFTensor]:
        return (self[name] for name in self._tensors)

    def __getitem__(self, name: str) -> GGUFTensor:
        info, raw = self._tensors[name]
        return GGUFTensor(name, info.dtype, info.shape[::-1], raw)


def _opened(path: Path) -> tuple[GGUFHeader, Bytes]:
    header = read_gguf_header(path)
    if header.big_endian:
        raise ModelLoadError(f"{path}: is big-endian", hint="convert it to little-endian")
    if header.version == 1:
        raise ModelLoadError(
            f"{path}: GGUF version 1, expected 2 or 3", hint="convert the model again"
        )
    try:
        return header, np.memmap(path, dtype=np.uint8, mode="r")
    except OSError as error:
        raise ModelpackError(f"{path}: cannot be mapped: {error.strerror}") from error


def _split(metadata: Metadata) -> tuple[int, int, int | None]:
    """Return a shard's index, the number of shards, and the number of all tensors if known."""
    total = metadata.integer("split.tensors.count", -1)
    return (
        metadata.integer("split.no", 0),
        metadata.integer("split.count", 1) or 1,
        None if total < 0 else total,
    )


def _check_split(paths: Sequence[Path], numbered: Sequence[tuple[int, int, int | None]]) -> None:
    name = paths[0]
    counts = {count for _, count, _ in numbered}
    if len(counts) > 1 or counts == {1}:
        raise ModelLoadError(
            f"{name}: the {len(paths)} GGUF files are not shards of one model",
            hint="package one weight file, or all shards of one model",
        )
    (count,) = counts
    got = sorted(number for number, _, _ in numbered)
    if got != list(range(count)):
        missing = sorted(set(range(count)) - set(got))
        listed = ", ".join(str(number + 1) for number in missing[:5])
        raise ModelLoadError(
            f"{name}: expected shards 1 to {count}, got {len(got)}"
            + (f"; missing {listed}" if missing else "; some of them twice")
        )
