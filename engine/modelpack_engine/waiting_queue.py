"""WaitingQueue: who waits for admission, and in which order.

Shortest first has the least wait on average, but left alone it lets long prompts starve. So a
priority is the prompt's length weighed against the time of its arrival (aging), where the clock is
how many tokens have been computed: the order depends on the requests alone, not on the machine.

Owners (cache salts stand for them) take turns, so that a request does not wait for the thousand
that another owner sent before it. Where each owner has one, the order is that of priorities.
"""

from __future__ import annotations

from bisect import insort
from operator import attrgetter

from modelpack_engine.sequence import Sequence

#: Tokens computed meanwhile that make up for one token of a prompt. More shortens the wait of most,
#: and lengthens that of the longest.
OVERTAKING = 16

#: The most sequences admitted in one round. Without a limit, new owners could keep one that had its
#: turn waiting forever.
ROUND = 64

_PREEMPTED = -1  # before all that have not run
_by_priority = attrgetter("priority")


class WaitingQueue:
    """Sequences of the same owner by priority, the least first; of equal ones, who came first.

    Each is overtaken by those that have fewer tokens to compute and come before `overtaking` tokens
    have been computed for each one that they have fewer; 0: never. Who was preempted precedes all.

    In a round, each owner has one turn: the sequence with the least priority of those whose owners
    have had none. A round ends when there is no other, or after `ROUND` turns.
    """

    def __init__(self, overtaking: int) -> None:
        self._overtaking = overtaking
        self._preempted: list[Sequence] = []
        self._owners: dict[bytes, list[Sequence]] = {}
        self._served: set[bytes] = set()  # in this round
        self._count = 0

    def __len__(self) -> int:
        return self._count

    @property
    def first(self) -> Sequence:
        """Who is to be admitted next; there is one."""
        return self._next()[0]

    def add(self, sequence: Sequence, num_uncached: int, now: int) -> None:
        """Take a sequence that has come, with so many tokens to compute, when `now` were."""
        sequence.priority = now + self._overtaking * num_uncached
        insort(self._owners.setdefault(sequence.cache_salt, []), sequence, key=_by_priority)
        self._count += 1

    def put_back(self, sequence: Sequence) -> None:
        """Take a sequence that was preempted."""
        sequence.priority = _PREEMPTED
        self._preempted.insert(0, sequence)
        self._count += 1

    def pop(self) -> Sequence:
        """Remove and return the first."""
        sequence = self._next()[0]
        if sequence.priority != _PREEMPTED:
            if sequence.cache_salt in self._served or len(self._served) == ROUND:
                self._served.clear()
            self._served.add(sequence.cache_salt)
        self.remove(sequence)
        return sequence

    def remove(self, sequence: Sequence) -> None:
        """Remove a sequence that has ended."""
        if sequence.priority == _PREEMPTED:
            self._preempted.remove(sequence)
        else:
            queue = self._owners[sequence.cache_salt]
            queue.remove(sequence)
            if not queue:
                del self._owners[sequence.cache_salt]
        self._count -= 1
        if not self._count:
            self._served.clear()

    def _next(self) -> list[Sequence]:
        """Return the sequences of the owner whose turn it is."""
        if self._preempted:
            return self._preempted
        if len(self._owners) == 1:
            return next(iter(self._owners.values()))
        served = self._served if len(self._served) < ROUND else ()
        queues = [queue for owner, queue in self._owners.items() if owner not in served]
        return min(queues or self._owners.values(), key=_of_first)


def _of_first(queue: list[Sequence]) -> tuple[int, int]:
    return queue[0].priority, queue[0].seq_id
