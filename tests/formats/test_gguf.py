from __future__ import annotations

import math
import struct
from pathlib import Path
from typing import Any

import gguf
import numpy
import pytest

from modelpack.errors import WeightFormatError
from modelpack.formats.gguf import (
    MetadataArray,
    ValueType,
    read_gguf_architecture,
    read_gguf_header,
)
from modelpack.formats.tensors import TENSOR_TYPES, TensorInfo
from tests.formats.builders import GGUF, Pair, Tensor, array_pair, as_file, text_pair
from tests.formats.vectors import TINY_GGUF

V = ValueType


def test_the_vector() -> None:
    header = read_gguf_header(as_file(TINY_GGUF))
    assert (header.version, header.big_endian, header.alignment) == (3, False, 32)
    assert {key: entry.value for key, entry in header.metadata.items()} == {
        "general.architecture": "llama",
        "general.name": "tiny <&> v1",
        "llama.context_length": 2048,
    }
    assert header.tensors == (TensorInfo("token_embd.weight", "F32", (4, 2), 0, 32),)
    assert (header.infos_end, header.data_offset, header.file_size) == (205, 224, 256)
    assert header.tensors[0].elements == 8


SCALARS: list[tuple[ValueType, Any]] = [
    (V.UINT8, 255),
    (V.INT8, -128),
    (V.UINT16, 65535),
    (V.INT16, -32768),
    (V.UINT32, 2**32 - 1),
    (V.INT32, -(2**31)),
    (V.FLOAT32, 0.5),
    (V.BOOL, True),
    (V.STRING, "häß 😀\n"),
    (V.STRING, "not UTF-8: \udcff\udce2\udc82"),
    (V.STRING, ""),
    (V.UINT64, 2**64 - 1),
    (V.INT64, -(2**63)),
    (V.FLOAT64, -1e300),
]


@pytest.mark.parametrize("version", [1, 2, 3])
@pytest.mark.parametrize("order", ["<", ">"])
def test_every_value_type_in_every_layout(version: int, order: str) -> None:
    pairs = [Pair(f"s{at}", kind, value) for at, (kind, value) in enumerate(SCALARS)]
    pairs += [array_pair(f"a{at}", kind, [value] * 3) for at, (kind, value) in enumerate(SCALARS)]
    built = GGUF(pairs, [Tensor("x", (3, 2)), Tensor("y", ())], version=version, order=order)
    header = read_gguf_header(as_file(built.build()))
    assert (header.version, header.big_endian) == (version, order == ">")
    assert list(header.metadata) == [pair.key for pair in pairs]
    for at, (kind, value) in enumerate(SCALARS):
        entry = header.metadata[f"s{at}"]
        assert (entry.type, entry.value) == (kind, value)
        assert type(entry.value) is type(value)
        array = header.metadata[f"a{at}"].value
        assert array == MetadataArray(kind, 3, (value,) * 3)
    assert header.infos_end == built.infos_end
    assert [(t.shape, t.size, t.offset) for t in header.tensors] == [((3, 2), 24, 0), ((), 4, 32)]


def test_the_architecture_alone() -> None:
    """Nothing after it is read, and a value that is no text is none."""
    built = GGUF([text_pair("general.name", "x"), text_pair("general.architecture", "clip")], [])
    raw = built.build()
    end = raw.index(b"clip") + len(b"clip")
    assert read_gguf_architecture(as_file(raw[:end])) == "clip"
    with pytest.raises(WeightFormatError):
        read_gguf_architecture(as_file(raw[: end - 1]))
    number = GGUF([Pair("general.architecture", V.UINT32, 7)], []).build()
    assert read_gguf_architecture(as_file(number)) is None
    assert read_gguf_architecture(as_file(GGUF([], []).build())) is None


def test_pairs_after_an_empty_key() -> None:
    raw = GGUF([Pair("", V.UINT8, 1), Pair("general.architecture", V.UINT8, 2)], []).build()
    assert list(read_gguf_header(as_file(raw)).metadata) == ["", "general.architecture"]


