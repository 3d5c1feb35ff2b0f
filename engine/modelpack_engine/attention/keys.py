"""KeyRange: which keys of which blocks an attention call reads."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx


class KeyRange:
    """Keys [start, stop) of each of `tables`, block tables of one width, counted from their first.

    `first` is the first block if there is one table and its blocks lie side by side, else None.
    Indices on the device are made once and shared by the layers of a step.
    """

    def __init__(self, tables: Sequence[Sequence[int]], start: int, stop: int) -> None:
        self.tables, self.start, self.stop = tables, start, stop
        only = tables[0]
        side_by_side = len(tables) == 1 and consecutive(only)
        self.first = only[0] if side_by_side else None
        self._blocks: mx.array | None = None
        self._by_head: dict[tuple[int, int], mx.array] = {}

    def blocks(self) -> mx.array:
        """Return the tables, int32 [sequences, blocks]."""
        if self._blocks is None:
            self._blocks = mx.array([list(table) for table in self.tables], mx.int32)
        return self._blocks

    def blocks_by_head(self, heads: int, num_blocks: int) -> mx.array:
        """Return the tables for pools that hold `num_blocks` blocks of one head after another's.

        int32 [sequences, heads, blocks].
        """
        key = (heads, num_blocks)
        if key not in self._by_head:
            first = mx.arange(heads, dtype=mx.int32)[None, :, None] * num_blocks
            self._by_head[key] = self.blocks()[:, None, :] + first
        return self._by_head[key]


def consecutive(blocks: Sequence[int]) -> bool:
    """Return whether blocks lie side by side, in order."""
    return all(block == blocks[0] + index for index, block in enumerate(blocks))
