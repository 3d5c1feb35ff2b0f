"""JSON documents: the bytes of Go's encoder, and strict, bounded decoding."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelpack.artifacts.json_document import decode, encode, sorted_map
from modelpack.errors import ManifestError


def test_the_example_of_the_fact_sheet() -> None:
    text = os.fsdecode(b"a\x00\x08\x7f\xff<") + "\u2028"
    assert encode(text) == b'"a\\u0000\\b\x7f\\ufffd\\u003c\\u2028"'


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ({}, b"{}"),
        ({"b": 1, "a": [True, None]}, b'{"b":1,"a":[true,null]}'),
        ('\b\f\n\r\t"\\/', b'"\\b\\f\\n\\r\\t\\"\\\\/"'),
        ("\x01\x1f", b'"\\u0001\\u001f"'),
        ("<a> & b", b'"\\u003ca\\u003e \\u0026 b"'),
        ("\u2028\u2029", b'"\\u2028\\u2029"'),
        ("é漢😀", '"é漢😀"'.encode()),
        (os.fsdecode(b"\xff\xfe"), b'"\\ufffd\\ufffd"'),
        ("\ufffd", '"\ufffd"'.encode()),  # a real one stays as it is
    ],
)
def test_encode(value: Any, expected: bytes) -> None:
    assert encode(value) == expected


def test_sorted_map_sorts_by_utf8_bytes() -> None:
    # By UTF-16 code units, U+1F600 would come before U+FFFD.
    assert list(sorted_map({"\ufffd": "1", "😀": "2", "a": "3", "Z": "4"})) == [
        "Z", "a", "\ufffd", "😀",
    ]  # fmt: skip


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda children: st.lists(children) | st.dictionaries(st.text(), children),
    max_leaves=20,
)


@given(json_values)
def test_decode_reads_what_encode_writes(value: Any) -> None:
    raw = encode(value)
    assert decode(raw, "it") == value == json.loads(raw)
    assert not set(raw) & set(b"<>&\n")


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        (b"", "is not JSON"),
        (b"{", "is not JSON"),
        (b'{"a":1,}', "is not JSON"),
        (b"{} x", "is not JSON"),
        (b"\xff", "not UTF-8"),
        (b"\xef\xbb\xbf{}", "is not JSON|BOM"),
        (b'{"a":1,"a":2}', "'a' twice"),
        (b"[NaN]", "NaN"),
        (b"[-Infinity]", "Infinity"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"a":' * 100_000, "nested too deeply"),
        (b"9" * 5000, "out of range"),
        (b"[1e999]", "out of range"),
        (b"[-1e999]", "out of range"),
        (b" " * 101, "more than the limit of 100"),
    ],
)
@pytest.mark.scenario(26)
def test_refused(raw: bytes, says: str) -> None:
    limit = 100 if raw.startswith(b" ") else 4 * 1024 * 1024
    with pytest.raises(ManifestError, match=says):
        decode(raw, "the manifest", limit=limit)


_REPEATED = """
from modelpack.errors import ManifestError
from modelpack.artifacts.json_document import decode
keys = ",".join(f'"{number:x}":0' for number in range(400_000))
try:
    decode(f'{{{keys},"61a7f":0}}'.encode(), "the manifest")
except ManifestError as error:
    print(error)
"""


@pytest.mark.scenario(26)
def test_a_repeated_key_among_many_is_found_at_once() -> None:
    """Quadratic comparison of keys would take half an hour for a document within the limit."""
    command = [sys.executable, "-c", _REPEATED]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert "'61a7f' twice" in done.stdout
