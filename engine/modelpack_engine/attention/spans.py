"""Which blocks a row or a chunk reads, and which decode rows go together. Plain integers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple


@dataclass(frozen=True, slots=True)
class Span:
    """Keys [start, stop), counted from the first token of block `first_block` of a block table."""

    first_block: int
    num_blocks: int
    start: int
    stop: int


class Run(NamedTuple):
    """Rows from `row` on whose slots follow each other from `slot` on."""

    row: int
    slot: int
    length: int


def visible(length: int, window: int | None, block_size: int, *, queries: int = 1) -> Span:
    """Return what the last `queries` of `length` tokens see, in whole blocks from the left.

    With a window of W tokens (the token itself included) the first query sees W, the last one as
    well, so that W + queries - 1 keys are needed; blocks before them are left out. `start` counts
    the keys of the first block that no query sees.
    """
    oldest = 0 if window is None else max(0, length - queries + 1 - window)
    first_block = oldest // block_size
    last_block = -(-length // block_size)
    base = first_block * block_size
    return Span(first_block, last_block - first_block, oldest - base, length - base)


def length_groups(lengths: Sequence[int], spread: int = 2) -> list[list[int]]:
    """Return row indices in groups whose longest row is at most `spread` times the shortest.

    Rows of a group are padded to its longest: a group of all rows would make short ones pay for a
    long one. Rows keep their order if one group holds all of them.
    """
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    groups: list[list[int]] = []
    shortest = 0
    for row in order:
        if groups and lengths[row] <= spread * shortest:
            groups[-1].append(row)
        else:
            groups.append([row])
            shortest = max(1, lengths[row])
    if len(groups) == 1:
        return [list(range(len(lengths)))]
    return groups


def slot_runs(slots: Sequence[int], most: int) -> list[Run] | None:
    """Return the runs that `slots` are made of, None if these are more than `most`."""
    runs: list[Run] = []
    for row, slot in enumerate(slots):
        if runs and slot == runs[-1].slot + runs[-1].length:
            runs[-1] = runs[-1]._replace(length=runs[-1].length + 1)
        elif len(runs) == most:
            return None
        else:
            runs.append(Run(row, slot, 1))
    return runs
