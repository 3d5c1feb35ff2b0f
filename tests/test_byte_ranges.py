"""ByteRanges, compared with a set of integers."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelpack.artifacts.byte_ranges import ByteRanges

SIZE = 40
RANGES = st.tuples(st.integers(0, SIZE), st.integers(0, SIZE)).map(lambda pair: tuple(sorted(pair)))


def positions(ranges: list[tuple[int, int]]) -> set[int]:
    return {position for start, end in ranges for position in range(start, end)}


@given(st.lists(RANGES), RANGES)
def test_it_is_a_set(added: list[tuple[int, int]], window: tuple[int, int]) -> None:
    have, expected = ByteRanges(added), positions(added)
    assert positions(have.ranges) == expected
    assert have.total == len(expected)
    assert bool(have) == bool(expected)
    assert have.prefix == next(n for n in range(SIZE + 1) if n not in expected)
    assert positions(have.missing(*window)) == positions([window]) - expected
    for (_, end), (start, _) in zip(have.ranges, have.ranges[1:], strict=False):
        assert end < start, "ranges in order that do not touch"
    assert ByteRanges(have.ranges).ranges == have.ranges


@pytest.mark.parametrize("wrong", [(-1, 3), (4, 3)])
def test_what_is_no_range(wrong: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="not a range"):
        ByteRanges([wrong])
