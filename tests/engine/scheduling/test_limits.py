"""Requests that can never run or have to wait, and limits that contradict each other."""

from __future__ import annotations

import pytest

from modelpack_engine.core.buckets import Buckets
from modelpack_engine.core.scheduler import SchedulerConfig
from modelpack_engine.errors import ContextLengthError, EngineError, QueueFullError, RequestError
from modelpack_engine.outputs import FinishReason
from tests.engine.scheduling.simulation import sequence
from tests.engine.scheduling.steps import prompt, run, scheduler


@pytest.mark.parametrize(
    ("length", "limits", "error", "message"),
    [
        (0, {}, RequestError, "the prompt is empty"),
        (
            200,
            {},
            ContextLengthError,
            "length is 200 tokens, including the reply, but the prompt has 200",
        ),
        (
            33,
            {"num_blocks": 9},
            ContextLengthError,
            "KV cache, this model's maximum .* is 32 tokens, but the prompt has 33",
        ),
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
    with pytest.raises(QueueFullError, match="2 sequences wait, the limit is 3") as caught:
        sched.add(second, second.fork(1))
    assert caught.value.retry_after > 0
    assert sched.stats().num_waiting == 2
    sched.add(second)
    run(sched)
    sched.add(sequence(prompt(4), request_id="c"))
    with pytest.raises(RequestError, match="n is 4, but the queue holds 3") as refused:
        sched.add(*[sequence(prompt(4), request_id="d")] * 4)
    assert refused.value.param == "n"


def test_two_requests_of_one_name() -> None:
    sched = scheduler()
    sched.add(sequence(prompt(4)))
    with pytest.raises(RequestError, match="request 'r' is already running"):
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


@pytest.mark.parametrize(
    ("context", "start", "alone", "rows"),
    [
        (None, 100_000, False, 512),
        (4096, 0, False, 512),
        (4096, 4096, False, 256),
        (4096, 4096, True, 512),
        (4096, 8192, False, 128),
        (4096, 10**6, False, 16),
    ],
)
def test_chunks_shrink_beside_sequences_that_decode(
    context: int | None, start: int, alone: bool, rows: int
) -> None:
    config = SchedulerConfig(
        8, 2048, 10**7, max_prefill_chunk=512, prefill_context=context,
        buckets=Buckets(chunk=(16, 32, 64, 128)),
    )  # fmt: skip
    assert config.chunk_rows_at(start, alone=alone) == rows


@pytest.mark.parametrize(
    ("tokens", "chunk", "sizes", "rows"),
    [
        (512, None, (1,), (512, 256, 128, 256)),
        (512, 200, (1,), (200, 200, 128, 256)),
        (96, None, (16, 32), (96, 32, 16, 32)),
        (3, None, (1,), (3, 1, 1, 1)),
    ],
)
def test_whole_steps(
    tokens: int, chunk: int | None, sizes: tuple[int, ...], rows: tuple[int, int, int, int]
) -> None:
    """The rows of a prompt without others, of one of several, beside decoding, and of all then."""
    config = SchedulerConfig(
        1, tokens, 10**7, max_prefill_chunk=chunk, whole_steps=True, buckets=Buckets(chunk=sizes)
    )
    assert config.chunk_rows == config.chunk_rows_at(0, alone=True, only=True)
    assert rows == (
        config.chunk_rows,
        config.chunk_rows_at(9, alone=True),
        config.chunk_rows_at(9, alone=False, only=True),
        config.prompt_rows(1),
    )
