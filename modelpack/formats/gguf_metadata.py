"""The metadata of a GGUF file: typed values under keys.

Short values are kept, long arrays are walked over, and long strings are left for the end: they
are fetched once the whole header has proved sound, so that a broken file costs little.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

from modelpack.formats.gguf_cursor import Cursor
from modelpack.formats.reading import quoted

#: docs/gguf.md: a key is at most 65,535 bytes.
MAX_KEY_BYTES = 65_535
#: Strings longer than this are fetched only when the rest of the header has proved sound.
LONG_STRING_BYTES = 65_536
#: All long strings of one file together. A whole tokenizer.json inside one string is 33 MB.
MAX_LONG_STRING_BYTES = 64 * 1024 * 1024
#: One string in an array that is kept.
MAX_ITEM_BYTES = 1024 * 1024
#: Arrays up to this length are kept.
KEPT_ARRAY_ITEMS = 256
#: Arrays inside arrays inside arrays inside arrays.
MAX_ARRAY_DEPTH = 4

# What the objects of one pair and of one array item take, about.
_PAIR_COST, _ITEM_COST = 300, 48
# An array inside an array takes about as long to walk over as this many strings.
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
    """An array; `items` is None where it was too long, or nested, to keep."""

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
    """Reads the pairs that follow in `cursor`."""

    def __init__(self, cursor: Cursor) -> None:
        self._cursor = cursor
        self._long: dict[str, tuple[int, int]] = {}

    def read(self, count: int) -> dict[str, MetadataValue]:
        """Return the next `count` pairs; long strings are empty until `fetch_long_strings`."""
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
        return metadata

    def fetch_long_strings(self, metadata: dict[str, MetadataValue]) -> None:
        """Put the long strings that `read` left out into `metadata`."""
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
        # The smallest item: an empty string of version 1, an empty array, or a number's size.
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