def test_both_magics_of_big_endian_files() -> None:
    for magic in (b"GGUF", b"FUGG"):
        raw = GGUF([], [Tensor("x")], order=">", magic=magic).build()
        header = read_gguf_header(as_file(raw))
        assert header.big_endian
        assert header.swapped_magic == (magic == b"FUGG")


def test_special_numbers() -> None:
    values = [float("nan"), float("inf"), float("-inf"), -0.0]
    raw = GGUF([array_pair("a", V.FLOAT64, values)]).build()
    array = read_gguf_header(as_file(raw)).metadata["a"].value
    assert isinstance(array, MetadataArray)
    assert array.items
    assert math.isnan(array.items[0])  # type: ignore[arg-type]
    assert array.items[1:3] == (float("inf"), float("-inf"))
    assert math.copysign(1, array.items[3]) == -1  # type: ignore[arg-type]


@pytest.mark.parametrize("number", sorted(TENSOR_TYPES))
def test_every_tensor_type(number: int) -> None:
    kind = TENSOR_TYPES[number]
    raw = GGUF([], [Tensor("w", (2 * kind.block, 3), number)]).build()
    (tensor,) = read_gguf_header(as_file(raw)).tensors
    assert tensor == TensorInfo("w", kind.name, (2 * kind.block, 3), 0, 6 * kind.size)


def test_long_arrays_are_walked_over() -> None:
    pairs = [
        array_pair("tokens", V.STRING, [f"token {at}" for at in range(20_000)]),
        array_pair("scores", V.FLOAT32, [0.25] * 20_000),
        array_pair("nested", V.ARRAY, [(V.UINT8, [1, 2]), (V.STRING, ["a", ""]), (V.INT32, [])]),
        text_pair("after", "still in step"),
    ]
    header = read_gguf_header(as_file(GGUF(pairs, [Tensor("x")]).build()))
    assert header.metadata["tokens"].value == MetadataArray(V.STRING, 20_000, None)
    assert header.metadata["scores"].value == MetadataArray(V.FLOAT32, 20_000, None)
    assert header.metadata["nested"].value == MetadataArray(V.ARRAY, 3, None)
    assert header.metadata["after"].value == "still in step"


def test_long_strings_are_whole() -> None:
    text = "ä" * 100_000
    pairs = [text_pair("template", text), text_pair("after", "b")]
    header = read_gguf_header(as_file(GGUF(pairs).build()))
    assert [entry.value for entry in header.metadata.values()] == [text, "b"]


def test_numbers_only_are_not_read() -> None:
    pairs = [array_pair("scores", V.FLOAT32, [0.25] * 200_000)]
    file = as_file(GGUF(pairs, [Tensor("x", (1_000_000,))]).build())
    read_gguf_header(file)
    assert file.size > 4_800_000
    assert file.bytes_read < 200_000


def test_other_alignments_and_orders() -> None:
    tensors = [Tensor("b", (16,), offset=64), Tensor("a", (16,), offset=0), Tensor("e", (0,))]
    pairs = [Pair("general.alignment", V.UINT32, 64)]
    header = read_gguf_header(as_file(GGUF(pairs, tensors, alignment=64).build()))
    assert header.data_offset % 64 == 0
    assert [t.name for t in header.tensors] == ["b", "a", "e"]


def test_no_tensors_need_no_padding() -> None:
    header = read_gguf_header(as_file(GGUF([text_pair("k", "v")], data=False).build()))
    assert header.tensors == ()
    assert header.data_offset > header.file_size


def after(tensors: int, pairs: int, code: str, *values: Any) -> bytes:
    """Return a file that ends with `values` in place of the first pair or tensor."""
    extra = struct.pack(code, *values)
    return GGUF(counts=(tensors, pairs), data=False, extra=extra).build()


BAD_ALIGNMENT = Pair("general.alignment", V.UINT32, 12)
TWO = [Tensor("a", (16,), offset=0), Tensor("b", (16,), offset=32)]

