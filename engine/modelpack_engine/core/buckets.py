"""Buckets: the sizes that a step's device arrays are padded to.

On a GPU a new shape takes milliseconds to compile or to plan, so sizes are rounded up to a few,
which are warmed up at load. On a CPU a new shape costs nothing, and padding costs time.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Buckets:
    """Allowed sizes, as ascending tuples; multiples of the last size are allowed as well.

    `(1,)` allows every size, and `(16, 32, 64, 128)` allows 16, 32, 64, 128, 256, 384, ...

    `rows` are the sizes for the decode rows of a step, `chunk` for the rows of one prefill chunk,
    and `table_width` for the columns of block tables. With `tile`, it is the rows of all chunks of
    a step together that have such a size: each takes a multiple of `tile`.
    """

    rows: tuple[int, ...] = (1,)
    chunk: tuple[int, ...] = (1,)
    table_width: tuple[int, ...] = (1,)
    tile: int = 0

    def __post_init__(self) -> None:
        for sizes in (self.rows, self.chunk, self.table_width):
            assert min(sizes, default=0) > 0, f"sizes must be positive, and at least one: {sizes}"
            assert sizes == tuple(sorted(set(sizes))), f"sizes must ascend: {sizes}"

    @property
    def exact(self) -> bool:
        """Whether nothing is ever padded."""
        return self.rows == self.chunk == (1,)

    def pad_rows(self, count: int) -> int:
        """Return the padded number of `count` decode rows; 0 stays 0."""
        return round_up(count, self.rows)

    def pad_chunk(self, length: int) -> int:
        """Return the padded number of rows of a chunk of `length` tokens."""
        return round_up(length, self.chunk)

    def rows_of(self, length: int) -> int:
        """Return the rows that a chunk of `length` tokens takes in a step with others."""
        return -(-length // self.tile) * self.tile if self.tile else self.pad_chunk(length)

    def pad_table_width(self, width: int) -> int:
        """Return the padded number of columns of a table of `width` blocks."""
        return round_up(width, self.table_width)

    def fit_chunk(self, remaining: int, max_rows: int) -> int:
        """Return how many of `remaining` tokens fit in at most `max_rows` padded rows.

        If not all tokens fit, the result is a size without padding, or 0 if no size fits.
        """
        if self.rows_of(remaining) <= max_rows:
            return remaining
        return round_down(max_rows, self.chunk)


def round_up(count: int, sizes: tuple[int, ...]) -> int:
    """Return the smallest allowed size of at least `count`; 0 stays 0."""
    if count <= 0:
        return 0
    for size in sizes:
        if size >= count:
            return size
    return -(-count // sizes[-1]) * sizes[-1]


def round_down(count: int, sizes: tuple[int, ...]) -> int:
    """Return the largest allowed size up to `count`; 0 if there is none."""
    if count >= sizes[-1]:
        return count - count % sizes[-1]
    return max((size for size in sizes if size <= count), default=0)


def sizes_up_to(count: int, sizes: tuple[int, ...]) -> list[int]:
    """Return the allowed sizes that the numbers from 1 to `count` are rounded up to."""
    found = []
    needed = 1
    while needed <= count:
        found.append(round_up(needed, sizes))
        needed = found[-1] + 1
    return found


#: No padding: for devices where a new shape costs nothing.
EXACT = Buckets()

#: Few sizes, since each is compiled and warmed up. Padding of block tables costs almost nothing.
FEW = Buckets(
    rows=(1, 2, 4, 8, 16, 32, 64),
    chunk=(16, 32, 64, 128),
    table_width=(4, 16, 64, 256, 1024, 4096),
)
