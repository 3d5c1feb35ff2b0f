"""StepInputs: one step's batch on the device, shared by all layers' caches.

Shapes are `exact` on a CPU: rows of similar length are attended together, and nothing is gathered
that no row sees. On a GPU they are the batch's own, which are bucketed: a new shape is expensive.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import mlx.core as mx

from modelpack_engine.attention.spans import Span, length_groups, visible

if TYPE_CHECKING:
    from modelpack_engine.batch import Chunk, StepBatch

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class DecodeGroup:
    """Decode rows attended in one call.

    `rows` (int32 [n], None: all decode rows in order); `tables` int32 [n, blocks]; keys
    [start, stop) of the gathered ones are used; `mask` bool [n, 1, 1, stop - start] or None.
    """

    rows: mx.array | None
    tables: mx.array
    start: int
    stop: int
    mask: mx.array | None


@dataclass(frozen=True, slots=True)
class ChunkKeys:
    """Keys of one prefill chunk: `blocks` int32 [1, blocks], of which [start, stop) are used.

    `mask` as MLX's attention takes it: None for a single query that sees all, "causal"
    (aligned at the bottom right), or bool [queries, keys].
    """

    blocks: mx.array
    start: int
    stop: int
    mask: mx.array | str | None


class StepInputs:
    """Device arrays of the step that is being built; `begin` replaces them."""

    def __init__(self, block_size: int, *, exact: bool) -> None:
        self.block_size = block_size
        self.exact = exact
        self.num_rows = 0
        self.num_decode = 0
        self.decode_seq_ids: tuple[int, ...] = ()
        self.chunks: tuple[Chunk, ...] = ()
        self._tables: list[list[int]] = []
        self._lengths: list[int] = []
        self._memo: dict[object, object] = {}
        self.positions = self.slots = self.sample_rows = mx.zeros((0,), mx.int32)
        self.active = False
        self.all_rows_sampled = False
        self.rows_taken = False

    def begin(self, batch: StepBatch, sample_rows: list[int]) -> None:
        """Take over `batch`; `sample_rows` are its sampled rows, padded to a bucket."""
        self.num_rows = len(batch.token_ids)
        self.num_decode = batch.num_decode
        self.decode_seq_ids = tuple(batch.decode_seq_ids)
        self.chunks = tuple(batch.chunks)
        self._tables, self._lengths = batch.decode_tables, batch.decode_lengths
        self._memo = {}
        self.positions = mx.array(batch.positions, mx.int32)
        self.slots = mx.array(batch.slots, mx.int32)
        self.sample_rows = mx.array(sample_rows, mx.int32)
        self.all_rows_sampled = sample_rows == list(range(self.num_rows))
        self.rows_taken = False
        self.active = True

    def end(self) -> None:
        """Drop what only building the graph needed."""
        self._memo = {}
        self.active = False

    def remember(self, key: object, make: Callable[[], T]) -> T:
        """Return what `make` made for `key` in this step."""
        if key not in self._memo:
            self._memo[key] = make()
        return self._memo[key]  # type: ignore[return-value]

    def decode_length(self, row: int) -> int:
        """Return the length of the sequence of decode row `row`, its new token included."""
        return self._lengths[row]

    def decode_span(self, row: int, window: int | None) -> tuple[Span, list[int]]:
        """Return what decode row `row` sees, and its block table."""
        return visible(self._lengths[row], window, self.block_size), list(self._tables[row])

    def chunk_span(self, index: int, window: int | None) -> tuple[Span, list[int]]:
        """Return what the tokens of chunk `index` see, and its block table."""
        chunk = self.chunks[index]
        span = visible(chunk.kv_length, window, self.block_size, queries=chunk.length)
        return span, list(chunk.block_table)

    def decode_rows(self) -> tuple[mx.array, mx.array]:
        """Return block tables int32 [rows, width] and lengths int32 [rows] of all decode rows."""
        return self.remember(
            "rows",
            lambda: (mx.array(self._tables, mx.int32), mx.array(self._lengths, mx.int32)),
        )

    def chunk_rows(self, index: int) -> tuple[mx.array, mx.array]:
        """Return the same for the rows of chunk `index`, as if each of them decoded."""
        return self.remember(("rows", index), lambda: self._chunk_rows(index))

    def _chunk_rows(self, index: int) -> tuple[mx.array, mx.array]:
        chunk = self.chunks[index]
        start = chunk.kv_length - chunk.length
        lengths = [start + i + 1 if i < chunk.length else 1 for i in range(chunk.padded_length)]
        table = mx.array(chunk.block_table, mx.int32)
        return (
            mx.broadcast_to(table, (chunk.padded_length, table.size)),
            mx.array(lengths, mx.int32),
        )

    def decode_groups(self, window: int | None) -> tuple[list[DecodeGroup], mx.array | None]:
        """Return groups of similar length, and the order that sorts their outputs by row."""
        return self.remember(("decode", window), lambda: self._decode_groups(window))

    def _decode_groups(self, window: int | None) -> tuple[list[DecodeGroup], mx.array | None]:
        spans = [visible(length, window, self.block_size) for length in self._lengths]
        groups = length_groups([span.num_blocks for span in spans])
        if len(groups) == 1:
            return [self._exact_group(groups[0], spans, whole=True)], None
        order = [row for group in groups for row in group]
        inverse = sorted(range(len(order)), key=order.__getitem__)
        made = [self._exact_group(group, spans, whole=False) for group in groups]
        return made, mx.array(inverse, mx.int32)

    def _exact_group(self, rows: list[int], spans: list[Span], *, whole: bool) -> DecodeGroup:
        width = max(spans[row].num_blocks for row in rows)
        tables = []
        for row in rows:
            span = spans[row]
            blocks = self._tables[row][span.first_block : span.first_block + span.num_blocks]
            tables.append(list(blocks) + [0] * (width - len(blocks)))
        first = spans[rows[0]]
        start, stop, mask = first.start, first.stop, None
        if any(spans[row].start != start or spans[row].stop != stop for row in rows):
            start, stop = 0, max(spans[row].stop for row in rows)
            mask = _between([spans[r].start for r in rows], [spans[r].stop for r in rows], stop)
        index = None if whole else mx.array(rows, mx.int32)
        return DecodeGroup(index, mx.array(tables, mx.int32), start, stop, mask)

    def chunk_keys(self, index: int, window: int | None) -> ChunkKeys:
        """Return the keys of chunk `index`."""
        return self.remember(("chunk", index, window), lambda: self._chunk_keys(index, window))

    def _chunk_keys(self, index: int, window: int | None) -> ChunkKeys:
        chunk, size = self.chunks[index], self.block_size
        span = visible(chunk.kv_length, window, size, queries=chunk.length)
        padding = chunk.padded_length - chunk.length
        table = list(chunk.block_table)
        base = span.first_block * size
        if len(table) > -(-chunk.kv_length // size) and not self.exact:
            # The table is bucketed: use all of it, and say with a mask what counts.
            start, stop = 0, len(table) * size - base
        else:
            start, stop = span.start, span.stop + padding
        needed = -(-stop // size)
        blocks = table[span.first_block : span.first_block + needed]
        blocks += [0] * (needed - len(blocks))
        keys = mx.array([blocks], mx.int32)
        aligned = stop == span.stop + padding
        unseen = window is not None and stop - start > window
        if aligned and not unseen:
            return ChunkKeys(keys, start, stop, None if chunk.padded_length == 1 else "causal")
        # Positions counted from the first gathered key.
        first_query = span.stop - chunk.length
        queries = first_query + mx.arange(chunk.padded_length, dtype=mx.int32)[:, None]
        queries = mx.minimum(queries, stop - 1)  # padding, too, has to see something
        positions = mx.arange(start, stop, dtype=mx.int32)[None]
        mask = positions <= queries
        if window is not None:
            mask = mask & (positions > queries - window)
        return ChunkKeys(keys, start, stop, mask)


def _between(starts: list[int], stops: list[int], keys: int) -> mx.array:
    """Return bool [rows, 1, 1, keys]: whether starts <= key < stops."""
    index = mx.arange(keys, dtype=mx.int32)[None]
    mask = index < mx.array(stops, mx.int32)[:, None]
    if any(starts):
        mask = mask & (index >= mx.array(starts, mx.int32)[:, None])
    return mask[:, None, None, :]