# Name of the fault, file, byte in the error, part of the message.
INVALID: list[tuple[str, bytes, int, str]] = [
    ("only a magic", b"GGUF", 4, "expected at least 8 bytes, got 4"),
    ("version 0", b"GGUF" + bytes(40), 4, "GGUF version 0, expected 1 to 3"),
    ("version 4", GGUF(version=4).build(), 4, "GGUF version 4, expected 1 to 3"),
    ("version 4, big endian", GGUF(version=4, order=">").build(), 4, "GGUF version 4"),
    ("no counts", b"GGUF\x03\0\0\0\x01", 8, "expected at least 16 bytes, got 9"),
    ("tensors", GGUF(counts=(2**63, 0)).build(), 8, "9223372036854775808 tensors, the limit"),
    ("pairs", GGUF(counts=(0, 2**64 - 1)).build(), 16, "18446744073709551615 metadata pairs"),
    ("tensors do not fit", GGUF(counts=(50, 0)).build(), 8, "50 tensors do not fit"),
    ("pairs do not fit", GGUF(counts=(0, 50)).build(), 16, "50 metadata pairs do not fit"),
    (
        "a pair too many",
        GGUF([text_pair("k", "v" * 40)], counts=(0, 2), data=False).build(),
        85,
        "ends too early: expected at least 93 bytes, got 85",
    ),
    (
        "a key beyond the file",
        after(0, 1, "<QQQ", 40_000, 0, 0),
        32,
        "ends too early: expected at least 40032 bytes, got 48",
    ),
    (
        "a key beyond the limit",
        after(0, 1, "<QQQ", 2**40, 0, 0),
        24,
        "the key is 1099511627776 bytes long, the limit is 65535",
    ),
    ("a key twice", GGUF([text_pair("k", "v")] * 2).build(), 46, "the key 'k' occurs twice"),
    (
        "a value type",
        after(0, 1, "<Q1sIQ", 1, b"k", 13, 0),
        33,
        "the value of 'k' has the unknown type 13",
    ),
    (
        "a boolean",
        GGUF([Pair("k", V.BOOL, True)], data=False).build()[:-1] + b"\x02",
        37,
        "a boolean is 2, expected 0 or 1",
    ),
    (
        "a boolean in an array",
        GGUF([array_pair("k", V.BOOL, [True, False])], data=False).build()[:-1] + b"\xff",
        50,
        "a boolean is 255, expected 0 or 1",
    ),
    (
        "an array beyond the file",
        after(0, 1, "<Q1sIIQ", 1, b"k", 9, 8, 2**60),
        41,
        "the array 'k' has 1152921504606846976 items, which do not fit",
    ),
    (
        "an array type",
        after(0, 1, "<Q1sIIQ", 1, b"k", 9, 99, 0),
        37,
        "the array 'k' has the unknown type 99",
    ),
    (
        "a token beyond the file",
        GGUF([array_pair("k", V.STRING, ["x"] * 300)], data=False).build()[:-9]
        + struct.pack("<Qc", 2**63, b"x"),
        49 + 299 * 9,
        "ends too early: expected at least 9223372036854778556 bytes",
    ),
    (
        "arrays in arrays in arrays",
        GGUF(
            [
                array_pair(
                    "k", V.ARRAY, [(V.ARRAY, [(V.ARRAY, [(V.ARRAY, [(V.UINT8, [1])])])])]
                )
            ]
        ).build(),
        85,
        "the arrays of 'k' are nested deeper than 4",
    ),
    (
        "alignment 0",
        GGUF([Pair("general.alignment", V.UINT32, 0)], TWO).build(),
        53,
        "general.alignment is 0, expected a power of two or a multiple of 8",
    ),
    ("alignment 12", GGUF([BAD_ALIGNMENT], TWO).build(), 53, "general.alignment is 12"),
    (
        "alignment of the wrong type",
        GGUF([Pair("general.alignment", V.UINT64, 32)], TWO).build(),
        53,
        "general.alignment is UINT64, expected UINT32",
    ),
    ("a tensor twice", GGUF([], [Tensor("a"), Tensor("a")]).build(), 57, "'a' occurs twice"),
    (
        "dimensions",
        after(1, 0, "<Q1sIQQQ", 1, b"w", 9, 1, 1, 1),
        24,
        "'w' has 9 dimensions, the limit is 8",
    ),
    (
        "a tensor type",
        after(1, 0, "<Q1sIQIQ", 1, b"w", 1, 8, 42, 0),
        24,
        "'w' has the unknown type 42",
    ),
    (
        "a removed tensor type",
        after(1, 0, "<Q1sIQIQ", 1, b"w", 1, 8, 4, 0),
        24,
        "'w' has the unknown type 4",
    ),
    (
        "elements overflow",
        after(1, 0, "<Q1sI3QIQ", 1, b"w", 3, 2**32, 2**31, 0, 0, 0),
        24,
        "'w' has more elements than 2^63",
    ),
    (
        "no whole blocks",
        after(1, 0, "<Q1sI2QIQ", 1, b"w", 2, 16, 2, 2, 0),
        24,
        "a row of the tensor 'w' is not a multiple of the 32 elements in a block of Q4_0",
    ),
    (
        "an offset out of line",
        GGUF([], [Tensor("a", offset=8)], extra=bytes(64)).build(),
        24,
        "'a' starts at 8 in the tensor data, which is not aligned to 32",
    ),
    (
        "an offset outside",
        GGUF([], [Tensor("a", offset=2**62)], data=False, extra=bytes(64)).build(),
        24,
        "'a' ends at byte 4611686018427388000 of the file, which has 121",
    ),
    (
        "an empty tensor outside",
        GGUF([], [Tensor("a", (0,), offset=2**62)], data=False).build(),
        24,
        "'a' ends at byte",
    ),
    ("a tensor cut", GGUF([], [Tensor("a")]).build()[:-1], 24, "ends at byte 96 of the file"),
    (
        "tensors over each other",
        GGUF([], TWO).build(),
        57,
        "the tensor 'b' overlaps 'a'",
    ),
]  # fmt: skip


