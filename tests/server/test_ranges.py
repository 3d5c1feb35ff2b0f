"""Byte ranges of downloads and chunks."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelpack.registry_server.blob_fetch import (
    ByteRange,
    UnsatisfiableRange,
    chunk_range,
    requested_range,
)

SIZE = 2048


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        (None, None),
        ("", None),
        ("bytes=500-1499", (500, 1000)),
        ("bytes=0-0", (0, 1)),
        ("bytes=500-", (500, 1548)),
        ("bytes=-500", (1548, 500)),
        ("bytes=-5000", (0, 2048)),
        ("bytes=2000-5000", (2000, 48)),
        ("BYTES=1-2", (1, 2)),
        ("bytes=2047-", (2047, 1)),
        # The whole blob is returned for several ranges, other units and invalid numbers.
        ("bytes=0-1,5-6", None),
        ("lines=0-1", None),
        ("bytes=-", None),
        ("bytes=a-b", None),
        ("bytes=+1-2", None),
        ("bytes=٣-٤", None),
        ("bytes=" + "9" * 5000 + "-", None),
        ("0-5", None),
    ],
)
def test_requested(header: str | None, expected: tuple[int, int] | None) -> None:
    wanted = None if expected is None else ByteRange(*expected)
    assert requested_range(header, SIZE) == wanted


@pytest.mark.parametrize("header", ["bytes=500-0", "bytes=2048-", "bytes=5000-9999", "bytes=-0"])
def test_unsatisfiable(header: str) -> None:
    with pytest.raises(UnsatisfiableRange):
        requested_range(header, SIZE)


def test_nothing_can_be_had_of_nothing() -> None:
    for header in ("bytes=0-", "bytes=-1", "bytes=0-0"):
        with pytest.raises(UnsatisfiableRange):
            requested_range(header, 0)


@given(st.integers(0, 50), st.integers(0, 50), st.integers(1, 40))
def test_a_range_lies_within_the_content(first: int, last: int, size: int) -> None:
    content = bytes(range(size))
    try:
        part = requested_range(f"bytes={first}-{last}", size)
    except UnsatisfiableRange:
        assert first >= size or last < first
        return
    assert part is not None
    assert content[part.start : part.last + 1] == content[first : last + 1]


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        ("0-0", (0, 1)),
        ("5-9", (5, 5)),
        ("9-5", None),
        ("bytes 0-5/10", None),
        ("0-5/10", None),
        ("-5", None),
        ("5-", None),
        ("", None),
        ("0-" + "9" * 5000, None),
    ],
)
def test_chunks(header: str, expected: tuple[int, int] | None) -> None:
    assert chunk_range(header) == (None if expected is None else ByteRange(*expected))
