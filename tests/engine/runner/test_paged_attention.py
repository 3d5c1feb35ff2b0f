"""Paged attention against attention over plain arrays, for any batch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from modelpack_engine.attention import gather
from modelpack_engine.attention.kv_pools import KVLayout
from modelpack_engine.attention.metadata import StepInputs
from modelpack_engine.attention.paged import PagedKV
from modelpack_engine.core.batch import Chunk, StepBatch
from modelpack_engine.core.buckets import EXACT, Buckets

BLOCK = 4
HEADS, KV_HEADS, DIM, VALUE_DIM = 4, 2, 8, 6
BUCKETS = Buckets(rows=(2, 4), chunk=(4, 8), table_width=(2, 4, 16))


@dataclass(frozen=True)
class Case:
    """Lengths of sequences that decode, and (start, length) of chunks."""

    decode: list[int]
    chunks: list[tuple[int, int]]

    @property
    def lengths(self) -> list[int]:
        return self.decode + [start + length for start, length in self.chunks]


CASES = st.builds(
    Case,
    st.lists(st.integers(1, 40), max_size=4),
    st.lists(st.tuples(st.integers(0, 24), st.integers(1, 14)), max_size=2),
).filter(lambda case: bool(case.lengths))


def build(case: Case, buckets: Buckets) -> tuple[StepBatch, list[list[int]]]:
    """Return the batch, and the blocks of every sequence, which are not in ascending order."""
    count = sum(-(-length // BLOCK) for length in case.lengths)
    free = [1 + (7 * i) % count if count % 7 else count - i for i in range(count)]
    tables = [[free.pop() for _ in range(-(-length // BLOCK))] for length in case.lengths]
    rows: list[tuple[int, int]] = []  # position, slot
    for table, length in zip(tables, case.decode, strict=False):
        rows.append((length - 1, table[(length - 1) // BLOCK] * BLOCK + (length - 1) % BLOCK))
    num_decode = buckets.pad_rows(len(rows))
    rows += [(0, 0)] * (num_decode - len(rows))
    width = buckets.pad_table_width(max(map(len, tables[: len(case.decode)]), default=0))
    decode_tables = [t + [0] * (width - len(t)) for t in tables[: len(case.decode)]]
    decode_tables += [[0] * width] * (num_decode - len(decode_tables))
    chunks = []
    for table, (start, length) in zip(tables[len(case.decode) :], case.chunks, strict=True):
        padded = buckets.pad_chunk(length)
        columns = buckets.pad_table_width(-(-(start + padded) // BLOCK))
        padded_table = tuple(table + [0] * (columns - len(table)))
        chunks.append(Chunk(len(rows), length, padded, start + length, padded_table, len(chunks)))
        rows += [(p, table[p // BLOCK] * BLOCK + p % BLOCK) for p in range(start, start + length)]
        rows += [(0, 0)] * (padded - length)
    return (
        StepBatch(
            token_ids=[0] * len(rows),
            positions=[position for position, _ in rows],
            slots=[slot for _, slot in rows],
            from_previous=(),
            num_decode=num_decode,
            decode_tables=decode_tables,
            decode_lengths=case.decode + [1] * (num_decode - len(case.decode)),
            decode_seq_ids=tuple(range(len(case.decode))),
            chunks=tuple(chunks),
            sample_rows=(0,),
            sample_seqs=(),
        ),
        tables,
    )


def given_up(batch: StepBatch, window: int) -> StepBatch:
    """Return the batch with the null block in place of blocks outside every row's window."""

    def without(table: list[int] | tuple[int, ...], length: int) -> list[int]:
        unseen = max(0, length - window) // BLOCK
        return [0] * unseen + list(table[unseen:])

    lengths = batch.decode_lengths
    tables = [without(t, n) for t, n in zip(batch.decode_tables, lengths, strict=True)]
    chunks = [
        replace(c, block_table=tuple(without(c.block_table, c.kv_length - c.length + 1)))
        for c in batch.chunks
    ]
    return replace(batch, decode_tables=tables, chunks=tuple(chunks))


