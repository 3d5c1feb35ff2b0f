"""Which inputs run together: of similar length, so that little is filled up."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

#: Up to here a run takes about the same time, whatever the length.
_SHORT = 16


@dataclass(frozen=True, slots=True)
class BatchLimits:
    """The most texts, and the most tokens with filling, that run at once."""

    max_texts: int = 64
    max_tokens: int = 8192

    def __post_init__(self) -> None:
        assert self.max_texts > 0
        assert self.max_tokens > 0


def next_batch(lengths: Sequence[int], limits: BatchLimits) -> list[int]:
    """Return the places of what runs next: the first, and what is nearest to it in length.

    So nothing waits for ever, whatever arrives after it. At least half of each row is its own.
    """
    first = lengths[0]
    near = sorted(range(1, len(lengths)), key=lambda at: (abs(lengths[at] - first), at))
    batch, shortest, longest = [0], first, first
    for place in near:
        shortest, longest = min(shortest, lengths[place]), max(longest, lengths[place])
        if not _run_together(shortest, longest, len(batch) + 1, limits):
            break
        batch.append(place)
    return batch


def split_batches(lengths: Sequence[int], limits: BatchLimits) -> list[list[int]]:
    """Return all places in batches, the longest first."""
    batches: list[list[int]] = []
    for place in sorted(range(len(lengths)), key=lambda at: (-lengths[at], at)):
        if batches:
            batch = batches[-1]
            if _run_together(lengths[place], lengths[batch[0]], len(batch) + 1, limits):
                batch.append(place)
                continue
        batches.append([place])
    return batches


def _run_together(shortest: int, longest: int, count: int, limits: BatchLimits) -> bool:
    if count > limits.max_texts or longest * count > limits.max_tokens:
        return False
    return longest <= max(2 * shortest, _SHORT)
