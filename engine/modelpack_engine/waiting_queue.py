"""WaitingQueue: who waits for admission, and in which order.

Shortest first has the least wait on average, but left alone it lets long prompts starve. So a
priority is the prompt's length weighed against the time of its arrival (aging), where the clock is
how many tokens have been computed: the order depends on the requests alone, not on the machine.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterator
from operator import attrgetter

from modelpack_engine.sequence import Sequence

#: Tokens computed meanwhile that make up for one token of a prompt. More shortens the wait of most,
#: and lengthens that of the longest.
OVERTAKING = 16

_PREEMPTED = -1  # before all that have not run
_by_priority = attrgetter("priority")


class WaitingQueue:
    """Sequences by priority, the least first; of equal ones, who came first.

    Each is overtaken by those that have fewer tokens to compute and come before `overtaking` tokens
    have been computed for each one that they have fewer; 0: never. Who was preempted precedes all.
    """

    def __init__(self, overtaking: int) -> None:
        self._overtaking = overtaking
        self._sequences: list[Sequence] = []

    def __len__(self) -> int:
        return len(self._sequences)

    def __iter__(self) -> Iterator[Sequence]:
        return iter(self._sequences)

    @property
    def first(self) -> Sequence:
        """Who is to be admitted next; there is one."""
        return self._sequences[0]

    def add(self, sequence: Sequence, num_uncached: int, now: int) -> None:
        """Take a sequence that has come, with so many tokens to compute, when `now` were."""
        sequence.priority = now + self._overtaking * num_uncached
        insort(self._sequences, sequence, key=_by_priority)

    def put_back(self, sequence: Sequence) -> None:
        """Take a sequence that was preempted."""
        sequence.priority = _PREEMPTED
        self._sequences.insert(0, sequence)

    def pop(self) -> Sequence:
        """Remove and return the first."""
        return self._sequences.pop(0)

    def remove(self, sequence: Sequence) -> None:
        """Remove a sequence that has ended."""
        self._sequences.remove(sequence)
