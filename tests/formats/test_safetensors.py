from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy
import pytest
import safetensors
import safetensors.numpy

from modelpack.errors import WeightFormatError
from modelpack.formats.safetensors import DTYPE_BITS, read_safetensors_header
from modelpack.formats.tensors import TensorInfo
from tests.formats.builders import as_file, safetensors_text
from tests.formats.builders import safetensors as build
from tests.formats.vectors import MODEL_SAFETENSORS


def test_the_vector() -> None:
    header = read_safetensors_header(as_file(MODEL_SAFETENSORS))
    assert dict(header.metadata) == {"format": "pt"}
    assert header.tensors == (
        TensorInfo("b", "F32", (3,), 0, 12),
        TensorInfo("a", "F16", (2, 2), 12, 8),
    )
    assert (header.data_offset, header.file_size) == (152, 172)


@pytest.mark.parametrize("dtype", sorted(DTYPE_BITS))
def test_every_dtype(dtype: str) -> None:
    size = 4 * DTYPE_BITS[dtype] // 8 * 2
    text, data = safetensors_text({"x": (dtype, (2, 4), size)})
    raw = build(text, data)
    (tensor,) = read_safetensors_header(as_file(raw)).tensors
    assert tensor == TensorInfo("x", dtype, (2, 4), 0, size)
    safetensors.deserialize(raw)  # the crate supports it, too


