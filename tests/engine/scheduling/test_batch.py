"""Batches compared with expected values, field by field."""

from __future__ import annotations

import pytest

from modelpack_engine.core.batch import Chunk, StepBatch, build_batch
from modelpack_engine.core.buckets import EXACT, Buckets
from modelpack_engine.core.scheduler import Scheduler, SchedulerOutput
from modelpack_engine.core.sequence import Sequence
from tests.engine.scheduling.simulation import sequence
from tests.engine.scheduling.steps import run, scheduled, scheduler

PADDED = Buckets(rows=(1, 2, 4), chunk=(4,), table_width=(1, 2, 4))


def mixed(buckets: Buckets) -> tuple[Scheduler, list[Sequence], StepBatch, SchedulerOutput]:
    """Return three sequences: two whose first token is in flight, and one that arrives.

    Blocks have 4 tokens: the first has block 1, the second 2 and 3, and each needs another now.
    """
    sched = scheduler(buckets=buckets)
    seqs = [
        sequence([11, 12, 13, 14], request_id="a"),
        sequence([21, 22, 23, 24, 25, 26, 27, 28], request_id="b"),
        sequence([31, 32, 33, 34, 35, 36], request_id="c"),
    ]
    sched.add(seqs[0])
    sched.add(seqs[1])
    first = scheduled(sched)
    batch = build_batch(first, None, buckets, 4)
    sched.submitted(first)
    sched.add(seqs[2])
    return sched, seqs, batch, first


def test_exact_sizes() -> None:
    sched, (a, b, c), first, _ = mixed(EXACT)
    assert first == StepBatch(
        token_ids=[11, 12, 13, 14, 21, 22, 23, 24, 25, 26, 27, 28],
        positions=[0, 1, 2, 3, 0, 1, 2, 3, 4, 5, 6, 7],
        slots=[4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15],
        from_previous=(),
        num_decode=0,
        decode_tables=[],
        decode_lengths=[],
        decode_seq_ids=(),
        chunks=(
            Chunk(0, 4, 4, 4, (1,), a.seq_id),
            Chunk(4, 8, 8, 8, (2, 3), b.seq_id),
        ),
        sample_rows=(3, 11),
        sample_seqs=(a, b),
    )
    assert build_batch(scheduled(sched), first, EXACT, 4) == StepBatch(
        token_ids=[0, 0, 31, 32, 33, 34, 35, 36],
        positions=[4, 8, 0, 1, 2, 3, 4, 5],
        slots=[16, 20, 24, 25, 26, 27, 28, 29],
        from_previous=((0, 0), (1, 1)),
        num_decode=2,
        decode_tables=[[1, 4], [2, 3, 5]],
        table_width=3,
        decode_lengths=[5, 9],
        decode_seq_ids=(a.seq_id, b.seq_id),
        chunks=(Chunk(2, 6, 6, 6, (6, 7), c.seq_id),),
        sample_rows=(0, 1, 7),
        sample_seqs=(a, b, c),
    )


def test_padded_sizes() -> None:
    sched, (a, b, c), _, output = mixed(PADDED)
    sched.collect(output, [19, 29])
    sched.abort("a")
    batch = build_batch(scheduled(sched), None, PADDED, 4)
    assert batch == StepBatch(
        token_ids=[29, 31, 32, 33, 34, 35, 36, 0, 0],
        positions=[8, 0, 1, 2, 3, 4, 5, 0, 0],
        slots=[16, 20, 21, 22, 23, 24, 25, 0, 0],
        from_previous=(),
        num_decode=1,
        decode_tables=[[2, 3, 4]],
        table_width=4,
        decode_lengths=[9],
        decode_seq_ids=(b.seq_id,),
        chunks=(Chunk(1, 6, 8, 6, (5, 6), c.seq_id),),
        sample_rows=(0, 6),
        sample_seqs=(b, c),
        released=(a.seq_id,),
    )
    assert batch.num_rows == 9


