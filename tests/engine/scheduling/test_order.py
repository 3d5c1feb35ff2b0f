"""The order of prompts in steps, and their chunks.

"Short" prompts fit in the rows that one chunk leaves in a step.
"""

from __future__ import annotations

import pytest

from modelpack_engine.core.buckets import Buckets
from modelpack_engine.core.scheduler import Scheduler
from tests.engine.scheduling.simulation import sequence
from tests.engine.scheduling.steps import chunks, prompt, run, scheduler


def test_decode_goes_first_then_prompts_in_order() -> None:
    sched = scheduler(max_num_batched_tokens=16, max_prefill_chunk=10)
    sched.add(sequence(prompt(3, 1), request_id="a"))
    run(sched)
    sched.add(sequence(prompt(20, 2), request_id="b"))
    sched.add(sequence(prompt(5, 3), request_id="c"))
    sched.add(sequence(prompt(5, 4), request_id="d"))
    output = run(sched)
    assert [seq.request_id for seq in output.decode] == ["a"]
    # The chunk of b ends with a block; d gets the remaining rows, and continues in the next step.
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
    """A short prompt that would fit does not overtake a long one that waits for blocks."""
    sched = scheduler(num_blocks=9)
    sched.add(sequence(prompt(20, 1), 3, request_id="a"))
    run(sched)
    sched.add(sequence(prompt(20, 2), 1, request_id="b"))
    sched.add(sequence(prompt(1, 3), 1, request_id="c"))
    assert not run(sched).prefill
    assert not run(sched).prefill  # a's last
    assert [name for name, _, _ in chunks(run(sched))] == ["b", "c"]


def admitted(sched: Scheduler) -> list[str]:
    """Run to the end; return the sequences in the order in which prompts were computed."""
    names: dict[str, None] = {}
    while sched.has_work:
        names |= dict.fromkeys(name for name, _, _ in chunks(run(sched)))
    return list(names)


def test_short_prompts_are_admitted_before_long_ones() -> None:
    sched = scheduler(max_num_seqs=1, overtaking=2)
    for name, length in (("a", 9), ("b", 30), ("c", 5), ("d", 20), ("e", 5)):
        sched.add(sequence(prompt(length, ord(name)), 1, request_id=name))
    assert admitted(sched) == ["c", "e", "a", "d", "b"]


@pytest.mark.parametrize(("computed", "first"), [(19, "short"), (20, "long"), (21, "long")])
def test_a_prompt_is_overtaken_for_as_long_as_it_is_longer(computed: int, first: str) -> None:
    """A prompt that is ten tokens longer is overtaken until twenty tokens are computed."""
    sched = scheduler(max_num_seqs=1, overtaking=2)
    sched.add(sequence(prompt(1, 1), 60, request_id="stream"))
    run(sched)
    sched.add(sequence(prompt(15, 2), 1, request_id="long"))
    for _ in range(computed):
        run(sched)
    sched.add(sequence(prompt(5, 3), 1, request_id="short"))
    assert admitted(sched)[0] == first


def test_cached_tokens_make_a_prompt_no_longer() -> None:
    sched = scheduler(max_num_seqs=1, overtaking=2)
    sched.add(sequence(prompt(40, 1), 4, request_id="before"))
    run(sched)
    run(sched)
    sched.add(sequence(prompt(10, 2), 1, request_id="new"))
    sched.add(sequence(prompt(40, 1), 1, request_id="again"))
    assert admitted(sched) == ["again", "new"]


def test_the_preempted_come_before_the_shortest() -> None:
    sched = scheduler(num_blocks=6, overtaking=2)
    sched.add(sequence(prompt(7, 1), 9, request_id="old"))
    sched.add(sequence(prompt(7, 2), 9, request_id="young"))
    for _ in range(3):
        run(sched)
    assert sched.stats().num_preemptions == 1
    sched.add(sequence(prompt(1, 3), 1, request_id="short"))
    assert admitted(sched) == ["young", "short"]


def test_nobody_is_admitted_on_room_that_another_prompt_was_promised() -> None:
    sched = scheduler(num_blocks=13, max_prefill_chunk=8, max_num_batched_tokens=32)
    sched.add(sequence(prompt(28, 1), 1, request_id="a"))
    sched.add(sequence(prompt(28, 2), 1, request_id="b"))
    assert [name for name, _, _ in chunks(run(sched))] == ["a"]
    while sched.has_work:
        run(sched)
    assert sched.stats().num_preemptions == 0


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


def test_a_prompt_without_others_fills_a_step() -> None:
    sched = scheduler(num_blocks=1000, max_model_len=9000, whole_steps=True)
    sched.add(sequence(prompt(140), 1, request_id="long"))
    assert chunks(run(sched)) == [("long", 0, 64)]
    sched.add(sequence(prompt(10, 2), 9, request_id="short"))
    assert chunks(run(sched)) == [("long", 64, 32), ("short", 0, 10)]
    assert chunks(run(sched)) == [("long", 96, 16)], "beside one that decodes"
    assert chunks(run(sched)) == [("long", 112, 16)]
    sched.add(sequence(prompt(100, 3), 1, request_id="other"))
    sched.add(sequence(prompt(100, 4), 1, request_id="another"))
    assert chunks(run(sched)) == [("long", 128, 12), ("other", 0, 16), ("another", 0, 4)]


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
