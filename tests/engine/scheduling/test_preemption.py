"""Preemption when blocks run out, and the restart of preempted sequences."""

from __future__ import annotations

from modelpack_engine.core.scheduler import Scheduler
from modelpack_engine.core.sequence import Sequence, SequenceStatus
from modelpack_engine.outputs import FinishReason
from tests.engine.scheduling.simulation import sequence
from tests.engine.scheduling.steps import chunks, prompt, run, scheduled, scheduler


def tight() -> tuple[Scheduler, Sequence, Sequence]:
    """Return two sequences that decode in a pool without a free block, each at a block's end."""
    sched = scheduler(num_blocks=6)
    sched.add(old := sequence(prompt(7, 1), 9, request_id="old"))
    sched.add(young := sequence(prompt(7, 2), 9, request_id="young"))
    run(sched)
    run(sched)
    run(sched)
    return sched, old, young


def test_the_youngest_gives_way_and_is_computed_again() -> None:
    sched, old, young = tight()
    assert sched.stats().num_preemptions == 1
    assert young.status is SequenceStatus.WAITING
    assert (young.num_computed_tokens, young.block_table) == (0, [])
    assert young.num_prefill_tokens == 9, "its outputs are part of what is computed again"
    assert len(old.output_token_ids) == 3
    while not old.is_finished:
        assert young.status is SequenceStatus.WAITING
        run(sched)
    output = run(sched)
    assert [chunk.sequence for chunk in output.prefill] == [young]
    while sched.has_work:
        run(sched)
    assert len(young.output_token_ids) == 9
    assert young.num_cached_tokens == 0, "what it computed itself is no hit"


def test_a_preempted_sequence_finds_what_it_computed_before() -> None:
    sched, old, _ = tight()
    sched.finish(old, FinishReason.STOP)
    assert chunks(run(sched)) == [("young", 8, 1)]


def test_tokens_in_flight_come_before_preemption() -> None:
    """Reading tokens in flight may end a sequence, and then no sequence is preempted."""
    sched = scheduler(num_blocks=6)
    sched.add(old := sequence(prompt(7, 1), 9, request_id="old", eos=True))
    sched.add(young := sequence(prompt(7, 2), 9, request_id="young"))
    run(sched)
    sched.submitted(output := scheduled(sched))
    assert sched.schedule() is None
    assert sched.stats().num_preemptions == 0
    sched.collect(output, [0, 5])
    assert old.is_finished
    assert scheduled(sched).decode == (young,)
    assert sched.stats().num_preemptions == 0


def test_who_needs_a_block_and_is_youngest_gives_way_itself() -> None:
    sched = scheduler(num_blocks=6)
    sched.add(sequence(prompt(9, 1), 9, request_id="old"))
    sched.add(young := sequence(prompt(7, 2), 9, request_id="young"))
    run(sched)
    run(sched)
    output = run(sched)
    assert output.preempted == (young,)
    assert young.seq_id in output.released
    assert len(output.decode) == 1


def test_prompts_get_the_room_they_were_admitted_for_once_streams_end() -> None:
    """A stream took the free block: prompts wait, and none of them blocks another forever."""
    sched = scheduler(num_blocks=12, max_num_seqs=3, max_prefill_chunk=4, max_num_batched_tokens=5)
    sched.add(stream := sequence(prompt(3, 1), 14, request_id="stream"))
    run(sched)
    sched.add(sequence(prompt(18, 2), 1, request_id="a"))
    sched.add(sequence(prompt(14, 3), 1, request_id="b"))
    waited = 0
    while sched.has_work:
        waited += not run(sched).prefill
    assert len(stream.output_token_ids) == 14
    assert sched.stats().num_finished == 3
    assert waited


def test_log_probabilities_of_a_prompt_are_computed_once() -> None:
    """A preempted prompt repeats its first chunk, and keeps its log-probabilities."""
    sched = scheduler(max_num_batched_tokens=8)
    sched.add(wanted := sequence(prompt(20), 2, prompt_logprobs=0))
    assert [chunks(run(sched)) for _ in range(2)] == [[("r", 0, 4)], [("r", 4, 4)]]
    assert wanted.num_prompt_logprobs == 8
    sched._preempt_youngest()
    assert chunks(run(sched)) == [("r", 0, 4)]
    assert wanted.num_prompt_logprobs == 8
    while sched.has_work:
        run(sched)
    assert wanted.num_prompt_logprobs == 19
