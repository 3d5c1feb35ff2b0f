"""Parse the header of a GGUF file within limits: metadata and tensor descriptions.

`Cursor` reads the file forward in windows and owns the byte order, the width of lengths and the
limits on memory; `MetadataReader` reads the key-value pairs; `read_gguf_header` checks the tensors
and returns a `GGUFHeader`. Source: docs/gguf.md of ggml.
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum
from types import MappingProxyType

from modelpack.errors import WeightFormatError
from modelpack.formats.reader import CUT_SHORT, WeightFile, WeightSource, opened, quoted
from modelpack.formats.tensors import (
    MAX_COUNT,
    MAX_DIMENSIONS,
    MAX_TENSORS,
    TENSOR_TYPES,
    Shapes,
    TensorInfo,
    in_data_order,
    repeated_name,
)

#: The tensor descriptions must end before this byte.
MAX_HEADER_BYTES = 128 * 1024 * 1024
#: Strings and nested arrays that the parser steps over, in all arrays of one file. The largest
#: vocabularies have 262,144 tokens and twice as many merges.
MAX_WALKED_ITEMS = 4 * 1024 * 1024
#: The memory, roughly, that parsed names, values and tensor descriptions may take.
MAX_KEPT_BYTES = 40 * 1024 * 1024

_WINDOW = 64 * 1024


class Cursor:
    """A position in the header of `file`; methods move it forward or raise `WeightFormatError`."""

    def __init__(self, file: WeightFile, position: int, *, order: str, version: int) -> None:
        self._file = file
        self._base = position
        self._at = 0
        self._window = b""
        self._end = min(file.size, MAX_HEADER_BYTES)
        self._order = order
        self._u32 = struct.Struct(order + "I")
        # GGUF v1 counts with 32 bits.
        self._length = self._u32 if version == 1 else struct.Struct(order + "Q")
        self._tails: dict[int, struct.Struct] = {}
        #: Whether the cursor has passed an empty string, key or name.
        self.empty_string = False
        self._walked = 0
        self._kept = 0

    @property
    def position(self) -> int:
        """The offset in the file of the next byte."""
        return self._base + self._at

    def remaining(self) -> int:
        """Return the number of bytes from the position to the end of the file."""
        return self._file.size - self.position

    def u32(self) -> int:
        return self._unpack(self._u32)

    def length(self) -> int:
        """Return a count or a length: 32 bits in version 1, otherwise 64."""
        return self._unpack(self._length)

    def unpack(self, code: str) -> tuple[int | float, ...]:
        """Return the numbers of the `struct` format `code`."""
        packed = struct.Struct(self._order + code)
        return packed.unpack(self.take(packed.size))

    def tensor_tail(self, dimensions: int) -> tuple[int, ...]:
        """Return the fields after the number of dimensions: each dimension, type, offset."""
        packed = self._tails.get(dimensions)
        if packed is None:
            length = "I" if self._length is self._u32 else "Q"
            packed = struct.Struct(f"{self._order}{dimensions}{length}IQ")
            self._tails[dimensions] = packed
        return packed.unpack(self.take(packed.size))

    def take(self, length: int) -> bytes:
        """Return the next `length` bytes. The caller limits `length`."""
        self._need(length)
        start = self._at
        self._at += length
        return self._window[start : self._at]

    def text(self, what: str, limit: int) -> str:
        """Return a string of at most `limit` bytes; bytes that are not UTF-8 become surrogates."""
        start = self.position
        length = self.length()
        if length > limit:
            raise self.error(f"{what} is {length} bytes long, the limit is {limit}", start)
        return self.kept_text(length)

    def kept_text(self, length: int) -> str:
        """Return the next `length` bytes as text, counted as memory. The caller limits `length`."""
        self.empty_string |= not length
        self.keep(length)
        text = self.take(length).decode(errors="surrogateescape")
        if not text.isascii():  # a single wide character makes Python use up to 4 bytes for each
            self.keep(3 * length)
        return text

    def text_at(self, offset: int, length: int) -> str:
        """Return the string of `length` bytes at `offset`, without moving the cursor."""
        return self._file.read(offset, length).decode(errors="surrogateescape")

    def skip(self, length: int) -> None:
        """Skip `length` bytes without reading them."""
        start = self.position
        self._at += length
        if self.position > self._end:
            raise self._beyond(start, self.position)

    def skip_strings(self, count: int) -> None:
        """Skip `count` strings; read only their lengths."""
        self.walk(count)
        unpack, width = self._length.unpack_from, self._length.size
        while count:
            self._need(width)
            window, at, left = self._window, self._at, count
            last = before = len(window) - width
            for _ in range(count):
                if at > last:
                    break
                before = at
                length = unpack(window, at)[0]
                if not length:
                    self.empty_string = True
                at += width + length
                left -= 1
            if self._base + at > self._end:
                raise self._beyond(self._base + before, self._base + at)
            self._at, count = at, left

    def walk(self, items: int) -> None:
        """Count `items` array items that the parser visits one by one; check the limit."""
        self._walked += items
        if self._walked > MAX_WALKED_ITEMS:
            raise self.error(f"the metadata holds more than {MAX_WALKED_ITEMS} array items")

    def keep(self, size: int) -> None:
        """Count `size` bytes of memory that the parsed header takes; check the limit."""
        self._kept += size
        if self._kept > MAX_KEPT_BYTES:
            raise self.error(f"the header holds more than {MAX_KEPT_BYTES} bytes of values")

    def error(self, message: str, offset: int | None = None) -> WeightFormatError:
        """Return an error with `message`, at `offset` or at the cursor."""
        return self._file.error(message, self.position if offset is None else offset)

    def _unpack(self, packed: struct.Struct) -> int:
        at = self._at
        if at + packed.size > len(self._window):
            self._need(packed.size)
            at = self._at
        self._at = at + packed.size
        value: int = packed.unpack_from(self._window, at)[0]
        return value

    def _need(self, length: int) -> None:
        """Fill the window so that it holds the next `length` bytes."""
        if self._at + length <= len(self._window):
            return
        start = self.position
        if start + length > self._end:
            raise self._beyond(start, start + length)
        size = min(max(length, _WINDOW), self._end - start)
        self._window = self._file.read(start, size)
        self._base, self._at = start, 0

    def _beyond(self, start: int, needed: int) -> WeightFormatError:
        if needed > self._file.size:
            return self._file.truncated(start, needed)
        return self.error(f"the header is longer than the limit of {MAX_HEADER_BYTES} bytes", start)


#: docs/gguf.md limits keys to 65,535 bytes.
MAX_KEY_BYTES = 65_535
#: Longer strings are fetched only after the rest of the header was checked.
LONG_STRING_BYTES = 65_536
#: The long strings of one file together. A whole tokenizer.json inside one string is 33 MB.
MAX_LONG_STRING_BYTES = 64 * 1024 * 1024
#: One string in a kept array.
MAX_ITEM_BYTES = 1024 * 1024
#: Longer arrays are checked but not kept.
KEPT_ARRAY_ITEMS = 256
#: Levels of arrays inside arrays.
MAX_ARRAY_DEPTH = 4

# The approximate bytes that Python's objects for one pair and one array item take.
_PAIR_COST, _ITEM_COST = 300, 48
# Skipping one nested array takes about as long as skipping this many strings.
_NESTED_ARRAY_STEPS = 32


class ValueType(IntEnum):
    """The type of a metadata value, with the number that files hold."""

    UINT8 = 0
    INT8 = 1
    UINT16 = 2
    INT16 = 3
    UINT32 = 4
    INT32 = 5
    FLOAT32 = 6
    BOOL = 7
    STRING = 8
    ARRAY = 9
    UINT64 = 10
    INT64 = 11
    FLOAT64 = 12


#: Types of a fixed size: their `struct` code and bytes.
_FIXED: dict[int, tuple[str, int]] = {
    ValueType.UINT8: ("B", 1),
    ValueType.INT8: ("b", 1),
    ValueType.UINT16: ("H", 2),
    ValueType.INT16: ("h", 2),
    ValueType.UINT32: ("I", 4),
    ValueType.INT32: ("i", 4),
    ValueType.FLOAT32: ("f", 4),
    ValueType.BOOL: ("B", 1),
    ValueType.UINT64: ("Q", 8),
    ValueType.INT64: ("q", 8),
    ValueType.FLOAT64: ("d", 8),
}


@dataclass(frozen=True, slots=True)
class MetadataArray:
    """An array; `items` is None if the array is nested or too long to keep."""

    element_type: ValueType
    length: int
    items: tuple[int | float | bool | str, ...] | None


@dataclass(frozen=True, slots=True)
class MetadataValue:
    """A metadata value and the byte of the file where it starts."""

    type: ValueType
    value: int | float | bool | str | MetadataArray
    offset: int


class MetadataReader:
    """Reads the metadata pairs at `cursor`."""

    def __init__(self, cursor: Cursor) -> None:
        self._cursor = cursor
        self._long: dict[str, tuple[int, int]] = {}

    def read(self, count: int, *, until: str | None = None) -> dict[str, MetadataValue]:
        """Return the next `count` pairs, or those to the key `until`.

        `fetch_long_strings` adds the text of long strings.
        """
        cursor = self._cursor
        metadata: dict[str, MetadataValue] = {}
        for _ in range(count):
            start = cursor.position
            cursor.keep(_PAIR_COST)
            key = cursor.text("the key", MAX_KEY_BYTES)
            if key in metadata:
                raise cursor.error(f"the key {quoted(key)} occurs twice", start)
            kind = self._value_type(f"the value of {quoted(key)}")
            metadata[key] = self._value(key, kind)
            if key == until:
                break
        return metadata

    def fetch_long_strings(self, metadata: dict[str, MetadataValue]) -> None:
        """Add the long strings that `read` left empty to `metadata`."""
        total = sum(length for _, length in self._long.values())
        if total > MAX_LONG_STRING_BYTES:
            raise self._cursor.error(
                f"long strings in the metadata are {total} bytes, the limit is"
                f" {MAX_LONG_STRING_BYTES}"
            )
        for key, (offset, length) in self._long.items():
            text = self._cursor.text_at(offset, length)
            metadata[key] = MetadataValue(ValueType.STRING, text, metadata[key].offset)

    def _value_type(self, what: str) -> ValueType:
        start = self._cursor.position
        number = self._cursor.u32()
        if number > ValueType.FLOAT64:
            raise self._cursor.error(f"{what} has the unknown type {number}", start)
        return ValueType(number)

    def _value(self, key: str, kind: ValueType) -> MetadataValue:
        cursor, start = self._cursor, self._cursor.position
        if kind is ValueType.ARRAY:
            return MetadataValue(kind, self._array(key, 1), start)
        if kind is ValueType.STRING:
            return MetadataValue(kind, self._string(key), start)
        value = cursor.unpack(_FIXED[kind][0])[0]
        if kind is ValueType.BOOL:
            return MetadataValue(kind, self._boolean(value, start), start)
        return MetadataValue(kind, value, start)

    def _string(self, key: str) -> str:
        cursor, start = self._cursor, self._cursor.position
        length = cursor.length()
        if length <= LONG_STRING_BYTES:
            return cursor.kept_text(length)
        if length > MAX_LONG_STRING_BYTES:
            raise cursor.error(
                f"{quoted(key)} is {length} bytes long, the limit is {MAX_LONG_STRING_BYTES}", start
            )
        self._long[key] = (cursor.position, length)
        cursor.skip(length)
        return ""

    def _boolean(self, byte: int | float, offset: int) -> bool:
        if byte not in (0, 1):
            raise self._cursor.error(f"a boolean is {byte}, expected 0 or 1", offset)
        return byte == 1

    def _array(self, key: str, depth: int) -> MetadataArray:
        cursor = self._cursor
        kind = self._value_type(f"the array {quoted(key)}")
        length_at = cursor.position
        length = cursor.length()
        # The smallest string, that of version 1, and the smallest array have at least 4 bytes.
        smallest = _FIXED[kind][1] if kind in _FIXED else 4
        if length * smallest > cursor.remaining():
            raise cursor.error(
                f"the array {quoted(key)} has {length} items, which do not fit in the"
                f" {cursor.remaining()} bytes that follow",
                length_at,
            )
        if kind is ValueType.ARRAY:
            self._skip_arrays(key, length, depth)
            return MetadataArray(kind, length, None)
        if length > KEPT_ARRAY_ITEMS:
            if kind is ValueType.STRING:
                cursor.skip_strings(length)
            else:
                cursor.skip(length * smallest)
            return MetadataArray(kind, length, None)
        cursor.keep(length * _ITEM_COST)
        if kind is ValueType.STRING:
            what = f"an item of {quoted(key)}"
            texts = tuple([cursor.text(what, MAX_ITEM_BYTES) for _ in range(length)])
            return MetadataArray(kind, length, texts)
        start = cursor.position
        numbers = cursor.unpack(f"{length}{_FIXED[kind][0]}")
        if kind is ValueType.BOOL:
            numbers = tuple(self._boolean(byte, start + at) for at, byte in enumerate(numbers))
        return MetadataArray(kind, length, numbers)

    def _skip_arrays(self, key: str, count: int, depth: int) -> None:
        cursor = self._cursor
        if depth >= MAX_ARRAY_DEPTH:
            raise cursor.error(
                f"the arrays of {quoted(key)} are nested deeper than {MAX_ARRAY_DEPTH}"
            )
        cursor.walk(count * _NESTED_ARRAY_STEPS)
        for _ in range(count):
            kind = self._value_type(f"an array in {quoted(key)}")
            length = cursor.length()
            if kind is ValueType.ARRAY:
                self._skip_arrays(key, length, depth + 1)
            elif kind is ValueType.STRING:
                cursor.skip_strings(length)
            else:
                cursor.skip(length * _FIXED[kind][1])


#: Metadata pairs of one file; models have dozens.
MAX_PAIRS = 16_384
#: ggml accepts names of up to 63 bytes; some image models have longer ones.
MAX_NAME_BYTES = 65_535

DEFAULT_ALIGNMENT = 32

_ARCHITECTURE = "general.architecture"
_MAGIC = b"GGUF"
#: Some big-endian writers store the magic as a number, which reverses its bytes.
_SWAPPED_MAGIC = b"FUGG"
_MAX_VERSION = 3
# The approximate bytes that Python's objects for one tensor take.
_TENSOR_COST = 350


@dataclass(frozen=True, slots=True)
class GGUFHeader:
    """Everything in a GGUF file except the tensor data.

    `infos_end` is the byte after the last tensor description. `data_offset` is the byte where
    tensor data starts; tensor offsets count from there. `metadata` keeps the order of the file.
    """

    path: str
    file_size: int
    version: int
    big_endian: bool
    #: The bytes of the magic are reversed, as in some big-endian files.
    swapped_magic: bool
    #: A string, key or name is empty. The format allows it, but Docker Model Runner cannot read it.
    empty_string: bool
    metadata: Mapping[str, MetadataValue]
    tensors: tuple[TensorInfo, ...]
    alignment: int
    infos_end: int
    data_offset: int


def read_gguf_header(source: WeightSource) -> GGUFHeader:
    """Return the header of the GGUF file `source`.

    Raises `WeightFormatError` with the byte for unknown versions and types, repeated keys or
    tensors, counts and lengths beyond the file or the limits, and tensors that overlap or lie
    outside the file.
    """
    with opened(source) as file:
        return _Parser(file).header()


def read_gguf_architecture(source: WeightSource) -> str | None:
    """Return the `general.architecture` of the GGUF file `source`, None if it has no such text.

    Only the metadata up to it is read; most files start with it. Raises `WeightFormatError`.
    """
    with opened(source) as file:
        return _Parser(file).architecture()


class _Parser:
    def __init__(self, file: WeightFile) -> None:
        self._file = file
        start = file.read(0, min(8, file.size))
        if start[:4] not in (_MAGIC, _SWAPPED_MAGIC):
            raise file.foreign("a GGUF file")
        if len(start) < 8:
            raise file.truncated(4, 8)
        self._swapped_magic = start[:4] == _SWAPPED_MAGIC
        version = int.from_bytes(start[4:], "little")
        # The low 16 bits are zero only if the version was written in big-endian order.
        self._big_endian = self._swapped_magic or (version != 0 and version & 0xFFFF == 0)
        if self._big_endian:
            version = int.from_bytes(start[4:], "big")
        if not 1 <= version <= _MAX_VERSION:
            raise file.error(f"GGUF version {version}, expected 1 to {_MAX_VERSION}", 4)
        self._version = version
        order = ">" if self._big_endian else "<"
        self._cursor = Cursor(file, 8, order=order, version=version)
        self._info_starts = array("Q")

    def architecture(self) -> str | None:
        _, pairs = self._counts()
        found = MetadataReader(self._cursor).read(pairs, until=_ARCHITECTURE).get(_ARCHITECTURE)
        return found.value if found is not None and isinstance(found.value, str) else None

    def _counts(self) -> tuple[int, int]:
        """Return the numbers of tensors and of metadata pairs."""
        length_bytes = 4 if self._version == 1 else 8
        # The smallest tensor has an empty name and no dimension; the smallest pair has an empty
        # key and a value of one byte.
        tensors = self._count("tensors", MAX_TENSORS, length_bytes + 16)
        return tensors, self._count("metadata pairs", MAX_PAIRS, length_bytes + 5)

    def header(self) -> GGUFHeader:
        cursor = self._cursor
        tensors, pairs = self._counts()
        reader = MetadataReader(cursor)
        metadata = reader.read(pairs)
        alignment = self._alignment(metadata)
        infos = self._tensors(tensors)
        infos_end = cursor.position
        data_offset = infos_end + -infos_end % alignment
        self._check_layout(infos, alignment, data_offset)
        reader.fetch_long_strings(metadata)
        return GGUFHeader(
            path=self._file.path,
            file_size=self._file.size,
            version=self._version,
            big_endian=self._big_endian,
            swapped_magic=self._swapped_magic,
            empty_string=cursor.empty_string,
            metadata=MappingProxyType(metadata),
            tensors=infos,
            alignment=alignment,
            infos_end=infos_end,
            data_offset=data_offset,
        )

    def _count(self, what: str, limit: int, smallest: int) -> int:
        cursor, start = self._cursor, self._cursor.position
        count = cursor.length()
        if count > limit:
            raise cursor.error(f"the file has {count} {what}, the limit is {limit}", start)
        if count * smallest > cursor.remaining():
            raise cursor.error(
                f"{count} {what} do not fit in the {cursor.remaining()} bytes that follow", start
            )
        return count

    def _alignment(self, metadata: dict[str, MetadataValue]) -> int:
        entry = metadata.get("general.alignment")
        if entry is None:
            return DEFAULT_ALIGNMENT
        if entry.type is not ValueType.UINT32 or not isinstance(entry.value, int):
            raise self._cursor.error(
                f"general.alignment is {entry.type.name}, expected UINT32", entry.offset
            )
        alignment = entry.value
        # llama.cpp requires a power of two, docs/gguf.md a multiple of 8.
        if alignment == 0 or (alignment & (alignment - 1) and alignment % 8):
            raise self._cursor.error(
                f"general.alignment is {alignment}, expected a power of two or a multiple of 8",
                entry.offset,
            )
        return alignment

    def _tensors(self, count: int) -> tuple[TensorInfo, ...]:
        infos: list[TensorInfo] = []
        shapes = Shapes()
        for _ in range(count):
            start = self._cursor.position
            infos.append(self._tensor(start, shapes))
            self._info_starts.append(start)
        again = repeated_name(infos)
        if again is not None:
            raise self._file.error(
                f"the tensor {quoted(infos[again].name)} occurs twice", self._info_starts[again]
            )
        return tuple(infos)

    def _tensor(self, start: int, shapes: Shapes) -> TensorInfo:
        cursor = self._cursor
        cursor.keep(_TENSOR_COST)
        name = cursor.text("the name of a tensor", MAX_NAME_BYTES)
        dimensions = cursor.u32()
        if dimensions > MAX_DIMENSIONS:
            raise cursor.error(
                f"the tensor {quoted(name)} has {dimensions} dimensions, the limit is"
                f" {MAX_DIMENSIONS}",
                start,
            )
        *dimension_list, number, offset = cursor.tensor_tail(dimensions)
        shape = shapes.shared(tuple(dimension_list))
        kind = TENSOR_TYPES.get(number)
        if kind is None:
            raise cursor.error(f"the tensor {quoted(name)} has the unknown type {number}", start)
        elements = 1
        for dimension in shape:
            elements *= dimension
            if elements > MAX_COUNT:
                raise cursor.error(f"the tensor {quoted(name)} has more elements than 2^63", start)
        if elements % kind.block or (shape and shape[0] % kind.block):
            raise cursor.error(
                f"a row of the tensor {quoted(name)} is not a multiple of the {kind.block} elements"
                f" in a block of {kind.name}",
                start,
            )
        return TensorInfo(name, kind.name, shape, offset, elements // kind.block * kind.size)

    def _check_layout(
        self, infos: tuple[TensorInfo, ...], alignment: int, data_offset: int
    ) -> None:
        file_size = self._file.size
        end, last = 0, ""
        for at in in_data_order(infos):
            info = infos[at]
            name, first = info.name, info.offset
            if first % alignment:
                raise self._file.error(
                    f"the tensor {quoted(name)} starts at {first} in the tensor data, which is not"
                    f" aligned to {alignment}",
                    self._info_starts[at],
                )
            # An empty tensor at the end may follow padding that the writer left out.
            allowed = file_size if info.size else file_size + alignment
            stop = data_offset + first + info.size
            if stop > allowed:
                raise self._file.error(
                    f"the tensor {quoted(name)} ends at byte {stop} of the file, which has"
                    f" {file_size}",
                    self._info_starts[at],
                    hint=CUT_SHORT,
                )
            if first < end:
                raise self._file.error(
                    f"the tensor {quoted(name)} overlaps {quoted(last)}", self._info_starts[at]
                )
            end, last = first + info.size, name