@pytest.mark.parametrize(
    ("raw", "offset", "message"), [row[1:] for row in INVALID], ids=[row[0] for row in INVALID]
)
def test_invalid(raw: bytes, offset: int, message: str) -> None:
    with pytest.raises(WeightFormatError) as caught:
        read_gguf_header(as_file(raw, "w.gguf"))
    assert message in caught.value.message
    assert (caught.value.path, caught.value.offset) == ("w.gguf", offset)


def test_every_cut_of_the_vector_is_an_error() -> None:
    for end in range(len(TINY_GGUF)):
        with pytest.raises(WeightFormatError):
            read_gguf_header(as_file(TINY_GGUF[:end]))


def test_what_the_gguf_package_writes(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("Tiny")
    writer.add_context_length(4096)
    writer.add_rope_freq_base(10000.5)
    writer.add_token_list([f"<{at}>" for at in range(1000)])
    writer.add_array("tiny.list", [1, 2, 3])
    writer.add_bool("tiny.flag", True)
    writer.add_tensor("token_embd.weight", numpy.ones((4, 64), dtype=numpy.float32))
    writer.add_tensor("blk.0.weight", numpy.ones((3, 5), dtype=numpy.float16))
    quantized = gguf.quants.quantize(
        numpy.ones((2, 64), dtype=numpy.float32), gguf.GGMLQuantizationType.Q8_0
    )
    writer.add_tensor("q", quantized, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    header = read_gguf_header(path)
    theirs = gguf.GGUFReader(path)
    assert header.data_offset == theirs.data_offset
    assert len(header.tensors) == 3
    for ours, other in zip(header.tensors, theirs.tensors, strict=True):
        assert ours.name == other.name
        assert ours.dtype == other.tensor_type.name
        assert list(ours.shape) == [int(size) for size in other.shape]
        assert (ours.size, ours.elements) == (int(other.n_bytes), int(other.n_elements))
        assert header.data_offset + ours.offset == other.data_offset
    for key, entry in header.metadata.items():
        contents = theirs.fields[key].contents()
        if isinstance(entry.value, MetadataArray):
            assert entry.value.length == len(contents)
            assert entry.value.items is None or list(entry.value.items) == contents
        else:
            assert entry.value == contents