def test_padded_decode_rows_stand_in_the_null_block() -> None:
    sched = scheduler(buckets=PADDED)
    for name in "abc":
        sched.add(sequence([ord(name)], request_id=name))
    run(sched)
    batch = build_batch(scheduled(sched), None, PADDED, 4)
    assert (batch.num_decode, len(batch.decode_seq_ids), batch.num_rows) == (4, 3, 4)
    assert (batch.token_ids[3], batch.positions[3], batch.slots[3]) == (0, 0, 0)
    assert (batch.decode_tables[3], batch.decode_lengths[3]) == ([], 1)
    assert batch.padded_tables() == [[1], [2], [3], [0]]
    assert batch.sample_rows == (0, 1, 2)


@pytest.mark.parametrize(
    ("chunk", "table_width", "padded_length", "table"),
    [
        ((1,), (1,), 5, (1, 2)),
        ((4,), (1,), 8, (1, 2)),
        ((12,), (1,), 12, (1, 2, 0)),  # the keys of padding rows need slots as well
        ((12,), (4,), 12, (1, 2, 0, 0)),
    ],
)
def test_tables_of_chunks(
    chunk: tuple[int, ...], table_width: tuple[int, ...], padded_length: int, table: tuple[int, ...]
) -> None:
    buckets = Buckets(chunk=chunk, table_width=table_width)
    sched = scheduler(buckets=buckets)
    sched.add(seq := sequence([1, 2, 3, 4, 5]))
    (made,) = build_batch(scheduled(sched), None, buckets, 4).chunks
    assert made == Chunk(0, 5, padded_length, 5, table, seq.seq_id)


def test_a_later_chunk_starts_amid_its_table() -> None:
    sched = scheduler(max_prefill_chunk=6)
    sched.add(sequence(list(range(100, 110))))
    first = run(sched)
    assert not first.sampled
    batch = build_batch(scheduled(sched), None, EXACT, 4)
    assert batch.token_ids == [104, 105, 106, 107, 108, 109]
    assert batch.positions == [4, 5, 6, 7, 8, 9]
    assert batch.slots == [8, 9, 10, 11, 12, 13]
    assert batch.chunks[0].kv_length == 10
    assert batch.chunks[0].block_table == (1, 2, 3)


def test_a_chunk_of_prompt_and_outputs() -> None:
    """A preempted sequence computes its outputs with its prompt."""
    sched = scheduler()
    sched.add(seq := sequence([1, 2, 3], 9))
    for token_id in (7, 8, 9):
        run(sched, token_id)
    sched._preempt_youngest()
    batch = build_batch(scheduled(sched), None, EXACT, 4)
    assert seq.num_computed_tokens == 4, "its full block was still cached"
    assert batch.token_ids == [8, 9]
    assert batch.sample_rows == (1,)


def test_rows_for_prompt_logprobs() -> None:
    """Every row but the last predicts a prompt token; a restart computes none twice."""
    sched = scheduler(max_prefill_chunk=4)
    sched.add(seq := sequence([1, 2, 3, 4, 5, 6], 9, prompt_logprobs=0))
    sched.add(sequence([5], request_id="other"))
    output = scheduled(sched)
    batch = build_batch(output, None, EXACT, 4)
    assert (batch.prompt_logprob_rows, batch.prompt_logprob_seqs) == ((0, 1, 2, 3), (seq,) * 4)
    sched.submitted(output)
    sched.collect(output, [9])
    while sched._running:
        sched._preempt_youngest()
    output = scheduled(sched)
    assert not build_batch(output, None, EXACT, 4).prompt_logprob_rows
    sched.submitted(output)
    sched.collect(output, [9] * len(output.sampled))
    batch = build_batch(scheduled(sched), None, EXACT, 4)
    assert batch.positions[batch.prompt_logprob_rows[0]] == 4
    assert len(batch.prompt_logprob_rows) == 1
