"""How sequences end, and what that frees."""

from __future__ import annotations

import pytest

from modelpack_engine.core.sequence import SequenceStatus
from modelpack_engine.outputs import FinishReason
from tests.engine.scheduling.simulation import MODES, Mode, Simulation, sequence
from tests.engine.scheduling.steps import chunks, prompt, run, scheduled, scheduler


@pytest.mark.parametrize(
    ("params", "tokens", "reason", "stop_reason"),
    [
        ({"eos": True}, [5, 0], FinishReason.STOP, None),
        ({"eos": True, "ignore_eos": True}, [5, 0, 6, 0], FinishReason.LENGTH, None),
        ({"eos": True, "min_tokens": 2}, [0, 0, 0], FinishReason.STOP, None),
        ({"stop_token_ids": (6,)}, [5, 6], FinishReason.STOP, 6),
        ({"stop_token_ids": (0,), "eos": True}, [5, 0], FinishReason.STOP, 0),
        ({"stop_token_ids": (6,), "ignore_eos": True}, [6], FinishReason.STOP, 6),
        ({"stop_token_ids": (6,), "min_tokens": 1}, [6, 6], FinishReason.STOP, 6),
        ({}, [5, 5, 5, 5], FinishReason.LENGTH, None),
        ({"eos": True}, [5, 5, 5, 0], FinishReason.STOP, None),
    ],
)
def test_ends(
    params: dict[str, object], tokens: list[int], reason: FinishReason, stop_reason: int | None
) -> None:
    sched = scheduler()
    sched.add(seq := sequence(prompt(4), 4, **params))  # type: ignore[arg-type]
    for token_id in tokens:
        assert not seq.is_finished
        run(sched, token_id)
    assert (seq.finish_reason, seq.stop_reason) == (reason, stop_reason)
    assert seq.output_token_ids == tokens
    assert not sched.has_work
    assert sched.schedule() is None


def test_an_end_by_length_wastes_no_row() -> None:
    """The end by length is known before the last token is read."""
    sched = scheduler()
    sched.add(sequence(prompt(4), 2))
    sched.submitted(first := scheduled(sched))
    second = scheduled(sched)
    sched.collect(first, [5])
    sched.submitted(second)
    assert sched.schedule() is None
    assert sched.has_work
    assert [seq.output_token_ids for _, seq in sched.collect(second, [5])] == [[5, 5]]
    assert not sched.has_work


