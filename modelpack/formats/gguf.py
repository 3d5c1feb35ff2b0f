"""GGUF: the header of a model file for ggml, read within limits.

Source: docs/gguf.md in ggml, versions 1 to 3, little and big endian. Long arrays (vocabularies)
are walked over, not kept; tensor data is never read.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from modelpack.formats.gguf_cursor import Cursor
from modelpack.formats.gguf_metadata import MetadataReader, MetadataValue, ValueType
from modelpack.formats.reading import WeightFile, WeightSource, opened, quoted
from modelpack.formats.tensor_types import TENSOR_TYPES
from modelpack.formats.tensors import (
    MAX_COUNT,
    MAX_DIMENSIONS,
    MAX_TENSORS,
    Shapes,
    TensorInfo,
    in_data_order,
    repeated_name,
)

#: Key-value pairs; models have dozens.
MAX_PAIRS = 16_384
#: ggml takes names of 63 bytes; image models have been seen with longer ones.
MAX_NAME_BYTES = 65_535

DEFAULT_ALIGNMENT = 32

_MAGIC = b"GGUF"
#: The magic as a number of a big-endian writer; files have it either way.
_SWAPPED_MAGIC = b"FUGG"
_MAX_VERSION = 3
# What the objects of one tensor take, about.
_TENSOR_COST = 350


@dataclass(frozen=True, slots=True)
class GGUFHeader:
    """Everything in a GGUF file but the tensor data.

    `infos_end` is the byte after the last tensor description, `data_offset` the byte where
    tensor data starts; tensor offsets count from there. `metadata` keeps the order of the file.
    """

    path: str
    file_size: int
    version: int
    big_endian: bool
    #: The magic was written in the byte order of the file, not as the four letters.
    swapped_magic: bool
    #: Some string, key or name has no bytes. It is allowed, but one reader stumbles over it.
    empty_string: bool
    metadata: Mapping[str, MetadataValue]
    tensors: tuple[TensorInfo, ...]
    alignment: int
    infos_end: int
    data_offset: int


def read_gguf_header(source: WeightSource) -> GGUFHeader:
    """Return the header of the GGUF file `source`.

    Raises `WeightFormatError`, naming the byte, for anything that a loader could trip over:
    unknown versions and types, duplicate keys or tensors, counts and lengths beyond the file or
    the limits, tensors outside the file or over each other.
    """
    with opened(source) as file:
        return _Parser(file).header()


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
        # A version that fits in 16 bits only when read the other way round tells the byte order.
        self._big_endian = self._swapped_magic or (version != 0 and version & 0xFFFF == 0)
        if self._big_endian:
            version = int.from_bytes(start[4:], "big")
        if not 1 <= version <= _MAX_VERSION:
            raise file.error(f"GGUF version {version}, expected 1 to {_MAX_VERSION}", 4)
        self._version = version
        order = ">" if self._big_endian else "<"
        self._cursor = Cursor(file, 8, order=order, version=version)
        self._info_starts = array("Q")

    def header(self) -> GGUFHeader:
        cursor = self._cursor
        length_bytes = 4 if self._version == 1 else 8
        # The smallest tensor and pair: a name of no bytes, and then no dimension or one byte.
        tensors = self._count("tensors", MAX_TENSORS, length_bytes + 16)
        pairs = self._count("metadata pairs", MAX_PAIRS, length_bytes + 5)
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
            raise cursor.error(f"{count} {what}, the limit is {limit}", start)
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
        # llama.cpp takes powers of two, docs/gguf.md multiples of 8.
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
                f"a row of the tensor {quoted(name)} is no multiple of the {kind.block} elements"
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
            # An empty tensor at the end may lie behind padding that nobody wrote.
            allowed = file_size if info.size else file_size + alignment
            stop = data_offset + first + info.size
            if stop > allowed:
                raise self._file.error(
                    f"the tensor {quoted(name)} ends at byte {stop} of the file, which has"
                    f" {file_size}",
                    self._info_starts[at],
                    hint="the download or copy was probably cut short; fetch the file again",
                )
            if first < end:
                raise self._file.error(
                    f"the tensor {quoted(name)} overlaps {quoted(last)}", self._info_starts[at]
                )
            end, last = first + info.size, name