def expected(queries: mx.array, keys: mx.array, values: mx.array, **how: Any) -> mx.array:
    """Compute attention of the last rows of one sequence, arrays [heads, tokens, dim], naively."""
    count, total = queries.shape[1], keys.shape[1]
    group = HEADS // keys.shape[0]
    keys, values = mx.repeat(keys, group, axis=0), mx.repeat(values, group, axis=0)
    scores = how["scale"] * (queries @ keys.swapaxes(-1, -2))
    if how.get("query_pe") is not None:
        scores = scores + how["query_pe"] @ how["rotary_keys"].swapaxes(-1, -2)
    if how.get("softcap"):
        scores = mx.tanh(scores / how["softcap"]) * how["softcap"]
    query = mx.arange(total - count, total)[:, None]
    key = mx.arange(total)[None]
    seen = key <= query
    if how.get("window"):
        seen = seen & (key > query - how["window"])
    scores = mx.where(seen, scores, -mx.inf)
    if how.get("sinks") is None:
        return mx.softmax(scores, axis=-1) @ values
    sinks = mx.broadcast_to(how["sinks"][:, None, None], (HEADS, count, 1))
    weights = mx.softmax(mx.concatenate([scores, sinks], axis=-1), axis=-1)
    return weights[..., :-1] @ values


@pytest.fixture(params=["native", "cpu attention", "bucketed"])
def exact(request: pytest.FixtureRequest) -> Iterator[bool]:
    """Whether shapes are exact; with "cpu attention", small shapes use it as well."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "cpu attention":
            patch.setattr(gather, "FEW_SCORES", 0)
            patch.setattr(gather, "BLOCK", 4)
        yield request.param != "bucketed"


@pytest.mark.sample(1)
@pytest.mark.parametrize("kind", ["plain", "window", "sinks", "softcap", "latent"])
@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(case=CASES, window=st.integers(1, 12))
def test_paged_attention(exact: bool, kind: str, case: Case, window: int) -> None:
    mx.random.seed(1)
    step = StepInputs(BLOCK, exact=exact)
    batch, tables = build(case, EXACT if exact else BUCKETS)
    latent = kind == "latent"
    layout = (
        KVLayout(1, DIM, 1, VALUE_DIM, mx.float32)
        if latent
        else KVLayout(KV_HEADS, DIM, KV_HEADS, VALUE_DIM, mx.float32, None)
    )
    paged = PagedKV(layout, step, num_blocks=64)
    sequences = []
    for table, length in zip(tables, case.lengths, strict=True):
        keys = mx.random.normal((length, layout.key_heads, DIM))
        values = mx.random.normal((length, layout.value_heads, VALUE_DIM))
        slots = mx.array([table[p // BLOCK] * BLOCK + p % BLOCK for p in range(length)])
        paged.pools.write(keys, values, slots, None)
        sequences.append((keys, values))

    step.begin(given_up(batch, window) if kind == "window" else batch, [0])
    rows = batch.num_rows
    queries = mx.random.normal((rows, HEADS, 1, DIM))
    keys = mx.random.normal((rows, layout.key_heads, 1, DIM))
    values = mx.random.normal((rows, layout.value_heads, 1, VALUE_DIM))
    how: dict[str, Any] = {"scale": 0.3}
    if kind == "window":
        how["window"] = window
    elif kind == "sinks":
        how["sinks"] = mx.random.normal((HEADS,))
    elif kind == "softcap":
        how["softcap"] = 2.0
    elif latent:
        how["query_pe"] = mx.random.normal((rows, HEADS, 1, VALUE_DIM))
    paged.update_and_fetch(keys, values)
    output = paged.attend(queries, **how)
    paged.close()
    assert not mx.any(mx.isnan(output)).item()

    pieces = [(row, 1) for row in range(len(case.decode))]
    pieces += [(chunk.row, chunk.length) for chunk in batch.chunks]
    for (row, count), (old_keys, old_values) in zip(pieces, sequences, strict=True):
        new = slice(row, row + count)
        all_keys = mx.concatenate([old_keys[:-count], keys[new, :, 0]]).swapaxes(0, 1)
        all_values = mx.concatenate([old_values[:-count], values[new, :, 0]]).swapaxes(0, 1)
        mine = {k: v[new, :, 0].swapaxes(0, 1) if k == "query_pe" else v for k, v in how.items()}
        if latent:
            mine["rotary_keys"], all_values = all_values, all_keys
        wanted = expected(queries[new, :, 0].swapaxes(0, 1), all_keys, all_values, **mine)
        assert mx.allclose(output[new, :, 0].swapaxes(0, 1), wanted, atol=1e-4).item()