@pytest.mark.parametrize("mode", MODES)
def test_an_end_of_sequence_is_seen_one_step_late(mode: Mode) -> None:
    sim = Simulation(num_blocks=100, mode=mode)
    for index in range(30):
        sim.add(sequence([index % 7, index // 7], 20, request_id=str(index), eos=True))
    sim.drain()
    ended = [seq for seq in sim.sequences if seq.finish_reason is FinishReason.STOP]
    assert len(ended) > 10
    early = [seq for seq in ended if len(seq.output_token_ids) < 20]
    assert sim.wasted_rows == (0 if mode == "sync" else len(early))


def test_a_stop_string_ends_a_sequence_whose_next_token_is_in_flight() -> None:
    sched = scheduler()
    sched.add(seq := sequence(prompt(4), 9))
    sched.submitted(first := scheduled(sched))
    second = scheduled(sched)
    sched.collect(first, [5])
    sched.finish(seq, FinishReason.STOP, "\n\n")
    sched.submitted(second)
    assert sched.collect(second, [5]) == []
    assert (seq.output_token_ids, seq.stop_reason) == ([5], "\n\n")
    sched.finish(seq, FinishReason.ABORT)
    assert seq.finish_reason is FinishReason.STOP, "the first end counts"


def test_abort_frees_at_once() -> None:
    sched = scheduler()
    sched.add(first := sequence(prompt(9)), first.fork(1))
    sched.submitted(output := scheduled(sched))
    assert sched.stats().blocks_used == 3
    ended = sched.abort("r")
    assert [seq.index for seq in ended] == [0, 1]
    assert {seq.finish_reason for seq in ended} == {FinishReason.ABORT}
    stats = sched.stats()
    assert (stats.blocks_used, stats.num_running, stats.num_waiting) == (0, 0, 0)
    assert sched.has_work, "its token is still to be read"
    assert sched.collect(output, [5]) == []
    assert not sched.has_work
    assert sched.abort("r") == []


@pytest.mark.parametrize("when", ["waiting", "scheduled", "submitted"])
def test_released_sequences_are_named_once(when: str) -> None:
    sched = scheduler()
    sched.add(seq := sequence(prompt(4)))
    if when != "waiting":
        output = scheduled(sched)
        assert output.released == ()
    if when == "submitted":
        sched.submitted(output)
    sched.abort("r")
    assert sched.take_released() == ((seq.seq_id,) if when != "waiting" else ())
    assert sched.take_released() == ()


def test_a_step_that_failed() -> None:
    sched = scheduler(max_num_batched_tokens=16)
    for name, length in (("a", 5), ("b", 12), ("c", 5)):
        sched.add(sequence(prompt(length, ord(name)), request_id=name))
    output = scheduled(sched)
    assert chunks(output) == [("a", 0, 5), ("b", 0, 8), ("c", 0, 3)]
    sched.submitted(output)
    members = {chunk.sequence for chunk in output.prefill}
    assert set(sched.fail(output)) == members
    assert {seq.finish_reason for seq in members} == {FinishReason.ERROR}
    stats = sched.stats()
    assert (stats.blocks_used, stats.blocks_cached, stats.num_running) == (0, 0, 0)
    while sched.has_work:
        run(sched)
    assert sched.stats().num_finished == 3


def test_others_start_again_after_a_failure() -> None:
    """Sequences outside the failed step may also share blocks whose contents are lost."""
    sched = scheduler(max_prefill_chunk=8)
    sched.add(first := sequence(prompt(20), 2), other := first.fork(1))
    run(sched)
    sched.submitted(output := scheduled(sched))
    assert other.num_computed_tokens == 8
    assert sched.fail(output) == [first]
    assert other.status is SequenceStatus.WAITING
    output = run(sched)
    assert output.released == (first.seq_id, other.seq_id)
    assert chunks(output) == [("r", 0, 8)]
    while sched.has_work:
        run(sched)
    assert other.output_token_ids == [7, 7]


def test_an_output_that_is_not_submitted_changes_nothing() -> None:
    sched = scheduler()
    sched.add(sequence(prompt(9, 1), 3, request_id="a"))
    run(sched)
    sched.add(sequence(prompt(9, 2), 3, request_id="b"))
    first, second = scheduled(sched), scheduled(sched)
    assert first == second
    assert len(first.decode) == len(first.prefill) == 1
    while sched.has_work:
        run(sched)
    assert sched.stats().blocks_used == 0


def test_stats() -> None:
    sched = scheduler()
    sched.add(first := sequence(prompt(9, 1), 3, request_id="a"), first.fork(1))
    sched.add(sequence(prompt(5, 2), 1, request_id="b"))
    run(sched)
    stats = sched.stats()
    assert (stats.num_running, stats.num_waiting, stats.num_steps) == (2, 0, 1)
    assert (stats.prompt_tokens, stats.cached_tokens, stats.generated_tokens) == (23, 0, 2)
    assert (stats.blocks_total, stats.blocks_used, stats.blocks_cached) == (64, 3, 1)
    while sched.has_work:
        run(sched)
    stats = sched.stats()
    assert (stats.num_finished, stats.num_steps, stats.num_mixed_steps) == (3, 4, 1)
    assert (stats.prompt_tokens, stats.cached_tokens, stats.generated_tokens) == (23, 8, 7)
    assert (stats.num_running, stats.blocks_used) == (0, 0)
