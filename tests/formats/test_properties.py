"""Generated headers: valid ones are parsed unchanged, others are format errors."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import safetensors
from hypothesis import given, settings
from hypothesis import strategies as st

from modelpack.errors import WeightFormatError
from modelpack.formats.gguf import KEPT_ARRAY_ITEMS, MetadataArray, ValueType, read_gguf_header
from modelpack.formats.safetensors import DTYPE_BITS, read_safetensors_header
from modelpack.formats.statistics import gguf_statistics
from modelpack.formats.tensors import TENSOR_TYPES
from tests.formats.builders import GGUF, Pair, Tensor, as_file, safetensors_text
from tests.formats.builders import safetensors as build

V = ValueType

# Any bytes, decoded as the reader does.
texts = st.one_of(
    st.text(max_size=20).filter(lambda text: text.isprintable()),
    st.binary(max_size=20).map(lambda raw: raw.decode(errors="surrogateescape")),
)


def integers(bits: int, *, signed: bool) -> st.SearchStrategy[int]:
    low = -(2 ** (bits - 1)) if signed else 0
    return st.integers(low, low + 2**bits - 1)


SCALARS: dict[int, st.SearchStrategy[Any]] = {
    V.UINT8: integers(8, signed=False),
    V.INT8: integers(8, signed=True),
    V.UINT16: integers(16, signed=False),
    V.INT16: integers(16, signed=True),
    V.UINT32: integers(32, signed=False),
    V.INT32: integers(32, signed=True),
    V.UINT64: integers(64, signed=False),
    V.INT64: integers(64, signed=True),
    V.FLOAT32: st.floats(width=32),
    V.FLOAT64: st.floats(),
    V.BOOL: st.booleans(),
    V.STRING: texts,
}
array_lengths = st.sampled_from([0, 1, 2, KEPT_ARRAY_ITEMS, KEPT_ARRAY_ITEMS + 1])


@st.composite
def values(draw: st.DrawFn) -> tuple[int, Any, int]:
    kind = draw(st.sampled_from(sorted(V)))
    if kind != V.ARRAY:
        return kind, draw(SCALARS[kind]), 0
    items = draw(st.sampled_from(sorted(SCALARS)))
    item, count = draw(SCALARS[items]), draw(array_lengths)
    return kind, [item] * count, items


@st.composite
def gguf_files(draw: st.DrawFn) -> GGUF:
    keys = draw(
        st.lists(texts.filter(lambda key: key != "general.alignment"), max_size=5, unique=True)
    )
    pairs = []
    for key in keys:
        kind, value, items = draw(values())
        pairs.append(Pair(key, kind, value, items))
    tensors = []
    for name in draw(st.lists(texts, max_size=5, unique=True)):
        number = draw(st.sampled_from(sorted(TENSOR_TYPES)))
        block = TENSOR_TYPES[number].block
        first = draw(st.integers(0, 3)) * block
        rest = draw(st.lists(st.integers(0, 4), max_size=3))
        tensors.append(Tensor(name, (first, *rest), number))
    alignment = draw(st.sampled_from([None, 8, 32, 64]))
    if alignment:
        pairs.append(Pair("general.alignment", V.UINT32, alignment))
    return GGUF(
        pairs,
        tensors,
        version=draw(st.integers(1, 3)),
        order=draw(st.sampled_from("<>")),
        alignment=alignment or 32,
    )


def same(a: Any, b: Any) -> bool:
    """Return whether two values are equal and of one type, NaN being equal to itself."""
    if isinstance(a, float) and isinstance(b, float) and math.isnan(a):
        return math.isnan(b)
    return type(a) is type(b) and bool(a == b)


@pytest.mark.long
@given(gguf_files())
@settings(max_examples=150, deadline=None)
def test_a_valid_gguf_comes_back(file: GGUF) -> None:
    header = read_gguf_header(as_file(file.build()))
    assert (header.version, header.big_endian) == (file.version, file.order == ">")
    assert list(header.metadata) == [pair.key for pair in file.pairs]
    for pair, entry in zip(file.pairs, header.metadata.values(), strict=True):
        assert entry.type == pair.type
        if not isinstance(entry.value, MetadataArray):
            assert same(entry.value, pair.value)
            continue
        array = entry.value
        assert (array.element_type, array.length) == (pair.items, len(pair.value))
        if array.length <= KEPT_ARRAY_ITEMS:
            assert array.items is not None
            assert all(map(same, array.items, pair.value))
        else:
            assert array.items is None
    assert [(t.name, t.dtype, t.shape, t.offset, t.size) for t in header.tensors] == [
        (t.name, TENSOR_TYPES[t.type].name, tuple(t.shape), offset, t.size)
        for t, offset in zip(file.tensors, file.offsets(), strict=True)
    ]


def _check_place(error: WeightFormatError) -> None:
    assert error.path == "model"
    assert error.offset is not None


edits = st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), min_size=1, max_size=4)


def mutated(raw: bytes, changes: list[tuple[int, int]], cut: int | None) -> bytes:
    out = bytearray(raw)
    for at, byte in changes:
        out[at % len(out)] = byte
    return bytes(out if cut is None else out[: cut % len(out)])


@pytest.mark.long
@given(gguf_files(), edits, st.none() | st.integers(0, 10_000))
@settings(max_examples=300, deadline=None)
def test_a_broken_gguf_is_a_format_error(
    file: GGUF, changes: list[tuple[int, int]], cut: int | None
) -> None:
    raw = mutated(file.build(), changes, cut)
    try:
        header = read_gguf_header(as_file(raw))
        for exact in (False, True):
            gguf_statistics([header], exact=exact)
    except WeightFormatError as error:
        _check_place(error)
        return
    for tensor in header.tensors:
        assert not tensor.size or header.data_offset + tensor.offset + tensor.size <= len(raw)


@st.composite
def safetensors_files(draw: st.DrawFn) -> tuple[dict[str, Any], dict[str, str] | None]:
    names = st.text(max_size=12).filter(lambda name: name != "__metadata__" and _encodes(name))
    tensors: dict[str, Any] = {}
    for name in draw(st.lists(names, max_size=6, unique=True)):
        dtype = draw(st.sampled_from(sorted(DTYPE_BITS)))
        shape = draw(st.lists(st.integers(0, 4), max_size=3))
        if DTYPE_BITS[dtype] % 8:
            shape = [8, *shape]
        size = math.prod(shape) * DTYPE_BITS[dtype] // 8
        tensors[name] = (dtype, shape, size)
    texts = st.text(max_size=30).filter(_encodes)
    return tensors, draw(st.none() | st.dictionaries(texts, texts, max_size=4))


def _encodes(text: str) -> bool:
    return text.isascii() or not any("\ud800" <= letter <= "\udfff" for letter in text)


@pytest.mark.long
@given(safetensors_files(), st.sampled_from([None, 1]), st.booleans())
@settings(max_examples=150, deadline=None)
def test_a_valid_safetensors_comes_back(
    file: tuple[dict[str, Any], dict[str, str] | None], indent: int | None, raw_text: bool
) -> None:
    tensors, metadata = file
    text, size = safetensors_text(tensors, metadata)
    # The same header with other white space and escapes.
    text = json.dumps(json.loads(text), indent=indent, ensure_ascii=raw_text).encode()
    header = read_safetensors_header(as_file(build(text, size)))
    assert dict(header.metadata) == (metadata or {})
    assert [(t.name, t.dtype, list(t.shape), t.size) for t in header.tensors] == [
        (name, *description) for name, description in tensors.items()
    ]


@pytest.mark.long
@given(safetensors_files(), edits, st.none() | st.integers(0, 10_000))
@settings(max_examples=400, deadline=None)
def test_a_broken_safetensors_is_a_format_error(
    file: tuple[dict[str, Any], dict[str, str] | None],
    changes: list[tuple[int, int]],
    cut: int | None,
) -> None:
    text, size = safetensors_text(*file)
    raw = mutated(build(text, size), changes, cut)
    try:
        header = read_safetensors_header(as_file(raw))
    except WeightFormatError as error:
        _check_place(error)
        return
    # The crate accepts every file that we accept, except metadata that is not text.
    try:
        theirs = safetensors.deserialize(raw)
    except safetensors.SafetensorError as error:
        assert "invalid type" in str(error)  # noqa: PT017
        return
    assert sorted(name for name, _ in theirs) == sorted(t.name for t in header.tensors)
