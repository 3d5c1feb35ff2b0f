"""ByteRanges: the set of bytes that are present in a partial download or upload."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence


class ByteRanges:
    """A set of byte positions, stored as sorted, separate ranges (start, end)."""

    def __init__(self, ranges: Iterable[Sequence[int]] = ()) -> None:
        """Raises `ValueError` for an invalid range."""
        self._ranges: list[tuple[int, int]] = []
        for start, end in ranges:
            self.add(start, end)

    def __bool__(self) -> bool:
        return bool(self._ranges)

    def __repr__(self) -> str:
        return f"ByteRanges({self.ranges})"

    @property
    def ranges(self) -> list[tuple[int, int]]:
        """The ranges, as (start, end)."""
        return list(self._ranges)

    @property
    def total(self) -> int:
        """The number of bytes."""
        return sum(end - start for start, end in self._ranges)

    @property
    def prefix(self) -> int:
        """The number of bytes before the first gap."""
        return self._ranges[0][1] if self._ranges and self._ranges[0][0] == 0 else 0

    def add(self, start: int, end: int) -> None:
        """Add the bytes from `start` to `end`; raise `ValueError` for an invalid range."""
        if not 0 <= start <= end:
            raise ValueError(f"{start} to {end} is not a range of bytes")
        if start == end:
            return
        # Merge all ranges that touch the new one.
        first = bisect_left(self._ranges, start, key=lambda known: known[1])
        last = first
        while last < len(self._ranges) and self._ranges[last][0] <= end:
            last += 1
        if first < last:
            start = min(start, self._ranges[first][0])
            end = max(end, self._ranges[last - 1][1])
        self._ranges[first:last] = [(start, end)]

    def missing(self, start: int, end: int) -> list[tuple[int, int]]:
        """Return the ranges between `start` and `end` that are missing."""
        gaps = []
        for known_start, known_end in self._ranges:
            if known_end <= start:
                continue
            if known_start >= end:
                break
            if known_start > start:
                gaps.append((start, known_start))
            start = known_end
        if start < end:
            gaps.append((start, end))
        return gaps
