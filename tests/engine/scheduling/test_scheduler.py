"""The scheduler, case by case: limits, order, ends, failures."""

from __future__ import annotations

import pytest

from modelpack_engine.block_manager import BlockManager
from modelpack_engine.buckets import Buckets
from modelpack_engine.errors import (
    ContextLengthError,
    EngineError,
    QueueFullError,
    RequestError,
)
from modelpack_engine.outputs import FinishReason
from modelpack_engine.scheduler import Scheduler, SchedulerConfig, SchedulerOutput
from modelpack_engine.sequence import Sequence, SequenceStatus
from tests.engine.scheduling.simulation import MODES, Mode, Simulation, sequence

EOS = 99


def scheduler(
    *,
    num_blocks: int = 65,
    max_num_seqs: int = 8,
    max_num_batched_tokens: int = 64,
    max_model_len: int = 200,
    max_waiting: int = 10,
    max_prefill_chunk: int | None = None,
    buckets: Buckets = Buckets(),  # noqa: B008 (a frozen value)
) -> Scheduler:
    config = SchedulerConfig(
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        max_model_len=max_model_len,
        max_prefill_chunk=max_prefill_chunk,
        max_waiting=max_waiting,
        buckets=buckets,
    )
    return Scheduler(config, BlockManager(num_blocks, 4))


def prompt(length: int, start: int = 1) -> list[int]:
    """Return tokens that no prompt with another start shares."""
    return [1000 * start + i for i in range(length)]


def scheduled(sched: Scheduler) -> SchedulerOutput:
    output = sched.schedule()
    assert output is not None
    return output


def run(sched: Scheduler, token_id: int = 7) -> SchedulerOutput:
    """Run a step, and read it at once."""
    output = scheduled(sched)
    sched.submitted(output)
    sched.collect(output, [token_id] * len(output.sampled))
    return output


def chunks(output: SchedulerOutput) -> list[tuple[str, int, int]]:
    return [(c.sequence.request_id, c.start, c.length) for c in output.prefill]


# Limits.


@pytest.mark.parametrize(
    ("length", "limits", "error", "message"),
    [
        (0, {}, RequestError, "the prompt is empty"),
        (200, {}, ContextLengthError, "has 200 tokens; the context is 200"),
        (33, {"num_blocks": 9}, ContextLengthError, "has 33 tokens; the KV cache holds 32"),
    ],
)
def test_prompts_that_can_never_run(
    length: int, limits: dict[str, int], error: type[RequestError], message: str
) -> None:
    sched = scheduler(**limits)
    with pytest.raises(error, match=message) as caught:
        sched.add(sequence(prompt(length)))
    assert caught.value.param == "prompt"
    assert not sched.has_work


@pytest.mark.parametrize(
    ("length", "limits"), [(1, {}), (199, {}), (32, {"num_blocks": 9}), (1, {"num_blocks": 2})]
)
def test_prompts_that_just_fit(length: int, limits: dict[str, int]) -> None:
    sched = scheduler(**limits)
    seq = sequence(prompt(length), max_tokens=1)
    sched.add(seq)
    for _ in range(length):
        if run(sched).sampled:
            break
    assert seq.finish_reason is FinishReason.LENGTH
    assert seq.output_token_ids == [7]


@pytest.mark.parametrize(
    ("max_tokens", "limits", "outputs"),
    [
        (5, {}, 5),
        (300, {}, 190),  # the context ends
        (300, {"num_blocks": 6}, 11),  # the pool ends; the last token's KV is never needed
    ],
)
def test_length(max_tokens: int, limits: dict[str, int], outputs: int) -> None:
    sched = scheduler(**limits)
    seq = sequence(prompt(10), max_tokens)
    sched.add(seq)
    steps = 0
    while sched.has_work:
        run(sched)
        steps += 1
    assert seq.finish_reason is FinishReason.LENGTH
    assert len(seq.output_token_ids) == outputs == steps


