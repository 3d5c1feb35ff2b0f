"""The memory and bytes read for hostile headers stay within limits."""

from __future__ import annotations

import struct
import tracemalloc
from collections.abc import Callable

import pytest

from modelpack.errors import WeightFormatError
from modelpack.formats import dduf, gguf, json_reader, safetensors
from modelpack.formats.dduf import read_dduf_header
from modelpack.formats.gguf import MAX_PAIRS, ValueType, read_gguf_header
from modelpack.formats.reader import WeightFile
from modelpack.formats.safetensors import MAX_METADATA, read_safetensors_header
from modelpack.formats.tensors import MAX_TENSORS
from tests.formats.builders import GGUF, array_pair, as_file
from tests.formats.builders import safetensors as build

V = ValueType
MB = 1_000_000
FAR = 2**50  # a file size that is larger than every claimed size


def cost(read: Callable[[WeightFile], object], file: WeightFile, message: str) -> tuple[int, int]:
    """Return the peak memory and the bytes read of `read`, which must fail with `message`."""
    tracemalloc.start()
    try:
        with pytest.raises(WeightFormatError, match=message):
            read(file)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    return peak, file.bytes_read


def gguf_start(tensors: int, pairs: int) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, tensors, pairs)


def string(raw: bytes) -> bytes:
    return struct.pack("<Q", len(raw)) + raw


LIES = [
    (gguf_start(2**64 - 1, 0), "tensors, the limit is 100000"),
    (gguf_start(0, 2**64 - 1), "metadata pairs, the limit is 16384"),
    (gguf_start(0, 1) + struct.pack("<Q", 2**63), "the key is 9223372036854775808 bytes"),
    (gguf_start(0, 1) + string(b"k") + struct.pack("<IQ", 8, 2**62), "'k' is 4611686018427387904"),
    (
        gguf_start(0, 1) + string(b"k") + struct.pack("<IIQ", 9, 8, 2**44),
        "more than 4194304 array items",
    ),
    (
        gguf_start(0, 1) + string(b"k") + struct.pack("<IIQ", 9, 9, 2**40),
        "more than 4194304 array items",
    ),
    (
        gguf_start(0, 1) + string(b"k") + struct.pack("<IIQ", 9, 12, 2**40),
        "the header is longer than the limit of 134217728 bytes",
    ),
]


@pytest.mark.parametrize(("raw", "message"), LIES)
def test_a_count_alone_costs_nothing(raw: bytes, message: str) -> None:
    # The file is padded, so that only the claimed size can stop the reader.
    file = as_file(raw + bytes(70_000), size=FAR)
    peak, read = cost(read_gguf_header, file, message)
    assert peak < MB
    assert read < 200_000


# Measure a sample of parsed tensors: tracing the maximum number would take long.
SAMPLE = 5_000
ALLOWED_PER_TENSOR = 45 * MB // MAX_TENSORS


def test_a_gguf_of_many_tensors() -> None:
    # Each is different; the second one lies outside the file.
    infos = b"".join(
        struct.pack("<Q32sIQQIQ", 32, b"%032d" % at, 2, at + 300, at % 7 + 300, 0, at * 2**49)
        for at in range(SAMPLE)
    )
    raw = gguf_start(SAMPLE, 0) + infos
    peak, read = cost(read_gguf_header, as_file(raw, size=2**48), "ends at byte")
    assert peak < SAMPLE * ALLOWED_PER_TENSOR
    assert read < len(raw) + 3 * 65_536


def test_a_gguf_of_many_small_arrays() -> None:
    # The reader's count of memory is close to the real use.
    items = struct.pack("<40Q", *range(2**60, 2**60 + 40))
    count = MAX_PAIRS // 8
    pairs = b"".join(
        string(b"%05d" % at) + struct.pack("<IIQ", 9, V.UINT64, 40) + items for at in range(count)
    )
    peak, _ = cost(read_gguf_header, as_file(gguf_start(1, count) + pairs), "ends too early")
    assert peak < count * (300 + 40 * 48) < gguf.MAX_KEPT_BYTES


def test_a_gguf_of_long_texts() -> None:
    # One wide character makes each text take four times its bytes in memory.
    text = string(b"x" * 65_000 + "😀".encode())
    pairs = b"".join(string(b"%05d" % at) + struct.pack("<I", 8) + text for at in range(400))
    peak, _ = cost(
        read_gguf_header,
        as_file(gguf_start(0, 400) + pairs),
        f"more than {gguf.MAX_KEPT_BYTES} bytes of values",
    )
    assert peak < 45 * MB


def test_long_strings_are_not_fetched_from_a_broken_gguf() -> None:
    text = string(b"x" * 30 * MB)
    raw = gguf_start(1, 2) + string(b"a") + struct.pack("<I", 8) + text
    raw += string(b"b") + struct.pack("<I", 8) + text + b"\xff" * 40
    peak, read = cost(read_gguf_header, as_file(raw), "ends too early|name of a tensor")
    assert peak < MB
    assert read < 200_000


def test_a_gguf_of_too_many_long_strings() -> None:
    text = string(b"x" * 30 * MB)
    raw = b"".join(string(b"%d" % at) + struct.pack("<I", 8) + text for at in range(3))
    peak, _ = cost(read_gguf_header, as_file(gguf_start(0, 3) + raw), "long strings in the meta")
    assert peak < MB
    raw = gguf_start(0, 1) + string(b"k") + struct.pack("<IQ", 8, 65 * 2**20)
    limit = gguf.MAX_LONG_STRING_BYTES
    cost(read_gguf_header, as_file(raw, size=FAR), f"'k' is 68157440 bytes long.*{limit}")


