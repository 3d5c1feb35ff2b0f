"""Owners take turns in the queue; the sequences of one owner are in the order of priority."""

from __future__ import annotations

from bisect import insort
from collections.abc import Sequence as Items
from itertools import count
from operator import attrgetter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelpack_engine.core.scheduler import ROUND, WaitingQueue
from modelpack_engine.core.sequence import Sequence
from tests.engine.scheduling.simulation import sequence
from tests.engine.scheduling.steps import chunks, prompt, run, scheduler

OWNERS = [b"", b"a", b"b", b"c"]
#: (owner, length of the prompt, tokens computed before it arrives, pops after that)
ARRIVALS = st.lists(
    st.tuples(
        st.sampled_from(OWNERS), st.integers(1, 40), st.integers(0, 30), st.integers(0, 3)
    ),
    max_size=60,
)  # fmt: skip
Arrivals = Items[tuple[bytes, int, int, int]]


class OneList:
    """A queue without turns: all sequences by priority."""

    def __init__(self) -> None:
        self.waiting: list[Sequence] = []

    def add(self, added: Sequence) -> None:
        insort(self.waiting, added, key=attrgetter("priority"))


def popped(arrivals: Arrivals, overtaking: int) -> list[tuple[Sequence, list[Sequence]]]:
    """Return each popped sequence with the sequences that waited at that time."""
    queue, waiting, found, now = WaitingQueue(overtaking), list[Sequence](), [], 0

    def pop() -> None:
        first = queue.first
        assert queue.pop() is first
        found.append((first, waiting.copy()))
        waiting.remove(first)
        assert len(queue) == len(waiting)

    for owner, length, computed, pops in arrivals:
        now += computed
        added = sequence([1] * length, 1, owner=owner)
        queue.add(added, length, now)
        waiting.append(added)
        for _ in range(min(pops, len(waiting))):
            pop()
    while waiting:
        pop()
    return found


def first_of(waiting: list[Sequence]) -> Sequence:
    """With one sequence per owner, the order is that of priorities."""
    return min(waiting, key=lambda each: (each.priority, each.seq_id))


@given(ARRIVALS, st.sampled_from([0, 1, 16]))
def test_a_single_owner_has_the_order_of_priorities(arrivals: Arrivals, overtaking: int) -> None:
    for first, waiting in popped([(b"a", *rest) for _, *rest in arrivals], overtaking):
        assert first is first_of(waiting)


@given(ARRIVALS, st.sampled_from([0, 1, 16]))
def test_each_owner_has_the_order_of_priorities(arrivals: Arrivals, overtaking: int) -> None:
    for first, waiting in popped(arrivals, overtaking):
        assert first is first_of([w for w in waiting if w.owner == first.owner])


@given(ARRIVALS, st.sampled_from([0, 1, 16]))
def test_nobody_has_three_turns_while_another_owner_waits(
    arrivals: Arrivals, overtaking: int
) -> None:
    """An owner is overtaken at most twice: by the last of a round and the first of the next."""
    turns: dict[tuple[bytes, bytes], int] = {}  # of one owner, while another waits
    for first, waiting in popped(arrivals, overtaking):
        owner = first.owner
        others = {each.owner for each in waiting} - {owner}
        turns = {
            (one, other): number
            for (one, other), number in turns.items()
            if other in others and other != owner
        }
        for other in others:
            turns[owner, other] = turns.get((owner, other), 0) + 1
            assert turns[owner, other] <= 2


@given(st.lists(st.integers(1, 40), max_size=ROUND), st.sampled_from([0, 1, 16]))
def test_owners_with_one_each_have_the_order_of_priorities(
    lengths: list[int], overtaking: int
) -> None:
    arrivals = [(bytes([n]), length, 0, 0) for n, length in enumerate(lengths)]
    for first, waiting in popped(arrivals, overtaking):
        assert first is first_of(waiting)


def test_new_owners_keep_nobody_waiting_for_ever() -> None:
    queue, names = WaitingQueue(16), count()
    for _ in range(2):
        queue.add(sequence([1] * 9, 1, owner=b"old"), 9, 0)
    turns = []
    for now in range(3 * ROUND):
        owner = str(next(names)).encode()
        queue.add(sequence([1], 1, owner=owner), 1, 1000 * now)
        turns.append(queue.pop().owner)
    assert turns.count(b"old") == 2


def test_who_was_preempted_precedes_all_owners() -> None:
    queue = WaitingQueue(0)
    first, second, third = (sequence([1], 1, owner=owner) for owner in (b"a", b"a", b"b"))
    for each in (first, second, third):
        queue.add(each, 1, 0)
    assert queue.pop() is first
    queue.put_back(first)
    assert [queue.pop() for _ in range(3)] == [first, third, second]
    assert len(queue) == 0


def test_iteration_is_in_the_order_of_admission_of_one_owner() -> None:
    """Preempted sequences come first and background ones last; nothing is removed."""
    queue = WaitingQueue(16)
    long, short, other = (sequence([1] * length, 1) for length in (9, 2, 5))
    background = sequence([1], 1, background=True)
    for each in (background, long, short, other):
        queue.add(each, len(each.prompt_token_ids), 0)
    queue.put_back(queue.pop(long))
    order = list(queue)
    assert order == [long, short, other, background]
    assert [queue.pop() for _ in range(4)] == order


@pytest.mark.parametrize("overtaking", [0, 16])
def test_one_request_beside_a_thousand_of_another_owner(overtaking: int) -> None:
    """The owner that came first has its turn, then the other owner."""
    sched = scheduler(max_num_seqs=1, max_waiting=2000, overtaking=overtaking)
    for number in range(1000):
        sched.add(sequence(prompt(3, 1), 1, request_id=f"flood-{number}", owner=b"a"))
    run(sched)
    sched.add(sequence(prompt(9, 2), 1, request_id="single", owner=b"b"))
    order: dict[str, None] = {}
    while "single" not in order:
        order |= dict.fromkeys(name for name, _, _ in chunks(run(sched)))
    assert len(order) <= 2
