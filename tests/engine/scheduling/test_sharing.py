"""Sequences with a common prefix: computed once, shared in whole blocks."""

from __future__ import annotations

import pytest

from modelpack_engine.outputs import FinishReason
from tests.engine.scheduling.simulation import Simulation, sequence
from tests.engine.scheduling.steps import chunks, prompt, run, scheduled, scheduler


@pytest.mark.parametrize(("length", "shared"), [(3, 0), (4, 0), (5, 4), (8, 4), (11, 8), (100, 96)])
def test_choices_of_one_prompt_compute_it_once(length: int, shared: int) -> None:
    sched = scheduler(max_num_batched_tokens=200, max_prefill_chunk=200)
    sched.add(first := sequence(prompt(length)), *(first.fork(index) for index in (1, 2)))
    output = run(sched)
    if not shared:
        assert chunks(output) == [("r", 0, length)] * 3
        return
    assert chunks(output) == [("r", 0, length)]
    output = run(sched)
    assert output.decode == (first,)
    assert chunks(output) == [("r", shared, length - shared)] * 2
    tables = {tuple(part.sequence.block_table[: shared // 4]) for part in output.prefill}
    assert tables == {tuple(first.block_table[: shared // 4])}
    assert len({part.sequence.block_table[-1] for part in output.prefill}) == 2


def test_choices_follow_a_prompt_that_takes_several_steps() -> None:
    sched = scheduler(max_num_batched_tokens=32, max_prefill_chunk=16)
    sched.add(first := sequence(prompt(50)), second := first.fork(1))
    starts = []
    while not second.output_token_ids:
        starts += [(part.sequence.index, part.start) for part in run(sched).prefill]
    assert starts == [(0, 0), (0, 16), (0, 32), (0, 48), (1, 48)]
    assert (first.num_cached_tokens, second.num_cached_tokens) == (0, 48)


def test_requests_that_arrive_together_share_a_prefix_too() -> None:
    sched = scheduler()
    system = prompt(24)
    for name in "abc":
        sched.add(sequence(system + prompt(6, ord(name)), request_id=name))
    assert chunks(run(sched)) == [("a", 0, 30)]
    assert chunks(run(sched)) == [("b", 24, 6), ("c", 24, 6)]


def test_whoever_waits_to_share_goes_on_alone_if_the_other_ends() -> None:
    sched = scheduler()
    sched.add(sequence(prompt(24), request_id="a"))
    sched.add(sequence(prompt(24), request_id="b"))
    output = scheduled(sched)
    assert chunks(output) == [("a", 0, 24)]
    sched.abort("a")
    sched.submitted(output)
    sched.collect(output, [5])
    assert chunks(run(sched)) == [("b", 0, 24)]


def test_a_request_that_ended_leaves_its_prefix() -> None:
    sched = scheduler()
    sched.add(sequence(prompt(20), 6, request_id="a"))
    while sched.has_work:
        run(sched)
    # A conversation continues: its generated blocks are found as well.
    sched.add(more := sequence(prompt(20) + [7] * 6, request_id="b"))
    run(sched)
    assert more.num_cached_tokens == 24


def test_what_is_shared_takes_no_room_twice() -> None:
    """Many choices of one prompt run in a pool that is hardly larger than the prompt."""
    sched = scheduler(num_blocks=20, max_prefill_chunk=64)
    sched.add(first := sequence(prompt(40), 4), *(first.fork(index) for index in range(1, 5)))
    run(sched)
    run(sched)
    assert sched.stats().num_running == 5
    assert sched.stats().blocks_used == 10 + 1 + 4 * 1


@pytest.mark.parametrize("recurrent", [False, True])
def test_without_a_prefix_cache_every_choice_computes_its_prompt(recurrent: bool) -> None:
    sim = Simulation(num_blocks=40, prefix_caching=False, recurrent=recurrent)
    sim.add(sequence([1, 2, 3, 4, 5, 6], 5), n=2)
    sim.drain()
    assert [part.start for part in sim.outputs[0].prefill] == [0, 0]
    assert {seq.finish_reason for seq in sim.sequences} == {FinishReason.LENGTH}
    assert sim.scheduler.stats().cached_tokens == 0


def test_choices_with_prompt_logprobs() -> None:
    """Each choice computes every row of the prompt, even a cached one."""
    sched = scheduler()
    sched.add(sequence(prompt(20), 1, request_id="before"))
    run(sched)
    sched.add(first := sequence(prompt(20), prompt_logprobs=1), second := first.fork(1))
    assert chunks(run(sched)) == [("r", 0, 20), ("r", 0, 20)]
    assert first.num_prompt_logprobs == second.num_prompt_logprobs == 19
    assert not first.wants_prompt_logprobs
    assert (first.num_cached_tokens, second.num_cached_tokens) == (0, 0)