def test_a_gguf_of_long_items() -> None:
    items = [b"x" * (gguf.MAX_ITEM_BYTES + 1)]
    raw = GGUF([array_pair("k", V.STRING, items)]).build()
    peak, _ = cost(read_gguf_header, as_file(raw), "an item of 'k' is 1048577 bytes long")
    assert peak < MB


def test_a_vocabulary_costs_little_memory() -> None:
    tokens = struct.pack("<IIQ", 9, 8, 100_000) + (struct.pack("<Q", 5) + b"token") * 100_000
    raw = gguf_start(0, 1) + string(b"tokens") + tokens
    tracemalloc.start()
    read_gguf_header(as_file(raw))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < MB


@pytest.mark.long
def test_a_safetensors_of_many_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    text = (
        b"{"
        + b",".join(
            b'"%032d":{"dtype":"U8","shape":[%d,1],"data_offsets":[%d,%d]}'
            % (at, at + 300, at * 10**6, at * 10**6 + at + 300)
            for at in range(SAMPLE)
        )
        + b"}"
    )
    peak, _ = cost(read_safetensors_header, as_file(build(text)), "leaves a gap")
    assert peak < SAMPLE * ALLOWED_PER_TENSOR
    monkeypatch.setattr(safetensors, "MAX_TENSORS", SAMPLE - 1)
    cost(read_safetensors_header, as_file(build(text)), f"the limit of {SAMPLE - 1}")


#: Made when the test runs: together they have 280 MB, which would stay for the whole run.
HOSTILE_TEXTS: list[tuple[str, Callable[[], bytes], str]] = [
    ("spaces", lambda: b"{" + b" " * 20 * MB + b"x", "expected a key"),
    (
        "a key without end",
        lambda: b'{"' + b"a" * 20 * MB,
        "a key and a colon of at most 65536 bytes",
    ),
    ("escapes without end", lambda: b'{"' + b"\\n" * 10 * MB, "a key and a colon"),
    ("a string without end", lambda: b'{"__metadata__":{"a":"' + b"a" * 20 * MB, "end of a string"),
    (
        "a long string",
        lambda: b'{"__metadata__":{"a":"' + b"a" * 40 * MB + b'"}}',
        "longer than 33554432",
    ),
    (
        "long strings",
        lambda: (
            b'{"__metadata__":{'
            + b",".join(b'"%d":"%s"' % (at, b"a" * 9 * MB) for at in range(4))
            + b"}}"
        ),
        "long strings in __metadata__ are 36000008 bytes",
    ),
    (
        "broken after a long string",
        lambda: b'{"__metadata__":{"a":"' + b"a" * 30 * MB + b'"},"x":{}}',
        "unknown dtype",
    ),
    (
        "many metadata values",
        lambda: b'{"__metadata__":{' + b",".join(b'"%d":1' % at for at in range(100_000)) + b"}}",
        f"the limit of {MAX_METADATA}",
    ),
    (
        "much metadata",
        lambda: (
            b'{"__metadata__":{'
            + b",".join(b'"%d":"%s\xf0\x9f\x98\x80"' % (at, b"x" * 60_000) for at in range(400))
            + b"}}"
        ),
        "more than 41943040 bytes of values",
    ),
    (
        "arrays",
        lambda: b'{"__metadata__":{"a":' + b"[" * 20 * MB,
        "expected a JSON value of at most",
    ),
    (
        "numbers",
        lambda: b'{"__metadata__":{"a":[' + b"0," * 10 * MB,
        "expected a JSON value of at most",
    ),
    ("digits", lambda: b'{"__metadata__":{"a":' + b"1" * 20 * MB, "a value of at most 400 bytes"),
    (
        "a long description",
        lambda: b'{"a":{"shape":[' + b"0," * 10 * MB + b"0]}}",
        "at most 4096 bytes",
    ),
]


@pytest.mark.sample(3)
@pytest.mark.parametrize(
    ("text", "message"), [row[1:] for row in HOSTILE_TEXTS], ids=[row[0] for row in HOSTILE_TEXTS]
)
def test_hostile_json(text: Callable[[], bytes], message: str) -> None:
    peak, _ = cost(read_safetensors_header, as_file(build(text())), message)
    assert peak < 45 * MB


def test_the_length_of_a_header_alone_costs_nothing() -> None:
    raw = build(b"{" + bytes(70_000), length=99_999_999)
    peak, read = cost(read_safetensors_header, as_file(raw, size=FAR), "expected a key")
    assert peak < MB
    assert read < 200_000


def test_limits_are_below_fifty_megabytes() -> None:
    assert gguf.MAX_KEPT_BYTES < 45 * MB
    assert json_reader.MAX_STRING_BYTES + json_reader.MAX_VALUE_BYTES < MB


def test_a_dduf_directory_that_claims_to_be_large() -> None:
    for count, size in ((dduf.MAX_ENTRIES + 1, 100), (1, dduf.MAX_DIRECTORY_BYTES + 1)):
        end = struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, count, count, size, 0, 0)
        raw = b"PK\x03\x04" + bytes(100) + end
        peak, read = cost(read_dduf_header, as_file(raw), f"the directory has {count} entries")
        assert peak < MB
        assert read < 70_000
