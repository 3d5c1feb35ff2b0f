"""Buckets: which sizes a step's device arrays may have.

On a GPU a new shape costs milliseconds to compile or to plan, so sizes are rounded up to a few and
those are warmed up at load; on a CPU a new shape costs nothing and padding does.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Buckets:
    """Allowed sizes, each an ascending tuple; beyond the last, its multiples are allowed.

    So `(1,)` allows every size, and `(16, 32, 64, 128)` allows 16, 32, 64, 128, 256, 384, ...

    `rows` are decode rows of a step, `chunk` the rows of one prefill chunk (tokens), `table_width`
    the columns of block tables (blocks).
    """

    rows: tuple[int, ...] = (1,)
    chunk: tuple[int, ...] = (1,)
    table_width: tuple[int, ...] = (1,)

    def __post_init__(self) -> None:
        for sizes in (self.rows, self.chunk, self.table_width):
            assert min(sizes, default=0) > 0, f"sizes are positive, and there are some: {sizes}"
            assert sizes == tuple(sorted(set(sizes))), f"sizes ascend: {sizes}"

    @property
    def exact(self) -> bool:
        """Whether nothing is ever padded."""
        return self.rows == self.chunk == (1,)

    def pad_rows(self, count: int) -> int:
        """Return how many decode rows stand for `count`; 0 stays 0."""
        return round_up(count, self.rows)

    def pad_chunk(self, length: int) -> int:
        """Return how many rows stand for a chunk of `length` tokens."""
        return round_up(length, self.chunk)

    def pad_table_width(self, width: int) -> int:
        """Return how many columns stand for a table of `width` blocks."""
        return round_up(width, self.table_width)

    def fit_chunk(self, remaining: int, max_rows: int) -> int:
        """Return how many of `remaining` tokens to take into at most `max_rows` padded rows.

        All of them if they fit; else a size that needs no padding, 0 if even the smallest does not.
        """
        if self.pad_chunk(remaining) <= max_rows:
            return remaining
        return round_down(max_rows, self.chunk)


def round_up(count: int, sizes: tuple[int, ...]) -> int:
    """Return the smallest allowed size that holds `count`; 0 stays 0."""
    if count <= 0:
        return 0
    for size in sizes:
        if size >= count:
            return size
    return -(-count // sizes[-1]) * sizes[-1]


def round_down(count: int, sizes: tuple[int, ...]) -> int:
    """Return the largest allowed size within `count`, 0 if there is none."""
    if count >= sizes[-1]:
        return count - count % sizes[-1]
    return max((size for size in sizes if size <= count), default=0)


def sizes_up_to(count: int, sizes: tuple[int, ...]) -> list[int]:
    """Return every allowed size that some number from 1 to `count` is rounded up to."""
    found = []
    needed = 1
    while needed <= count:
        found.append(round_up(needed, sizes))
        needed = found[-1] + 1
    return found


#: Every size as it is: for devices where a new shape costs nothing.
EXACT = Buckets()

#: Few sizes, since each is compiled and warmed up. A table that is too wide costs next to nothing.
FEW = Buckets(
    rows=(1, 2, 4, 8, 16, 32, 64),
    chunk=(16, 32, 64, 128),
    table_width=(4, 16, 64, 256, 1024, 4096),
)
