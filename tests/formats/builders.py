"""Writers of GGUF, safetensors and ZIP bytes without checks, to build invalid files."""

from __future__ import annotations

import io
import json
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from modelpack.formats.gguf import ValueType
from modelpack.formats.reader import WeightFile
from modelpack.formats.tensors import TENSOR_TYPES

CODES = {
    ValueType.UINT8: "B",
    ValueType.INT8: "b",
    ValueType.UINT16: "H",
    ValueType.INT16: "h",
    ValueType.UINT32: "I",
    ValueType.INT32: "i",
    ValueType.FLOAT32: "f",
    ValueType.BOOL: "?",
    ValueType.UINT64: "Q",
    ValueType.INT64: "q",
    ValueType.FLOAT64: "d",
}


@dataclass(frozen=True)
class Pair:
    """A metadata pair; `items` is the element type if `type` is ARRAY."""

    key: str
    type: int
    value: Any
    items: int = ValueType.STRING


@dataclass(frozen=True)
class Tensor:
    name: str
    shape: Sequence[int] = (8,)
    type: int = 0
    offset: int | None = None

    @property
    def size(self) -> int:
        kind = TENSOR_TYPES[self.type]
        elements = 1
        for dimension in self.shape:
            elements *= dimension
        return elements // kind.block * kind.size


@dataclass
class GGUF:
    """The content of a GGUF file; `counts` overrides the numbers of tensors and pairs."""

    pairs: Sequence[Pair] = ()
    tensors: Sequence[Tensor] = ()
    version: int = 3
    order: str = "<"
    magic: bytes = b"GGUF"
    alignment: int = 32
    counts: tuple[int, int] | None = None
    data: bool = True
    extra: bytes = b""
    infos_end: int = field(default=0, init=False)

    def header(self) -> bytes:
        length = "I" if self.version == 1 else "Q"

        def pack(code: str, *values: Any) -> bytes:
            return struct.pack(self.order + code, *values)

        def text(value: str | bytes) -> bytes:
            raw = value.encode(errors="surrogateescape") if isinstance(value, str) else value
            return pack(length, len(raw)) + raw

        def value_bytes(kind: int, value: Any, items: int) -> bytes:
            if kind == ValueType.STRING:
                return text(value)
            if kind != ValueType.ARRAY:
                return pack(CODES[ValueType(kind)], value)
            head = pack("I" + length, items, len(value))
            if items == ValueType.ARRAY:  # each item: (element type, items)
                return head + b"".join(value_bytes(ValueType.ARRAY, i[1], i[0]) for i in value)
            return head + b"".join(value_bytes(items, item, 0) for item in value)

        counts = self.counts or (len(self.tensors), len(self.pairs))
        out = self.magic + pack("I" + 2 * length, self.version, *counts)
        for pair in self.pairs:
            out += text(pair.key) + pack("I", pair.type)
            out += value_bytes(pair.type, pair.value, pair.items)
        for tensor, offset in zip(self.tensors, self.offsets(), strict=True):
            out += text(tensor.name) + pack("I", len(tensor.shape))
            out += pack(f"{len(tensor.shape)}{length}", *tensor.shape)
            out += pack("IQ", tensor.type, offset)
        self.infos_end = len(out)
        return out

    def offsets(self) -> list[int]:
        at, offsets = 0, []
        for tensor in self.tensors:
            offsets.append(at if tensor.offset is None else tensor.offset)
            if tensor.offset is None:
                at += tensor.size + -tensor.size % self.alignment
        return offsets

    def build(self) -> bytes:
        out = self.header()
        if self.data:
            out += bytes(-len(out) % self.alignment)
            spans = zip(self.tensors, self.offsets(), strict=True)
            out += bytes(max((offset + tensor.size for tensor, offset in spans), default=0))
        return out + self.extra


def text_pair(key: str, value: str) -> Pair:
    return Pair(key, ValueType.STRING, value)


def array_pair(key: str, items: int, values: Sequence[Any]) -> Pair:
    return Pair(key, ValueType.ARRAY, values, items)


def safetensors_text(
    tensors: Mapping[str, tuple[str, Sequence[int], int]],
    metadata: Mapping[str, Any] | None = None,
) -> tuple[bytes, int]:
    """Return a header and the length of its data; tensors are (dtype, shape, bytes)."""
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": dict(metadata)}
    at = 0
    for name, (dtype, shape, size) in tensors.items():
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    return json.dumps(header, separators=(",", ":")).encode(), at


def safetensors(text: bytes, data: int | bytes = 0, length: int | None = None) -> bytes:
    """Return a file with this header text; `length` overrides its length field."""
    body = bytes(data) if isinstance(data, int) else data
    return struct.pack("<Q", len(text) if length is None else length) + text + body


class _Sparse(io.BytesIO):
    """Bytes followed by any number of zeros."""

    def read(self, size: int | None = -1, /) -> bytes:
        assert size is not None
        assert size >= 0
        at = self.tell()
        found = super().read(size)
        self.seek(at + size)
        return found + bytes(size - len(found))


def as_file(raw: bytes, path: str = "model", size: int | None = None) -> WeightFile:
    """Return `raw` as an open file; with `size`, filled with zeros up to that size."""
    if size is None:
        return WeightFile(io.BytesIO(raw), path=path, size=len(raw))
    return WeightFile(_Sparse(raw), path=path, size=size)