def test_a_full_queue_takes_nothing_and_says_when_to_come_back() -> None:
    sched = scheduler(max_waiting=3)
    sched.add(first := sequence(prompt(4), request_id="a"), first.fork(1))
    second = sequence(prompt(4), request_id="b")
    with pytest.raises(QueueFullError, match="2 sequences wait already, of at most 3") as caught:
        sched.add(second, second.fork(1))
    assert caught.value.retry_after > 0
    assert sched.stats().num_waiting == 2
    sched.add(second)
    run(sched)
    sched.add(sequence(prompt(4), request_id="c"))
    with pytest.raises(RequestError, match="4 choices; the queue holds 3") as refused:
        sched.add(*[sequence(prompt(4), request_id="d")] * 4)
    assert refused.value.param == "n"


def test_two_requests_of_one_name() -> None:
    sched = scheduler()
    sched.add(sequence(prompt(4)))
    with pytest.raises(RequestError, match="request 'r' runs already"):
        sched.add(sequence(prompt(4)))
    run(sched)
    sched.abort("r")
    sched.add(sequence(prompt(4)))


@pytest.mark.parametrize(
    ("seqs", "tokens", "buckets", "needed"),
    [
        (0, 8, Buckets(), 1),
        (9, 8, Buckets(), 9),
        (9, 12, Buckets(rows=(16,)), 16),
        (1, 12, Buckets(chunk=(16,)), 16),
    ],
)
def test_limits_that_do_not_go_together(
    seqs: int, tokens: int, buckets: Buckets, needed: int
) -> None:
    with pytest.raises(EngineError, match=f"is {tokens}, expected {needed} or more"):
        scheduler(max_num_seqs=seqs, max_num_batched_tokens=tokens, buckets=buckets)


@pytest.mark.parametrize(
    ("chunk", "tokens", "sizes", "rows"),
    [
        (None, 64, (1,), 32),
        (None, 1, (1,), 1),
        (20, 64, (1,), 20),
        (20, 64, (16,), 32),
        (100, 64, (16,), 64),
        (100, 70, (16,), 64),
        (None, 70, (16, 64), 64),
    ],
)
def test_chunk_rows(chunk: int | None, tokens: int, sizes: tuple[int, ...], rows: int) -> None:
    config = SchedulerConfig(
        max_num_seqs=1,
        max_num_batched_tokens=tokens,
        max_model_len=100,
        max_prefill_chunk=chunk,
        buckets=Buckets(chunk=sizes),
    )
    assert config.chunk_rows == rows


# Order.


def test_decode_goes_first_then_prompts_in_order() -> None:
    sched = scheduler(max_num_batched_tokens=16, max_prefill_chunk=10)
    sched.add(sequence(prompt(3, 1), request_id="a"))
    run(sched)
    sched.add(sequence(prompt(20, 2), request_id="b"))
    sched.add(sequence(prompt(5, 3), request_id="c"))
    sched.add(sequence(prompt(5, 4), request_id="d"))
    output = run(sched)
    assert [seq.request_id for seq in output.decode] == ["a"]
    # b ends at a block's end; d gets what is left, and goes on in the next step.
    assert chunks(output) == [("b", 0, 8), ("c", 0, 5), ("d", 0, 2)]
    output = run(sched)
    assert [seq.request_id for seq in output.decode] == ["a", "c"]
    assert chunks(output) == [("b", 8, 8), ("d", 2, 3)]


def test_no_more_sequences_than_allowed() -> None:
    sched = scheduler(max_num_seqs=2)
    for name in "abc":
        sched.add(sequence(prompt(4, ord(name)), 2, request_id=name))
    assert [name for name, _, _ in chunks(run(sched))] == ["a", "b"]
    assert [name for name, _, _ in chunks(run(sched))] == []
    assert [name for name, _, _ in chunks(run(sched))] == ["c"]


def test_nobody_overtakes_the_first_in_the_queue() -> None:
    """A long prompt that waits for room is not passed by a short one that would fit."""
    sched = scheduler(num_blocks=9)
    sched.add(sequence(prompt(20, 1), 3, request_id="a"))
    run(sched)
    sched.add(sequence(prompt(20, 2), 1, request_id="b"))
    sched.add(sequence(prompt(1, 3), 1, request_id="c"))
    assert not run(sched).prefill
    assert not run(sched).prefill  # a's last
    assert [name for name, _, _ in chunks(run(sched))] == ["b", "c"]


