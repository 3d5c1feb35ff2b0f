"""Background sequences get the blocks and rows that others leave; others preempt them."""

from __future__ import annotations

import pytest

from modelpack_engine.core.scheduler import Scheduler
from modelpack_engine.core.sequence import Sequence, SequenceStatus
from modelpack_engine.errors import QueueFullError
from modelpack_engine.outputs import FinishReason
from tests.engine.scheduling.simulation import sequence
from tests.engine.scheduling.steps import chunks, prompt, run, scheduled, scheduler


def added(
    sched: Scheduler, name: str, start: int, *, background: bool, length: int = 5
) -> Sequence:
    new = sequence(prompt(length, start), 9, request_id=name, background=background)
    sched.add(new)
    return new


def test_others_are_admitted_first() -> None:
    sched = scheduler(max_num_seqs=2)
    added(sched, "line 1", 1, background=True)
    added(sched, "line 2", 2, background=True)
    added(sched, "a", 3, background=False, length=9)
    assert [name for name, _, _ in chunks(run(sched))] == ["a", "line 1"]


@pytest.mark.parametrize("limit", [{"max_num_seqs": 2}, {"num_blocks": 6}], ids=str)
def test_a_background_sequence_gives_its_place_up(limit: dict[str, int]) -> None:
    """It runs again, from the tokens that it has, once there is room."""
    sched = scheduler(**limit)
    old = added(sched, "line 1", 1, background=True)
    young = added(sched, "line 2", 2, background=True)
    run(sched)
    output = young.output_token_ids.copy()
    chat = added(sched, "chat", 3, background=False)
    step = run(sched)
    assert step.preempted == (young,)
    assert young.seq_id in step.released
    assert [name for name, _, _ in chunks(step)] == ["chat"]
    assert old.status is SequenceStatus.RUNNING
    while not chat.is_finished:
        run(sched)
    while sched.has_work:
        run(sched)
    assert young.output_token_ids[: len(output)] == output
    assert (len(young.output_token_ids), len(old.output_token_ids)) == (9, 9)


def test_a_newer_sequence_precedes_the_background_when_blocks_run_out() -> None:
    sched = scheduler(num_blocks=6)
    line = added(sched, "line", 1, background=True, length=7)
    run(sched)
    chat = added(sched, "chat", 2, background=False, length=7)
    while not chat.is_finished:
        run(sched)
    assert (line.num_preemptions, chat.num_preemptions) == (1, 0)


def test_tokens_in_flight_come_first() -> None:
    sched = scheduler(max_num_seqs=1)
    line = added(sched, "line", 1, background=True)
    sched.submitted(output := scheduled(sched))
    added(sched, "chat", 2, background=False)
    assert sched.schedule() is None
    sched.collect(output, [7])
    assert scheduled(sched).preempted == (line,)


def test_the_background_does_not_displace_itself() -> None:
    sched = scheduler(max_num_seqs=1)
    first = added(sched, "line 1", 1, background=True)
    run(sched)
    added(sched, "line 2", 2, background=True)
    run(sched)
    assert (first.status, first.num_preemptions) == (SequenceStatus.RUNNING, 0)


def test_half_of_the_queue_is_left_to_others() -> None:
    sched = scheduler(max_waiting=4)
    for index in range(2):
        added(sched, f"line {index}", index + 1, background=True)
    with pytest.raises(QueueFullError):
        added(sched, "line 3", 3, background=True)
    added(sched, "chat 1", 4, background=False)
    added(sched, "chat 2", 5, background=False)
    with pytest.raises(QueueFullError):
        added(sched, "chat 3", 6, background=False)


def test_who_waits_in_the_background_can_end() -> None:
    sched = scheduler(max_num_seqs=1)
    added(sched, "chat", 1, background=False)
    run(sched)
    line = added(sched, "line", 2, background=True)
    sched.finish(line, FinishReason.ABORT)
    assert sched.stats().num_waiting == 0