def test_what_the_safetensors_package_writes(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    tensors: dict[str, numpy.ndarray[Any, Any]] = {
        "ä": numpy.zeros((3, 5), dtype=numpy.float16),
        "scalar": numpy.zeros((), dtype=numpy.int64),
        "empty": numpy.zeros((0, 7), dtype=numpy.float32),
        'quote"\\\n': numpy.zeros(3, dtype=numpy.bool_),
    }
    safetensors.numpy.save_file(tensors, path, metadata={"format": "np", "k": "v\t\u2028"})
    header = read_safetensors_header(path)
    assert dict(header.metadata) == {"format": "np", "k": "v\t\u2028"}
    assert {t.name: (t.shape, t.elements) for t in header.tensors} == {
        name: (array.shape, array.size) for name, array in tensors.items()
    }
    raw = path.read_bytes()
    for tensor in header.tensors:
        start = header.data_offset + tensor.offset
        assert raw[start : start + tensor.size] == tensors[tensor.name].tobytes()


def test_metadata_that_is_no_text() -> None:
    metadata: dict[str, Any] = {
        "n": None,
        "i": 1_000_000,
        "f": 1.5,
        "t": True,
        "l": [1, "a"],
        "o": {"b": [], "a": {"c": 1}},
        "s": "plain",
    }
    text, data = safetensors_text({}, metadata)
    assert dict(read_safetensors_header(as_file(build(text, data))).metadata) == {
        "n": "<nil>",
        "i": "1e+06",
        "f": "1.5",
        "t": "true",
        "l": "[1 a]",
        "o": "map[a:map[c:1] b:[]]",
        "s": "plain",
    }


def test_null_metadata_and_white_space() -> None:
    text = b'{ "__metadata__" :\r\n null ,\t"x" : { "shape" : [ ] , "dtype" : "U8" , '
    text += b'"data_offsets" : [ 0 , 1 ] } }\n  '
    header = read_safetensors_header(as_file(build(text, 1)))
    assert header.tensors == (TensorInfo("x", "U8", (), 0, 1),)
    assert not header.metadata


@pytest.mark.parametrize("escape", ["", '\\n\\u00e4"'.replace('"', '\\"')])
def test_long_metadata(escape: str) -> None:
    # Longer than the reading window, with escapes at any place relative to it.
    long = '"' + ("xyz" + escape) * 60_000 + '"'
    text = b'{"__metadata__":{"long":' + long.encode() + b',"after":"b"}}'
    metadata = read_safetensors_header(as_file(build(text))).metadata
    assert metadata == {"long": json.loads(long), "after": "b"}


def one(text: str) -> bytes:
    """Return a file with the tensor `x` described by `text`."""
    return build(b'{"x":' + text.encode() + b"}", 8)


GOOD = '"dtype":"U8","shape":[8],"data_offsets":[0,8]'
HALF = '{"dtype":"U8","shape":[4],"data_offsets":[%d,%d]}'


def two(*offsets: int, second: str = "b") -> bytes:
    """Return a file with the tensors `a` and `second`, of four bytes each."""
    text = f'{{"a":{HALF},"{second}":{HALF}}}' % offsets
    return build(text.encode(), 8)


def meta(value: bytes) -> bytes:
    """Return a file with this JSON text as the metadata value `a`, at byte 29."""
    return build(b'{"__metadata__":{"a":' + value + b"}}")


#: The byte of the second tensor's description; each %d is one digit.
B_AT = 8 + len('{"a":,"b":') + len(HALF) - 2

# Name of the fault, file, byte in the error, part of the message.
INVALID: list[tuple[str, bytes, int, str]] = [
    ("five bytes", b"\x02\0\0\0\0", 0, "expected a safetensors file"),
    ("no object", build(b"[]"), 0, "expected a safetensors file"),
    ("white space first", build(b' {"x":1}'), 0, "expected a safetensors file"),
    ("length beyond the file", build(b"{}", length=3), 0, "at least 11 bytes, got 10"),
    ("length beyond the limit", build(b"{}", length=2**63), 0, "the limit is 100000000"),
    ("no end", build(b'{"x"'), 9, "expected a key and a colon"),
    ("an open object", build(b'{"__metadata__":{}'), 26, "the JSON text ends too early"),
    ("no comma", build(b'{"__metadata__":{} "x":1}'), 27, "expected ',' or '}', got b'\"'"),
    ("a comma too many", build(b'{"__metadata__":{},}'), 27, "expected a key and a colon"),
    ("text after", build(b"{}}"), 10, "more text follows the JSON object"),
    ("a key that is none", build(b"{1:2}"), 9, "expected a key and a colon"),
    ("not UTF-8", build(b'{"x\xff":1}'), 11, "the text is not UTF-8"),
    ("half a surrogate pair", build(b'{"\\ud800":1}'), 9, "half of a surrogate pair"),
    ("a bad escape", build(b'{"\\x":1}'), 9, "not JSON: Invalid"),
    ("a control character", build(b'{"a\nb":1}'), 9, "expected a key and a colon"),
    ("no description", one("1"), 13, "expected an object, got b'1'"),
    ("objects inside", one('{"a":{}}'), 13, "an object that contains no object"),
    ("too long a description", one('{"a":"' + "x" * 5000 + '"}'), 13, "at most 4096 bytes"),
    ("a field twice", one('{"shape":[],' + GOOD + "}"), 13, "a key occurs twice"),
    ("NaN", one('{"shape":[NaN]}'), 13, "NaN is not JSON"),
    ("no dtype", one('{"shape":[8],"data_offsets":[0,8]}'), 13, "unknown dtype 'None'"),
    ("unknown dtype", one("{" + GOOD.replace("U8", "Q4") + "}"), 13, "unknown dtype 'Q4'"),
    ("lower-case dtype", one("{" + GOOD.replace("U8", "u8") + "}"), 13, "unknown dtype 'u8'"),
    ("no shape", one('{"dtype":"U8","data_offsets":[0,8]}'), 13,
     "needs a shape, a list of at most 8 dimensions"),
    ("dimensions", one("{" + GOOD.replace("[8]", str([1] * 9)) + "}"), 13,
     "needs a shape, a list of at most 8 dimensions"),
    ("a negative dimension", one("{" + GOOD.replace("[8]", "[-8]") + "}"), 13, "dimension -8"),
    ("a float", one("{" + GOOD.replace("[8]", "[8.0]") + "}"), 13, "dimension 8.0"),
    ("a boolean", one("{" + GOOD.replace("[8]", "[true]") + "}"), 13, "dimension True"),
    (
        "overflow",
        one("{" + GOOD.replace("[8]", "[4294967296,2147483648,0]") + "}"),
        13,
        "overflows 63 bits",
    ),
    ("three offsets", one("{" + GOOD.replace("[0,8]", "[0,8,8]") + "}"), 13, "data_offsets"),
    ("offsets reversed", one("{" + GOOD.replace("[0,8]", "[8,0]") + "}"), 13, "data_offsets"),
    ("offsets negative", one("{" + GOOD.replace("[0,8]", "[-8,0]") + "}"), 13, "data_offsets"),
    ("half a byte", one('{"dtype":"F4","shape":[7],"data_offsets":[0,4]}'), 13, "inside a byte"),
    ("another size", one("{" + GOOD.replace("[8]", "[9]") + "}"), 13, "takes 9 bytes"),
    ("a gap at the start", one("{" + GOOD.replace("[0,8]", "[1,9]") + "}"), 13, "leaves a gap"),
    ("a gap", two(0, 4, 5, 9), B_AT, "'b' leaves a gap: its data starts at 5, expected 4"),
    ("an overlap", two(0, 4, 3, 7), B_AT, "'b' overlaps the previous one"),
    ("the same bytes", two(0, 4, 0, 4), B_AT, "'b' overlaps the previous one"),
    ("cut", MODEL_SAFETENSORS[:-1], 171, "expected at least 172 bytes, got 171"),
    ("more", MODEL_SAFETENSORS + b"x", 172, "1 bytes follow the last tensor"),
    ("a tensor twice", two(0, 4, 4, 8, second="a"), B_AT, "'a' occurs twice"),
    ("metadata twice", build(b'{"__metadata__":{},"__metadata__":{}}'), 42, "occurs twice"),
    ("metadata key twice", build(b'{"__metadata__":{"a":"1","a":"2"}}'), 37, "'a' occurs twice"),
    ("metadata is no object", build(b'{"__metadata__":[]}'), 24, "expected an object"),
    ("metadata is not null", build(b'{"__metadata__":nul}'), 24, "not JSON"),
    ("a number out of range", meta(b'1e999'), 29, "out of range"),
    ("a long integer", meta(b"1" + b"0" * 390), 29, "out of range"),
    ("metadata NaN", meta(b'NaN'), 29, "NaN is not JSON"),
    ("nested deeply", meta(b"[" * 17 + b"]" * 17), 29, "deeper than 16"),
    ("nested absurdly", meta(b"[" * 60_000), 29, "expected a JSON value"),
    ("metadata not UTF-8", meta(b'["\xff"]'), 29, "not UTF-8"),
    ("a string without end", meta(b'"' + b"x" * 90_000), 90_032, "the end of a string"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("raw", "offset", "message"), [row[1:] for row in INVALID], ids=[row[0] for row in INVALID]
)
def test_invalid(raw: bytes, offset: int, message: str) -> None:
    with pytest.raises(WeightFormatError) as caught:
        read_safetensors_header(as_file(raw, "w.safetensors"))
    assert message in caught.value.message
    assert (caught.value.path, caught.value.offset) == ("w.safetensors", offset)


def test_every_cut_of_the_vector_is_an_error() -> None:
    for end in range(len(MODEL_SAFETENSORS)):
        with pytest.raises(WeightFormatError):
            read_safetensors_header(as_file(MODEL_SAFETENSORS[:end]))


def test_data_in_another_order_than_the_header() -> None:
    header = read_safetensors_header(as_file(two(4, 8, 0, 4)))
    assert [(t.name, t.offset) for t in header.tensors] == [("a", 4), ("b", 0)]
