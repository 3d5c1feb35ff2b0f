"""The blocks that attention reads are exactly those that the queries see."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelpack_engine.attention.kv_pools import Span, length_groups, visible


@pytest.mark.parametrize(
    ("length", "window", "queries", "expected"),
    [
        (1, None, 1, Span(0, 1, 0, 1)),
        (16, None, 1, Span(0, 1, 0, 16)),
        (17, None, 5, Span(0, 2, 0, 17)),
        (40, 8, 1, Span(2, 1, 0, 8)),
        (41, 8, 1, Span(2, 1, 1, 9)),
        (40, 8, 10, Span(1, 2, 7, 24)),
        (5, 100, 1, Span(0, 1, 0, 5)),
    ],
)
def test_visible(length: int, window: int | None, queries: int, expected: Span) -> None:
    assert visible(length, window, 16, queries=queries) == expected


@given(st.integers(1, 300), st.none() | st.integers(1, 300), st.integers(1, 32), st.data())
def test_visible_is_what_the_queries_see(
    length: int, window: int | None, block_size: int, data: st.DataObject
) -> None:
    queries = data.draw(st.integers(1, length))
    span = visible(length, window, block_size, queries=queries)
    seen = [
        key
        for query in range(length - queries, length)
        for key in range(query + 1)
        if window is None or key > query - window
    ]
    base = span.first_block * block_size
    assert (base + span.start, base + span.stop) == (min(seen), length)
    assert span.start < block_size, "no block is gathered in vain"
    assert (span.num_blocks - 1) * block_size < span.stop <= span.num_blocks * block_size


@given(st.lists(st.integers(1, 1000), min_size=1, max_size=40))
def test_groups_hold_every_row_once_and_rows_of_similar_length(lengths: list[int]) -> None:
    groups = length_groups(lengths)
    assert sorted(row for group in groups for row in group) == list(range(len(lengths)))
    for group in groups:
        found = [lengths[row] for row in group]
        assert max(found) <= 2 * min(found)


def test_rows_of_similar_length_stay_in_order() -> None:
    assert length_groups([5, 3, 4, 6]) == [[0, 1, 2, 3]]
    assert length_groups([9, 1, 8]) == [[1], [2, 0]]
