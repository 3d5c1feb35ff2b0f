"""Parse the header of a safetensors file within limits; no tensor data is read.

Source: the format's README and the checks of the `safetensors` crate: the tensors cover the data
section exactly, in any order, without a gap.

The `safetensors` library is the reference in tests only. It maps local files, and the headers of
models in registries are read by range requests. And it parses a header whole: one of 90 MB with
1.35 million tensors costs it 1.1 GB of memory and 15 s, and this parser, which refuses it at its
limit of tensors, 19 MB and 0.7 s (safetensors 0.8).
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, TypeGuard

from modelpack.errors import WeightFormatError
from modelpack.formats.json_reader import MAX_LONG_STRING_BYTES, JSONText, LongString
from modelpack.formats.reader import WeightFile, WeightSource, opened, quoted
from modelpack.formats.tensors import (
    MAX_COUNT,
    MAX_DIMENSIONS,
    MAX_TENSORS,
    Shapes,
    TensorInfo,
    in_data_order,
    repeated_name,
)
from modelpack.formats.units import any_value

#: The limit of the crate. The header is read in windows, so its length alone takes no memory.
MAX_HEADER_BYTES = 100_000_000
#: The memory, roughly, that parsed names, values and tensor descriptions may take.
MAX_KEPT_BYTES = 40 * 1024 * 1024
#: Entries of `__metadata__`.
MAX_METADATA = 16_384
#: One tensor's description in the header.
MAX_DESCRIPTION_BYTES = 4096

#: Bits of one element.
DTYPE_BITS: Mapping[str, int] = MappingProxyType(
    {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6}
    | dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0"), 8)
    | dict.fromkeys(("F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8)
    | dict.fromkeys(("I16", "U16", "F16", "BF16"), 16)
    | dict.fromkeys(("I32", "U32", "F32"), 32)
    | dict.fromkeys(("C64", "F64", "I64", "U64"), 64)
)

_METADATA = "__metadata__"
_LENGTH_BYTES = 8
# The approximate bytes that Python's objects for one tensor and one metadata value take.
_TENSOR_COST, _VALUE_COST = 350, 250


@dataclass(frozen=True, slots=True)
class SafetensorsHeader:
    """Everything in a safetensors file except the tensor data.

    `metadata` is `__metadata__`. The format allows strings only; some files have other values,
    which `metadata` holds as the text of Go's `%v`, as configs do.
    """

    path: str
    file_size: int
    metadata: Mapping[str, str]
    tensors: tuple[TensorInfo, ...]
    data_offset: int


def read_safetensors_header(source: WeightSource) -> SafetensorsHeader:
    """Return the header of the safetensors file `source`.

    Raises `WeightFormatError` with the byte for text that is not JSON, repeated keys, unknown
    dtypes, shapes that do not match the number of bytes, and tensors that overlap, leave gaps or
    lie outside the file.
    """
    with opened(source) as file:
        return _Parser(file).header()


class _Parser:
    def __init__(self, file: WeightFile) -> None:
        self._file = file
        if not looks_like_safetensors(file.head(), file.size):
            raise self._not_safetensors()
        length = int.from_bytes(file.read(0, _LENGTH_BYTES), "little")
        self._data_offset = _LENGTH_BYTES + length
        self._text = JSONText(file, _LENGTH_BYTES, self._data_offset)
        self._kept = 0
        self._starts = array("Q")

    def header(self) -> SafetensorsHeader:
        metadata: dict[str, str | LongString] | None = None
        infos: list[TensorInfo] = []
        shapes = Shapes()
        for name in self._text.keys():  # noqa: SIM118 (no dict)
            if name != _METADATA:
                infos.append(self._tensor(name, shapes))
            elif metadata is None:
                metadata = self._metadata()
            else:
                raise self._text.error(f"the key {_METADATA!r} occurs twice")
        self._text.finish()
        again = repeated_name(infos)
        if again is not None:
            raise self._fault(infos[again].name, "occurs twice", self._starts[again])
        self._check_layout(infos)
        return SafetensorsHeader(
            path=self._file.path,
            file_size=self._file.size,
            metadata=MappingProxyType(self._fetched(metadata or {})),
            tensors=tuple(infos),
            data_offset=self._data_offset,
        )

    def _metadata(self) -> dict[str, str | LongString]:
        text = self._text
        if text.peek() == b"n":  # null, which the crate accepts as well
            if text.value() is not None:
                raise text.error(f"{_METADATA} is not an object")
            return {}
        metadata: dict[str, str | LongString] = {}
        for key in text.keys():  # noqa: SIM118 (no dict)
            if key in metadata:
                raise text.error(f"the key {quoted(key)} occurs twice in {_METADATA}")
            if len(metadata) >= MAX_METADATA:
                raise text.error(f"{_METADATA} has more entries than the limit of {MAX_METADATA}")
            value = text.value()
            if not isinstance(value, LongString):
                value = any_value(value)
                self._keep(_memory(value))
            self._keep(_VALUE_COST + _memory(key))
            metadata[key] = value
        return metadata

    def _fetched(self, metadata: dict[str, str | LongString]) -> dict[str, str]:
        """Return `metadata` with the text of its long strings; call it after the other checks."""
        long = sum(value.length for value in metadata.values() if isinstance(value, LongString))
        if long > MAX_LONG_STRING_BYTES:
            raise self._file.error(
                f"long strings in {_METADATA} are {long} bytes, the limit is"
                f" {MAX_LONG_STRING_BYTES}",
                _LENGTH_BYTES,
            )
        return {
            key: self._text.text_of(value) if isinstance(value, LongString) else value
            for key, value in metadata.items()
        }

    def _tensor(self, name: str, shapes: Shapes) -> TensorInfo:
        if len(self._starts) >= MAX_TENSORS:
            raise self._text.error(f"more tensors than the limit of {MAX_TENSORS}")
        fields, start = self._text.flat_object(MAX_DESCRIPTION_BYTES)
        self._keep(_TENSOR_COST + _memory(name))
        self._starts.append(start)
        dtype, shape, offsets = fields.get("dtype"), fields.get("shape"), fields.get("data_offsets")
        if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
            raise self._fault(name, f"has the unknown dtype {str(dtype)[:40]!r}", start)
        bits = DTYPE_BITS[dtype]
        if not isinstance(shape, list) or len(shape) > MAX_DIMENSIONS:
            raise self._fault(
                name, f"needs a shape, a list of at most {MAX_DIMENSIONS} dimensions", start
            )
        for dimension in shape:
            if type(dimension) is not int or dimension < 0:
                raise self._fault(name, f"has the invalid dimension {str(dimension)[:40]}", start)
            bits *= dimension
            if bits > MAX_COUNT:
                raise self._fault(name, "has a size that overflows 63 bits", start)
        if bits % 8:
            raise self._fault(name, f"ends inside a byte: {dtype} {shape}", start)
        if not _are_offsets(offsets):
            raise self._fault(name, "needs data_offsets, a list of a start and an end", start)
        first, size = offsets[0], offsets[1] - offsets[0]
        if bits // 8 != size:
            raise self._fault(
                name,
                f"takes {bits // 8} bytes ({dtype} {shape}), but its data_offsets {offsets} are"
                f" {size} bytes apart",
                start,
            )
        return TensorInfo(name, _DTYPE_NAMES[dtype], shapes.shared(tuple(shape)), first, size)

    def _fault(self, name: str, fault: str, offset: int) -> WeightFormatError:
        return self._file.error(f"the tensor {quoted(name)} {fault}", offset)

    def _check_layout(self, infos: list[TensorInfo]) -> None:
        end = 0
        for at in in_data_order(infos):
            info = infos[at]
            if info.offset != end:
                fault = "overlaps the previous one" if info.offset < end else "leaves a gap"
                raise self._fault(
                    info.name,
                    f"{fault}: its data starts at {info.offset}, expected {end}",
                    self._starts[at],
                )
            end += info.size
        size = self._data_offset + end
        if size > self._file.size:
            raise self._file.truncated(self._file.size, size)
        if size < self._file.size:
            raise self._file.error(
                f"{self._file.size - size} bytes follow the last tensor, expected none", size
            )

    def _keep(self, size: int) -> None:
        self._kept += size
        if self._kept > MAX_KEPT_BYTES:
            raise self._text.error(f"the header holds more than {MAX_KEPT_BYTES} bytes of values")

    def _not_safetensors(self) -> WeightFormatError:
        """Return the most specific error for a file that does not start with a header."""
        file, head = self._file, self._file.head()
        length = int.from_bytes(head[:_LENGTH_BYTES], "little")
        if not head[_LENGTH_BYTES:].startswith(b"{"):
            return file.foreign("a safetensors file")
        if length <= MAX_HEADER_BYTES:
            return file.truncated(0, _LENGTH_BYTES + length)
        return file.error(f"the header is {length} bytes long, the limit is {MAX_HEADER_BYTES}", 0)


def looks_like_safetensors(head: bytes, size: int) -> bool:
    """Return whether a file of `size` bytes that starts with `head` can be a safetensors file."""
    length = int.from_bytes(head[:_LENGTH_BYTES], "little")
    return (
        head[_LENGTH_BYTES : _LENGTH_BYTES + 1] == b"{"
        and 2 <= length <= MAX_HEADER_BYTES
        and _LENGTH_BYTES + length <= size
    )


#: All tensors of a dtype share one string object, to save memory.
_DTYPE_NAMES = {name: name for name in DTYPE_BITS}


def _are_offsets(value: Any) -> TypeGuard[list[int]]:
    is_pair = isinstance(value, list) and list(map(type, value)) == [int, int]
    return is_pair and 0 <= value[0] <= value[1] <= MAX_COUNT


def _memory(text: str) -> int:
    return len(text) if text.isascii() else 4 * len(text)
