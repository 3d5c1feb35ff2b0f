"""PagedRunner: run an adapted model on KV blocks; on GPUs, its steps are compiled by shape.

Building the graph of a step takes the host as long as the device takes to run it.
`CompiledSteps` therefore builds a graph once for each shape, and replays it. Its rows are the
decode rows, then the rows of prompts in tiles of 16, for the prefill kernel. Where that kernel does
not support a layer, the decode kernel attends from each row of a prompt. It reads the keys again
for every row, so this is limited to short contexts.

All inputs of a step go to the device in one array. MLX uses CUDA's managed memory, whose pages move
between host and GPU: each further array would move more pages.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from numpy.typing import NDArray

from modelpack_engine.attention.metadata import Segments, StepInputs
from modelpack_engine.attention.paged import BlockContents
from modelpack_engine.core.batch import (
    PADDING_SEQ_ID,
    Chunk,
    StepBatch,
    StepShape,
    padding_batch,
)
from modelpack_engine.core.block_pool import NULL_BLOCK
from modelpack_engine.core.buckets import Buckets
from modelpack_engine.errors import EngineError, OutOfMemoryError
from modelpack_engine.kernels import TILE_ROWS, Tiles
from modelpack_engine.layers.kernels import take
from modelpack_engine.platform.device import Staging
from modelpack_engine.runner.adapted import Adapted
from modelpack_engine.runner.hidden_states import HiddenRows, HiddenStates, layers_of
from modelpack_engine.runner.model_layout import ModelLayout
from modelpack_engine.runner.recurrent import StateContents, repeated

#: The longest context, in tokens, of a prompt whose rows attend by the decode kernel.
LONGEST_PROMPT = 1024

#: Numbers of decode rows in steps with chunks, if they are enough; others are padded as usual.
MIXED_DECODE_ROWS = (16, 32)

Pools = list[tuple[mx.array, mx.array]]
#: The arrays of each recurrent layer; None for those that it does not use.
States = list[list[mx.array | None]]
_Numbers = TypeVar("_Numbers", mx.array, NDArray[np.int32])


@dataclass(frozen=True, slots=True)
class Layout:
    """The shape that a graph is compiled for.

    The graph has `rows` rows, of which `decode` are decode rows with block tables of `width`
    columns. The other rows are in `tiles` tiles with block tables of `tile_width` columns. The
    graph returns logits of `sampled` rows; None stands for all rows. Each of `groups` groups of
    layers has slots and tables. Recurrent layers have `segments`, or none if they compute decode
    rows only. Rows have one rotary position on each of `axes` axes. `adapted` are
    the layers that adapters of rows change; rows then have the slots of their adapters. If rows
    are `alone`, no two decode rows are of one sequence.
    """

    rows: int
    decode: int
    width: int
    tiles: int
    tile_width: int
    sampled: int | None
    groups: int = 1
    segments: int = 0
    axes: int = 1
    adapted: tuple[str, ...] = ()
    alone: bool = False

    def cut(self, packed: _Numbers) -> list[_Numbers]:
        """Split `packed`: rotations, lengths, spans, sampled rows, segments and their owners,
        adapters, and the arrays of each group, which are slots, tables and tile tables.
        """
        common: tuple[tuple[int, ...], ...] = (
            (self.axes, self.rows), (self.decode,), (self.tiles, 2), (self.sampled or 0,),
            (self.segments, 6), (self.rows if self.segments else 0,),
            (self.rows if self.adapted else 0,),
        )  # fmt: skip
        of_group: tuple[tuple[int, ...], ...]
        of_group = (self.rows,), (self.decode, self.width), (self.tiles, self.tile_width)
        found, start = list[_Numbers](), 0
        for shape in (*common, *of_group * self.groups):
            stop = start + math.prod(shape)
            found.append(packed[start:stop].reshape(shape))
            start = stop
        return found

    def clear_writes(self, packed: NDArray[np.int32]) -> None:
        """Change `packed` so that the step writes no keys, values or snapshots, only states."""
        _, _, _, _, runs, _, _, *of_groups = self.cut(packed)
        runs[:, 3:5] = -1
        for slots in of_groups[::3]:
            slots[:] = -1


@dataclass(frozen=True, slots=True)
class _Rows:
    """The rows of a compiled graph: int32 arrays, decode rows first, then whole tiles.

    `order` has the batch's row for each row of the graph, or -1 for padding; None if the batch has
    the same order. `padding` counts the rows that the batch does not have. Each group of layers has
    tables. `chunks` has the first row of each chunk.
    """

    order: NDArray[np.int32] | None
    padding: int
    tables: list[NDArray[np.int32]]
    tile_tables: list[NDArray[np.int32]]
    spans: NDArray[np.int32]
    chunks: list[int]


@dataclass(frozen=True, slots=True)
class PackedStep:
    """The integers of a step: `columns` are those of its layout, int32, as `Layout.cut` has them.

    `order` has the batch's row for each row of the graph, any for padding, and `places` the graph's
    row for each of the batch's rows; None if they are the same. `padding` rows follow then.
    `of_adapters` are the adapters' matrices.
    """

    layout: Layout
    columns: list[NDArray[np.int32]]
    order: NDArray[np.int32] | None
    places: NDArray[np.int32] | None
    padding: int
    of_adapters: list[mx.array]

    def in_order(self, embeddings: mx.array, order: mx.array | None) -> mx.array:
        """Return embeddings [..., rows of the batch, width] as the graph's rows, with padding.

        `order` is this step's on the device.
        """
        if order is not None:
            return mx.take(embeddings, order, axis=-2)
        if not self.padding:
            return embeddings
        beside = [(0, 0)] * (embeddings.ndim - 2)
        return mx.pad(embeddings, [*beside, (0, self.padding), (0, 0)])


class CompiledSteps:
    """Runs the steps of an adapted model by compiled graphs, if `takes` accepts the batch."""

    def __init__(
        self, adapted: Adapted, step: StepInputs, buckets: Buckets, staging: Staging
    ) -> None:
        self._adapted, self._step, self.buckets, self._staging = adapted, step, buckets, staging
        self._rows: dict[int, int] = {}  # by seq_id: the row in the tables of the last step
        self._tables: list[NDArray[np.int32]] = []  # of each group of layers
        self._blocks: NDArray[np.int32] = np.zeros((0,), np.int32)
        self._graphs: dict[Layout, Callable[..., Any]] = {}
        self._packed: tuple[StepBatch, list[int], PackedStep] | None = None  # the last step
        #: The graph's row for each row of the last batch; None if they are the same.
        self.places: NDArray[np.int32] | None = None

    @property
    def block_size(self) -> int:
        return self._step.block_size

    @property
    def proposes(self) -> bool:
        """Whether steps may have proposals."""
        return self._step.proposes

    def takes(self, batch: StepBatch) -> bool:
        """Return whether a step can run by a compiled graph.

        Its rows must attend to earlier ones only, not to pictures. Prompts must be short, unless
        the prefill kernel attends from tiles. A recurrent model's step must have no prompts, and a
        state for every row, unless its layers compute segments.
        """
        states = [] if self._adapted.by_segments else self._adapted.states
        if batch.crosses or any(chunk.spans for chunk in batch.chunks):
            return False
        if states and repeated(batch.decode_seq_ids):
            return False
        if states and (batch.chunks or any(a is None for state in states for a in state.arrays)):
            return False
        return not any(group.tiles_refused for group in self._step.groups) or all(
            chunk.kv_length <= LONGEST_PROMPT for chunk in batch.chunks
        )

    def forget(self) -> None:
        """Forget the rows of the last step, before a step that is not compiled."""
        self._rows, self._packed = {}, None
        self.places = None

    def clear(self) -> None:
        """Drop all graphs, after a change of the model's modules."""
        self._graphs.clear()

    def forward(
        self,
        batch: StepBatch,
        token_ids: mx.array,
        sample_rows: list[int],
        input_embeddings: mx.array | None = None,
    ) -> mx.array:
        """Build a step: return the logits [sampled rows, vocabulary], and replace pools and states.

        The logits are padded to a bucket: the next step's rows can then be the sampled ones.
        Call `adapted.begin` before, which plans where the states come from. `input_embeddings` are
        as for `adapted.run`.
        """
        adapted = self._adapted
        found = self.pack(batch, sample_rows)
        layout, order = found.layout, found.order
        self.places = found.places
        if order is None and found.padding:
            token_ids = mx.pad(token_ids, (0, found.padding))
        columns = found.columns if order is None else [*found.columns, order]
        length = sum(map(len, found.columns))
        packed = self._staging.put(np.concatenate(columns))
        taken = None
        if order is not None:
            taken = packed[length : length + len(order)]
            token_ids = take(token_ids, taken)
        if input_embeddings is not None:
            input_embeddings = found.in_order(input_embeddings, taken)
        packed = packed[:length]
        arrays: States = [list(state.arrays) for state in adapted.states]
        pools: Pools = [(kv.pools.keys, kv.pools.values) for kv in adapted.paged]
        set_aside = arrays and not adapted.by_segments
        aside = adapted.rows.set_aside(adapted.states, layout.decode) if set_aside else []
        states = [list(state.arrays) for state in adapted.states]
        slots_of_states = [state.slots for state in adapted.states]
        try:
            given = [] if input_embeddings is None else [input_embeddings]
            logits, new_pools, new_states, hidden = self._graph(layout)(
                token_ids, packed, pools, states, slots_of_states, given, found.of_adapters
            )
            adapted.hidden = hidden[0] if hidden else None
            pools, arrays = new_pools or pools, new_states or arrays
        finally:
            # Tracing leaves placeholder arrays in the caches; put back the real ones.
            for kv, (keys, values) in zip(adapted.paged, pools, strict=True):
                kv.pools.keys, kv.pools.values = keys, values
            for state, own, own_slots in zip(adapted.states, arrays, slots_of_states, strict=True):
                state.arrays, state.slots = list(own), own_slots
        if aside:
            adapted.rows.put_back(adapted.states, aside, batch.num_decode)
        sampled: mx.array = logits[:, -1]
        if adapted.by_segments:
            adapted.written_by(sampled)
        if adapted.writes_in_place and not sample_rows and adapted.paged:
            # Only the pools are evaluated after a step without sampled rows. A step that writes
            # them in place returns none that depend on it, so MLX would never run it.
            first = adapted.paged[0].pools
            first.keys = mx.depends(first.keys, sampled)
        return sampled

    def pack(self, batch: StepBatch, sample_rows: list[int]) -> PackedStep:
        """Lay out a step: return the integers of its graph.

        Call `adapted.begin` before, which plans where the states come from. The last step is laid
        out once, unless rows have states or adapters.
        """
        if self._packed is not None:
            last, last_rows, packed = self._packed
            if last is batch and last_rows == sample_rows:
                return packed
        packed = self._pack(batch, sample_rows)
        changes = self._adapted.states or packed.of_adapters
        self._packed = None if changes else (batch, sample_rows, packed)
        return packed

    def _pack(self, batch: StepBatch, sample_rows: list[int]) -> PackedStep:
        adapted = self._adapted
        positions = np.array(batch.positions, np.int32)
        rotations = positions
        if batch.rope_positions:
            rotations = np.array(batch.rotations or batch.rope_positions, np.int32)
        rows = self._lay_out(batch, positions)
        batches = [batch.of_group(group) for group in range(len(self._step.groups))]
        slots = [np.array(of_group.slots, np.int32) for of_group in batches]
        matrices = self._step.adapters.matrices if batch.adapter_slots else None
        if matrices is not None and not matrices.changed:
            matrices = None  # the adapters of these rows change no layer
        if matrices is not None:
            slots.append(np.maximum(np.array(batch.adapter_slots, np.int32), 0))
        row_places = order = None
        if rows.order is not None:
            order = np.maximum(rows.order, 0)  # rows of padding are the first row
            positions, rotations, *slots = (
                np.where(rows.order < 0, 0, column[..., order])
                for column in (positions, rotations, *slots)
            )
            row_places = np.zeros(batch.num_rows, np.int32)
            row_places[order[::-1]] = np.arange(len(order) - 1, -1, -1, dtype=np.int32)
            sample_rows = row_places[sample_rows].tolist()
        elif rows.padding:
            after = (0, rows.padding)
            positions, *slots = (np.pad(column, after) for column in (positions, *slots))
            rotations = np.pad(rotations, [*[(0, 0)] * (rotations.ndim - 1), after])
        sampled = (self.buckets.pad_rows(len(sample_rows)) or 1) if batch.chunks else None
        lengths = positions[: len(rows.tables[0])] + 1
        columns = [rotations.ravel(), lengths, rows.spans.ravel()]
        runs = None
        if adapted.by_segments:
            runs, owners = adapted.rows.segments(
                batch, rows.chunks, len(positions), adapted.states, adapted.state_layouts,
                adapted.mark(batch),
            )  # fmt: skip
        if sampled is not None:
            columns.append(np.array(sample_rows + [0] * (sampled - len(sample_rows)), np.int32))
        if runs is not None:
            columns += [runs.ravel(), owners]
        if matrices is not None:
            columns.append(slots.pop())
        for arrays_of_group in zip(slots, rows.tables, rows.tile_tables, strict=True):
            columns += [array.ravel() for array in arrays_of_group]
        (decode, width), (tiles, tile_width) = rows.tables[0].shape, rows.tile_tables[0].shape
        layout = Layout(
            len(positions), decode, width, tiles, tile_width, sampled, len(batches),
            segments=0 if runs is None else len(runs),
            axes=rotations.size // len(positions),
            adapted=() if matrices is None else matrices.changed,
            alone=self._step.can_be_alone(batch),
        )  # fmt: skip
        of_adapters = [] if matrices is None else matrices.arrays()
        return PackedStep(layout, columns, order, row_places, rows.padding, of_adapters)

    def _graph(self, layout: Layout) -> Callable[..., Any]:
        """Return the compiled function of a layout; its first call builds the graph."""
        if layout not in self._graphs:
            self._graphs[layout] = mx.compile(lambda *inputs: self._trace(layout, *inputs))
        return self._graphs[layout]

    def trace(
        self,
        layout: Layout,
        token_ids: mx.array,
        packed: mx.array,
        input_embeddings: mx.array | None = None,
        of_adapters: Sequence[mx.array] = (),
    ) -> mx.array:
        """Return the logits of a step that is not compiled, whose pools are written in place.

        Recurrent layers have to compute segments.
        """
        pools: Pools = [(kv.pools.keys, kv.pools.values) for kv in self._adapted.paged]
        states: States = [list(state.arrays) for state in self._adapted.states]
        slots = [state.slots for state in self._adapted.states]
        given = [] if input_embeddings is None else [input_embeddings]
        logits, *_ = self._trace(
            layout, token_ids, packed, pools, states, slots, given, list(of_adapters)
        )
        return logits[:, -1]

    def num_rows(self, batch: StepBatch) -> tuple[int, int]:
        """Return the numbers of decode rows and of all rows of a step's graph."""
        decode = self.buckets.pad_rows(batch.num_decode)
        if batch.chunks:  # few sizes of decode rows: they multiply with the sizes of chunks
            decode = next((size for size in MIXED_DECODE_ROWS if 0 < decode <= size), decode)
        return decode, decode + self._num_tile_rows(decode, sum(map(_tile_rows, batch.chunks)))

    def _lay_out(self, batch: StepBatch, positions: NDArray[np.int32]) -> _Rows:
        """Return the order of the batch's rows in the graph, and their block tables."""
        decode, rows = self.num_rows(batch)
        of_chunks = [_tile_rows(chunk) for chunk in batch.chunks]
        order = None
        if decode != batch.num_decode or any(
            chunk.padded_length != length
            for chunk, length in zip(batch.chunks, of_chunks, strict=True)
        ):
            order = np.full(rows, -1, np.int32)
            order[: batch.num_decode] = np.arange(batch.num_decode)
        tables = self._decode_tables(batch, positions, decode)
        num_tiles = (rows - decode) // TILE_ROWS
        width = max((len(chunk.block_table) for chunk in batch.chunks), default=1)
        tile_tables = [np.full((num_tiles, width), NULL_BLOCK, np.int32) for _ in self._step.groups]
        spans = np.zeros((num_tiles, 2), np.int32)
        row, tile, size = decode, 0, self._step.block_size
        chunk_rows = []
        seen: list[tuple[int, int]] = []
        windows = [window.chunk_tables for window in batch.windows]
        for index, (chunk, length) in enumerate(zip(batch.chunks, of_chunks, strict=True)):
            if order is not None:
                order[row : row + chunk.length] = np.arange(chunk.row, chunk.row + chunk.length)
            chunk_rows.append(row)
            own = [tables_of_chunks[index] for tables_of_chunks in windows]
            for group, tile_table in enumerate(tile_tables):
                table = own[group - 1] if group and own else chunk.block_table
                blocks = table[: -(-chunk.kv_length // size)]
                tile_table[tile : tile + length // TILE_ROWS, : len(blocks)] = blocks
            before = chunk.kv_length - chunk.length
            for first in range(0, length, TILE_ROWS):
                seen.append((before + first, min(TILE_ROWS, chunk.length - first)))
            row, tile = row + length, tile + length // TILE_ROWS
        if seen:
            spans[:tile] = seen
        return _Rows(order, rows - batch.num_rows, tables, tile_tables, spans, chunk_rows)

    def _num_tile_rows(self, decode: int, count: int) -> int:
        """Return the padded number of tile rows: they fill a bucket, or all rows do."""
        alone, together = self.buckets.pad_chunk(count), self.buckets.pad_chunk(decode + count)
        fits = count and (together - decode) % TILE_ROWS == 0
        return min(alone, together - decode) if fits else alone

    def _decode_tables(
        self, batch: StepBatch, positions: NDArray[np.int32], rows: int
    ) -> list[NDArray[np.int32]]:
        """Return the decode rows' block tables [rows, width] of each group of layers.

        The tables of the last step are reused: only those that have grown are written again.
        """
        ids = batch.decode_seq_ids
        width, count = max(batch.decode_width, 1), len(ids)
        blocks = positions[:count] // self._step.block_size
        known = self._rows
        places = {seq_id: row for row, seq_id in enumerate(ids)}
        if len(places) < count:  # proposals: several rows of one sequence, all written again
            known, places = {}, {}
        shape = self._tables[0].shape if self._tables else (0, 1)
        if shape == (rows, width) and known == places and places:
            new = np.flatnonzero(blocks != self._blocks)
        else:
            tables = [np.full((rows, width), NULL_BLOCK, np.int32) for _ in self._step.groups]
            before = np.array([known.get(seq_id, -1) for seq_id in places], np.int32)
            here = np.flatnonzero(before >= 0)
            new = np.ones(count, np.bool_)
            if len(here):
                there = before[here]
                columns = min(width, shape[1])
                for table, last in zip(tables, self._tables, strict=True):
                    table[here, :columns] = last[there, :columns]
                new[here] = blocks[here] != self._blocks[there]
                if width < shape[1]:
                    new[:] = True
            new = np.flatnonzero(new)
            self._tables = tables
        windows = [window.decode_tables for window in batch.windows]
        windows = windows or [batch.decode_tables] * (len(self._tables) - 1)
        for tables_of_group, own in zip(self._tables, [batch.decode_tables, *windows], strict=True):
            for row in new.tolist():
                tables_of_group[row, : len(own[row])] = own[row]
        self._rows, self._blocks = places, blocks
        return self._tables

    def _trace(
        self,
        layout: Layout,
        token_ids: mx.array,
        packed: mx.array,
        pools: Pools,
        states: States,
        slots_of_states: list[list[mx.array]],
        embeddings: list[mx.array],
        of_adapters: list[mx.array],
    ) -> tuple[mx.array, Pools, States, list[mx.array]]:
        """Build the graph of a layout from placeholder arrays; the lists may be empty.

        Returns logits, pools and states, and the hidden states if they are recorded. Pools and
        states that are written in place are not returned: readers within the graph wait for the
        writes, and later steps run later on the same stream.
        """
        rotations, lengths, spans, sample_rows, runs, owners, adapter_slots, *of_groups = (
            layout.cut(packed)
        )
        some = None if layout.sampled is None else sample_rows
        adapted, step = self._adapted, self._step
        for kv, (keys, values) in zip(adapted.paged, pools, strict=True):
            kv.pools.keys, kv.pools.values = keys, values
        for state, arrays, own_slots in zip(adapted.states, states, slots_of_states, strict=True):
            state.arrays, state.slots = list(arrays), own_slots
        for follower, slots, tables, tile_tables in zip(
            step.groups, of_groups[::3], of_groups[1::3], of_groups[2::3], strict=True
        ):
            tiles = Tiles(tile_tables, spans) if spans.shape[0] else None
            if follower is step:
                step.begin_rows(
                    rotations, slots, (tables, lengths), some, tiles, alone=layout.alone
                )
            else:
                follower.follow_rows(step, slots, (tables, lengths), tiles)
        step.segments = Segments(runs, owners) if layout.segments else None
        matrices = step.adapters.matrices
        if layout.adapted and matrices is not None:
            step.adapters.trace(adapter_slots)
            with matrices.replaced(of_adapters):
                logits = adapted.run(token_ids, *embeddings)
        else:
            logits = adapted.run(token_ids, *embeddings)
        if not step.rows_taken and some is not None:
            logits = logits[some]
        new_states: States = []
        if not adapted.by_segments:
            new_states = [list(state.arrays) for state in adapted.states]
        hidden = [] if adapted.hidden is None else [adapted.hidden]
        if adapted.writes_in_place:
            return logits, [], new_states, hidden
        pools = [(kv.pools.keys, kv.pools.values) for kv in adapted.paged]
        return logits, pools, new_states, hidden


def _tile_rows(chunk: Chunk) -> int:
    """Return the rows of a chunk's tiles."""
    return -(-chunk.length // TILE_ROWS) * TILE_ROWS


class PagedRunner:
    """A `ModelRunner` on KV blocks until `undo`; MLX compiles its steps if `compiled` and possible.

    `per_sequence` are classes of attention modules that run sequence by sequence; `fold` and
    `fused` are as for `Adapted`. Raises `OutOfMemoryError` if the pools do not fit.
    """

    supports_prefix_cache = True
    computes_at_once = False

    def __init__(
        self,
        model: nn.Module,
        layout: ModelLayout,
        step: StepInputs,
        *,
        staging: Staging,
        num_blocks: int,
        window_blocks: tuple[int, ...] = (),
        buckets: Buckets,
        per_sequence: frozenset[str],
        fold: bool,
        fused: bool,
        compiled: bool,
    ) -> None:
        self.model, self.buckets, self.staging = model, buckets, staging
        self.notes: tuple[str, ...] = ()
        self._step = step
        self.adapter_rows = step.adapters
        self.adapted = Adapted(
            model,
            layout,
            step,
            num_blocks=num_blocks,
            window_blocks=window_blocks,
            buckets=buckets,
            per_sequence=per_sequence,
            fold=fold,
            fused=fused,
        )
        compiled = compiled and not self.adapted.row_by_row
        if compiled:
            self.adapted.keep_in_slots()
        self.fused, self.snapshots = self.adapted.fused, self.adapted.snapshots
        try:
            self._allocate(num_blocks)
        except BaseException:
            self.undo()
            raise
        self.compiled: CompiledSteps | None = None
        if compiled:
            self.compiled = CompiledSteps(self.adapted, step, buckets, staging)

    def replace_pools(self, layout: ModelLayout, *num_blocks: int) -> None:
        """Replace the pools by pools of `layout`, whose contents are unknown."""
        self.adapted.replace_pools(layout, *num_blocks)
        self._allocate(num_blocks[0])

    def _allocate(self, num_blocks: int) -> None:
        pools = self.adapted.pools()
        try:
            mx.eval(pools, self.adapted.slots())
        except RuntimeError as error:
            size = sum(pool.nbytes for pool in pools)
            raise OutOfMemoryError(
                f"{num_blocks} blocks of the KV cache take {size} bytes: {error}",
                hint="give the KV cache less memory",
            ) from error

    @property
    def layout(self) -> ModelLayout:
        return self.adapted.layout

    @property
    def tier(self) -> str:
        if self.adapted.per_sequence:
            return "per-sequence"
        return "patched" if self.adapted.patched else "paged"

    @property
    def can_go_back(self) -> bool:
        return True

    @cached_property
    def writes_in_place(self) -> bool:
        return self.adapted.writes_in_place

    def forward(
        self, batch: StepBatch, token_ids: mx.array, input_embeddings: mx.array | None = None
    ) -> mx.array:
        self.release(batch.released)
        adapted, rows = self.adapted, list(batch.sample_rows)
        if self.compiled is not None:
            if self.compiled.takes(batch):
                adapted.begin(batch, by_segments=adapted.by_segments)
                found = self.compiled.forward(batch, token_ids, rows, input_embeddings)
                adapted.finish(batch)
                return found
            self.compiled.forget()
            if self.snapshots is not None and batch.chunks:
                self.snapshots.within_chunks = False  # such steps only have states at their ends
        count = len(rows)
        padded = self.buckets.pad_rows(count) or 1
        self._step.begin(batch, rows + [0] * (padded - count))
        adapted.begin(batch)
        logits = adapted.run(token_ids, input_embeddings)
        adapted.finish(batch)
        if not self._step.rows_taken:
            logits = logits[self._step.sample_rows]
        if logits.shape[0] != padded:
            got = logits.shape[0]
            raise EngineError(f"the model returned logits of {got} rows, expected {padded}")
        return logits[:count, -1]

    def record_hidden(self, layers: Iterable[int], reduce: Callable[[mx.array], mx.array]) -> None:
        """Record the inputs of `layers` in every step, as `reduce` returns them.

        Raises `EngineError` for a model whose layers are not in a list.
        """
        adapted, layers = self.adapted, tuple(layers)
        adapted.hidden_states = HiddenStates(self.layout.inner, layers, reduce, adapted.swaps)
        # A fused last layer would return the sampled rows only.
        self._step.keeps_rows = len(layers_of(self.layout.inner)) in layers
        if self.compiled is not None:
            self.compiled.clear()

    def expect_proposals(self) -> None:
        """Let all steps be laid out as those with proposals, whose rows are of one sequence.

        So the shapes that are warmed up are those of all steps.
        """
        self._step.proposes = True

    def hidden_rows(self) -> HiddenRows | None:
        """Return the hidden states of the last step's rows; None if they are not recorded."""
        hidden = self.adapted.hidden
        places = self.compiled.places if self.compiled is not None else None
        return None if hidden is None else HiddenRows(hidden, places)

    @property
    def slow_with_graphs(self) -> bool:
        """Whether steps with prompts are not compiled: their CUDA graphs are never alike."""
        return self.compiled is None or not self.adapted.by_segments

    @property
    def tiles_prompts(self) -> bool:
        """Whether all steps are compiled, whose chunks of prompts are padded to whole tiles."""
        refused = any(group.tiles_refused for group in self._step.groups)
        compiles = self.adapted.by_segments or not self.adapted.states
        return self.compiled is not None and compiles and not refused

    def is_compiled(self, batch: StepBatch) -> bool:
        """Return whether MLX has compiled the forward pass of a step."""
        return self.compiled is not None and self.compiled.takes(batch)

    def pools(self) -> list[mx.array]:
        return self.adapted.pools()

    def release(self, seq_ids: Iterable[int]) -> None:
        """Drop the recurrent state of sequences."""
        self.adapted.rows.release(seq_ids)

    def verified(self, seq_id: int, num_tokens: int) -> None:
        self.adapted.rows.verified(seq_id, num_tokens)

    def scrub(self, blocks: Iterable[int], group: int = 0) -> None:
        size = self._step.block_size
        slots = [block * size + offset for block in blocks for offset in range(size)]
        self.scrub_slots(slots, group)

    def scrub_slots(self, slots: list[int], group: int = 0) -> None:
        for kv in self.adapted.paged:
            if kv.step is self._step.groups[group]:
                kv.pools.zero(mx.array(slots, mx.int32))

    def block_contents(self) -> list[BlockContents]:
        paged = self.adapted.paged
        return [
            BlockContents([kv for kv in paged if kv.step is group]) for group in self._step.groups
        ]

    def state_contents(self) -> StateContents | None:
        return self.adapted.state_contents()

    def warm_up(self, shapes: Iterable[StepShape]) -> mx.Dtype | None:
        """Run steps of padding in these shapes; return the type of the logits, if any step ran.

        Chunks come first: a recurrent model has no states before its first chunk.
        """
        dtype = None
        for shape in sorted(shapes, key=lambda shape: shape.decode_rows):
            batch = padding_batch(shape, self._step.block_size)
            logits = self.forward(batch, mx.zeros((batch.num_rows,), mx.int32))
            mx.eval(logits, self.pools())
            self.release([PADDING_SEQ_ID])
            dtype = logits.dtype
        return dtype

    def undo(self) -> None:
        """Restore the model's classes, and drop the pools."""
        self.adapted.undo()
