"""The sizes that arrays of a step are padded to."""

from __future__ import annotations

from dataclasses import replace

import hypothesis.strategies as st
import pytest
from hypothesis import given

from modelpack_engine.core.buckets import EXACT, FEW, Buckets, round_down, round_up, sizes_up_to

ladders = st.sets(st.integers(1, 40), min_size=1, max_size=5).map(lambda s: tuple(sorted(s)))


@pytest.mark.parametrize(
    ("sizes", "count", "up", "down"),
    [
        ((1,), 0, 0, 0),
        ((1,), 7, 7, 7),
        ((16, 32, 64), 1, 16, 0),
        ((16, 32, 64), 16, 16, 16),
        ((16, 32, 64), 17, 32, 16),
        ((16, 32, 64), 33, 64, 32),
        ((16, 32, 64), 64, 64, 64),
        ((16, 32, 64), 65, 128, 64),
        ((16, 32, 64), 200, 256, 192),
        ((3, 5), 4, 5, 3),
        ((3, 5), 6, 10, 5),
    ],
)
def test_rounding(sizes: tuple[int, ...], count: int, up: int, down: int) -> None:
    assert (round_up(count, sizes), round_down(count, sizes)) == (up, down)


@given(ladders, st.integers(1, 300))
def test_rounding_finds_the_nearest_allowed_size(sizes: tuple[int, ...], count: int) -> None:
    allowed = {*sizes, *(sizes[-1] * factor for factor in range(1, 400))}
    assert round_up(count, sizes) == min(size for size in allowed if size >= count)
    assert round_down(count, sizes) == max((size for size in allowed if size <= count), default=0)
    assert sizes_up_to(count, sizes) == sorted({round_up(n + 1, sizes) for n in range(count)})


@given(ladders, st.integers(1, 300), st.integers(0, 300))
def test_a_chunk_fits(sizes: tuple[int, ...], remaining: int, max_rows: int) -> None:
    buckets = Buckets(chunk=sizes)
    length = buckets.fit_chunk(remaining, max_rows)
    assert length <= remaining
    assert buckets.pad_chunk(length) <= max_rows
    if length < remaining:
        assert buckets.pad_chunk(length) == length, "only a last chunk is padded"
        assert buckets.pad_chunk(length + 1) > max_rows, "more would have fit"


@given(st.lists(st.integers(1, 300), max_size=9), st.integers(0, 2048))
def test_chunks_of_a_step_fit_together_in_tiles(prompts: list[int], max_rows: int) -> None:
    buckets, rest, taken = replace(FEW, tile=16), max_rows, 0
    for remaining in prompts:
        length = buckets.fit_chunk(remaining, rest)
        assert length == remaining or length % 16 == 0
        assert length == remaining or rest - length < 128, "more would have fit"
        rest -= buckets.rows_of(length)
        taken += buckets.rows_of(length)
    assert rest >= 0
    assert taken <= max_rows


def test_ready_made_buckets() -> None:
    assert (EXACT.pad_rows(13), EXACT.pad_chunk(13), EXACT.pad_table_width(13)) == (13, 13, 13)
    assert (FEW.pad_rows(13), FEW.pad_chunk(13), FEW.pad_table_width(13)) == (16, 16, 16)
    assert (FEW.pad_rows(70), FEW.pad_chunk(500), FEW.pad_table_width(4000)) == (128, 512, 4096)


@pytest.mark.parametrize("sizes", [(), (0,), (-1, 2), (4, 2), (2, 2)])
def test_sizes_that_are_none(sizes: tuple[int, ...]) -> None:
    with pytest.raises(AssertionError):
        Buckets(chunk=sizes)