def test_nobody_is_admitted_on_room_that_another_prompt_was_promised() -> None:
    sched = scheduler(num_blocks=13, max_prefill_chunk=8, max_num_batched_tokens=32)
    sched.add(sequence(prompt(28, 1), 1, request_id="a"))
    sched.add(sequence(prompt(28, 2), 1, request_id="b"))
    assert [name for name, _, _ in chunks(run(sched))] == ["a"]
    while sched.has_work:
        run(sched)
    assert sched.stats().num_preemptions == 0


# Fairness: "short" prompts fit into what one chunk leaves of a step.


@pytest.mark.parametrize("num_long", [1, 3])
def test_a_short_prompt_is_not_held_up_by_long_ones(num_long: int) -> None:
    sched = scheduler(num_blocks=1000, max_model_len=9000)
    for index in range(num_long):
        sched.add(sequence(prompt(1000, index), request_id=f"long {index}"))
    run(sched)
    sched.add(sequence(prompt(30, 50), request_id="short"))
    output = run(sched)
    assert ("short", 0, 30) in chunks(output)
    assert chunks(output)[0] == ("long 0", 32, 32), "nor does the oldest long one wait"
    assert output.num_tokens <= 64


def test_long_prompts_share_what_nobody_else_needs() -> None:
    sched = scheduler(num_blocks=1000, max_model_len=9000)
    for index in range(3):
        sched.add(sequence(prompt(1000, index), request_id=str(index)))
    assert chunks(run(sched)) == [("0", 0, 32), ("1", 0, 32)]


def test_a_long_prompt_is_not_held_up_by_any_number_of_short_ones() -> None:
    sched = scheduler(num_blocks=1000, max_model_len=9000, max_num_seqs=6)
    sched.add(long := sequence(prompt(320, 1), request_id="long"))
    for step in range(10):
        for index in range(2):
            start = 10 + 2 * step + index
            sched.add(sequence(prompt(20, start), 1, request_id=str(start)))
        run(sched)
    assert long.output_token_ids


def test_streams_get_a_token_in_every_step_of_a_long_prompt() -> None:
    sched = scheduler(num_blocks=1000, max_model_len=9000)
    for index in range(4):
        sched.add(sequence(prompt(5, index), 100, request_id=str(index)))
    run(sched)
    sched.add(long := sequence(prompt(800, 9), request_id="long"))
    while not long.output_token_ids:
        output = run(sched)
        assert len(output.decode) == 4
        assert output.num_tokens <= 4 + 32


# Chunks.


@pytest.mark.parametrize(
    ("sizes", "budget", "chunk", "length", "lengths"),
    [
        ((1,), 64, 64, 10, [10]),
        ((1,), 64, 10, 25, [8, 8, 9]),  # cut where a block of 4 ends
        ((1,), 64, 3, 8, [3, 1, 3, 1]),
        ((16,), 64, 32, 70, [32, 32, 6]),
        ((16,), 40, None, 40, [32, 8]),
        ((4, 8), 30, 30, 30, [24, 6]),
    ],
)
def test_chunks_of_one_prompt(
    sizes: tuple[int, ...], budget: int, chunk: int | None, length: int, lengths: list[int]
) -> None:
    sched = scheduler(
        max_num_batched_tokens=budget, max_prefill_chunk=chunk, buckets=Buckets(chunk=sizes)
    )
    sched.add(seq := sequence(prompt(length), 1))
    found = []
    while sched.has_work:
        (part,) = run(sched).prefill
        assert part.is_last == (part.start + part.length == length)
        found.append(part.length)
    assert found == lengths
    assert seq.output_token_ids == [7]


def test_padding_counts() -> None:
    """Ten tokens in chunks of 16 rows: four of them fill a step of 64."""
    sched = scheduler(buckets=Buckets(chunk=(16,)))
    for index in range(6):
        sched.add(sequence(prompt(10, index), request_id=str(index)))
    assert len(run(sched).prefill) == 4


# Ends.


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
    """It is known before the last token is read."""
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


# Preemption.


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
    """Reading them may end a sequence, and then nobody has to give way."""
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
    """A stream took it in between: prompts wait, and none of them blocks another for good."""
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


# Failures.


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
    """Even who did not run may have shared blocks that hold nothing of worth now."""
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
