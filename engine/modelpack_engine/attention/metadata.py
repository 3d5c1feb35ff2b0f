"""StepInputs: the device arrays of a step that all layers share.

Positions, slots, block tables, lengths and masks of the batch, made once per step; `paged.PagedKV`
reads them in every layer. On CPUs it also has a second stream: MLX runs the operations of a CPU
stream one after the other in one thread, so that parallel work needs another stream.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, TypeVar

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from modelpack_engine.attention.kv_pools import (
    KeyRange,
    Run,
    Span,
    consecutive,
    length_groups,
    slot_runs,
    visible,
)
from modelpack_engine.kernels import Tiles
from modelpack_engine.platform.device import Staging, usable_processors
from modelpack_engine.platform.streams import cpu_stream

if TYPE_CHECKING:
    from modelpack_engine.core.batch import Chunk, StepBatch


#: With more rows, reading the rotation matrices takes longer than they save.
FEW_ROWS = 16


#: Matrices [rows, dim, dim] by the arguments of `mx.fast.rope` except rows and offset. Arrays are
#: compared by id and kept with the matrix, so that no other array gets the same id.
Rotations = dict[tuple[object, ...], tuple[mx.array, list[object]]]


class Positions(mx.array):
    """Positions of a step's rows, int32 [rows], with their rotation matrices.

    This array is a copy of `rows`, as any object of a subclass is, which a kernel makes on GPUs.
    `rotations` is None if MLX's own function rotates the rows. `axes` has those of time, height and
    width if the step has rows for which they differ (M-RoPE).
    """

    rows: mx.array
    rotations: Rotations | None = None
    axes: tuple[Positions, ...] = ()

    @classmethod
    def of(cls, rows: mx.array) -> Positions:
        made = cls(rows)
        made.rows = rows
        return made


def make_positions(positions: list[int], *, rotate: bool) -> Positions:
    """Return `positions` on the device; with `rotate`, few rows are rotated by matrices."""
    made = Positions.of(mx.array(positions, mx.int32))
    made.rotations = {} if rotate and len(positions) <= FEW_ROWS else None
    return made


@dataclass(slots=True, eq=False)
class JointLayers:
    """Linear layers that one product computes, and the matrices that adapters add to them.

    `sizes` are the numbers of the layers' outputs. The matrices are [slots, layers * rank, inputs],
    one layer after the other, and [slots, rank, outputs of all layers]; None if no adapter changes
    the layers.
    """

    layers: tuple[nn.Module, ...]
    sizes: tuple[int, ...]
    matrices: tuple[mx.array, mx.array] | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Segments:
    """The segments of a step, on the device.

    `runs` is int32 [segments, 6]: the row of the state before a segment, -1 for zeros, or -2 - slot
    for a snapshot; its first row in the step; the number of its rows; the number of rows after
    which the state is kept as a snapshot, in which slot; and the row of the state after it, which
    is not that of a state before any segment. Without rows, the state is copied; -1 stands for a
    segment that is not there, and for no snapshot. Segments may share rows, if they are the same up
    to the last row of the shorter one. `owners` is int32 [rows]: a segment that ends with each row
    or later, or -1 for padding, of which layers return zeros.
    """

    runs: mx.array
    owners: mx.array


@dataclass(frozen=True, slots=True, eq=False)
class States:
    """The states of sequences, [states, …], and `slots` of snapshots, [slots, …].

    Kernels write both in place, which MLX does not track: what reads them later has to depend on
    the outputs of the layer.
    """

    rows: mx.array
    slots: mx.array


class AdapterMatrices(Protocol):
    """The matrices of all adapters in memory: `patches.lora.LoRALayers`."""

    @property
    def changed(self) -> tuple[str, ...]:
        """The layers that an adapter changes: a graph is compiled for these."""

    @property
    def fuses(self) -> bool:
        """Whether kernels add what adapters change to all of `AdapterRows.joint`."""

    @property
    def changes_only_fused(self) -> bool:
        """Whether adapters change no other layers than those of `AdapterRows.joint`."""

    @property
    def changes_bypassed(self) -> bool:
        """Whether adapters change some of `AdapterRows.bypassed`."""

    @property
    def version(self) -> int:
        """Counts the changes of the matrices, from 1 on."""

    def arrays(self) -> list[mx.array]:
        """Return the matrices of all slots, as inputs of a compiled graph."""

    def replaced(self, arrays: list[mx.array]) -> AbstractContextManager[None]:
        """Compute with these in place of what `arrays` returns within the block."""


class AdapterRows:
    """The adapters of the rows that are being computed, by slot: 0 is the base without adapter.

    `slots` is int32 [rows], or None if no row has an adapter: layers then compute as without
    adapters. `same` is the slot of all rows, if they have the same. `order` is set within experts
    that sort their rows: for each sorted row, its index before.

    For all steps, `joint` are the fused layers, and `matrices` those of the adapters in memory.
    `bypassed` are the layers that fused routers and experts compute without what adapters add.
    """

    def __init__(self) -> None:
        self.slots: mx.array | None = None
        self.same: int | None = None
        self.order: mx.array | None = None
        self.joint: list[JointLayers] = []
        self.bypassed: list[nn.Module] = []
        self.matrices: AdapterMatrices | None = None
        self._host: list[int] = []

    @property
    def fuses(self) -> bool:
        """Whether linear layers may be fused: no row has an adapter, or kernels add it."""
        return self.slots is None or (self.matrices is not None and self.matrices.fuses)

    @property
    def fuses_experts(self) -> bool:
        """Whether routers and experts may be fused: no row has an adapter, or none changes them."""
        return self.slots is None or not (self.matrices is None or self.matrices.changes_bypassed)

    def join(self, *layers: nn.Module) -> JointLayers:
        """Return these layers, which are fused, with a place for the matrices of adapters."""
        sizes = tuple(layer["weight"].shape[0] for layer in layers)
        self.joint.append(JointLayers(layers, sizes))
        return self.joint[-1]

    def begin(self, slots: list[int]) -> None:
        """Set the slots of a step's rows; [] means no adapters, and -1 stands for padding."""
        self._set(slots if any(slot > 0 for slot in slots) else [])

    def trace(self, slots: mx.array) -> None:
        """Set the slots of rows whose graph is being compiled: any of them may differ."""
        self.slots, self.same, self.order, self._host = slots, None, None, []

    def take(self, rows: mx.array) -> None:
        """Reduce the rows to these, int32."""
        if self.slots is not None:
            self.slots = self.slots[rows]

    @contextmanager
    def only(self, rows: Iterable[int]) -> Iterator[None]:
        """Compute these rows of the step within the block; a graph that is traced has all rows."""
        if not self._host:
            yield
            return
        before = self.slots, self.same, self._host
        self._set([self._host[row] for row in rows])
        try:
            yield
        finally:
            self.slots, self.same, self._host = before

    def _set(self, slots: list[int]) -> None:
        self.order, self._host = None, slots
        if not slots:
            self.slots = self.same = None
            return
        different = {slot for slot in slots if slot >= 0}
        self.same = different.pop() if len(different) == 1 else None
        self.slots = mx.array([max(slot, 0) for slot in slots], mx.int32)


T = TypeVar("T")

#: Up to this many rows attend one by one if their blocks are consecutive: no copy is needed.
_FEW_ROWS = 2
#: From this many blocks on, avoiding the copy of the keys is worth a separate call.
_MANY_BLOCKS = 16
#: Up to this many runs, writing slices is faster than scattering rows.
_FEW_RUNS = 3


@dataclass(frozen=True, slots=True)
class DecodeGroup:
    """Decode rows attended in one call; `mask` is bool [rows, 1, 1, keys] or None.

    `rows` selects them: a slice, or int32 [rows].
    """

    rows: slice | mx.array
    keys: KeyRange
    mask: mx.array | None


@dataclass(frozen=True, slots=True)
class ChunkKeys:
    """The keys of one prefill chunk, and the mask for MLX's attention.

    `mask` is None for a single query that sees all keys, "causal" (aligned at the bottom right), or
    bool [queries, keys]. Unless `is_causal`, queries see later keys too.
    """

    keys: KeyRange
    mask: mx.array | str | None
    is_causal: bool = True


class StepInputs:
    """Device arrays of the step that is being built; `begin` replaces them.

    Layers whose blocks are in a window pool have a `StepInputs` of their own: `of_group` returns
    it. It follows this one: only slots and block tables differ.
    """

    def __init__(
        self,
        block_size: int,
        *,
        exact: bool,
        staging: Staging | None = None,
        leader: StepInputs | None = None,
    ) -> None:
        self.block_size = block_size
        self._staging = staging or Staging()
        self.exact = exact
        self.second_stream: mx.Stream | None = None
        if leader is not None:
            self.second_stream = leader.second_stream
        elif exact and usable_processors() > 1:
            self.second_stream = cpu_stream()
        #: The inputs of all groups of layers; the first is this one.
        self.groups: list[StepInputs] = [self]
        self.num_rows = self.num_decode = 0
        self.decode_seq_ids: tuple[int, ...] = ()
        self.chunks: tuple[Chunk, ...] = ()
        self.slot_runs: list[Run] | None = None
        self._tables: list[list[int]] = []
        self._padded_tables: Callable[[], list[list[int]]] | None = None
        self.lengths: list[int] = []  # of the sequences of decode rows, with their new tokens
        self._memo: dict[object, object] = {}
        self.positions = make_positions([], rotate=False)
        #: What is added to the output of the first layers, each [rows, width] (DeepStack).
        self.additions: tuple[mx.array, ...] = ()
        self.slots = self.sample_rows = mx.zeros((0,), mx.int32)
        self.active = self.all_rows_sampled = self.rows_taken = False
        self.crosses = False  # whether rows attend to pictures outside of the KV cache
        #: Whether steps may have proposals: all are then laid out alike.
        self.proposes = False
        self._alone = False  # whether the step is laid out for decode rows of different sequences
        #: Whether layers compute all rows although few are sampled.
        self.keeps_rows = False
        self.tiles: Tiles | None = None
        #: The segments of a compiled step whose recurrent layers compute all rows in one call.
        self.segments: Segments | None = None
        self.adapters: AdapterRows = AdapterRows() if leader is None else leader.adapters
        #: Whether a layer had no kernel for tiles and attended row by row.
        self.tiles_refused = False

    def of_group(self, group: int) -> StepInputs:
        """Return the inputs of the layers in window pool `group` - 1, or this one for 0."""
        while group >= len(self.groups):
            self.groups.append(
                StepInputs(self.block_size, exact=self.exact, staging=self._staging, leader=self)
            )
        return self.groups[group]

    def begin(self, batch: StepBatch, sample_rows: list[int]) -> None:
        """Begin the step of `batch`; `sample_rows` are its sampled rows, padded to a bucket."""
        self._begin_tables(batch)
        if self.exact:
            self.positions = make_positions(batch.positions, rotate=True)
            self.slots = mx.array(batch.slots, mx.int32)
            self.slot_runs = slot_runs(batch.slots, _FEW_RUNS)
            self.sample_rows = mx.array(sample_rows, mx.int32)
        else:
            numbers = [*batch.positions, *batch.slots, *sample_rows]
            packed = self._staging.put(np.array(numbers, np.int32))[: len(numbers)]
            self.positions = Positions.of(packed[: self.num_rows])
            self.slots = packed[self.num_rows : 2 * self.num_rows]
            self.slot_runs = None
            self.sample_rows = packed[2 * self.num_rows :]
        self.positions.axes = tuple(
            make_positions(axis, rotate=self.exact) for axis in batch.rope_positions
        )
        self.all_rows_sampled = sample_rows == list(range(self.num_rows))
        self.rows_taken, self.active, self.crosses = False, True, batch.crosses
        self.adapters.begin(batch.adapter_slots)
        for group, follower in enumerate(self.groups[1:], 1):
            follower._follow(self, batch.of_group(group))

    def _begin_tables(self, batch: StepBatch) -> None:
        self.num_rows, self.num_decode, self.tiles = batch.num_rows, batch.num_decode, None
        self.segments = None
        self.decode_seq_ids = tuple(batch.decode_seq_ids)
        self.chunks = tuple(batch.chunks)
        self._alone = self.can_be_alone(batch)
        self._tables, self.lengths = batch.decode_tables, batch.decode_lengths
        self._padded_tables = batch.padded_tables
        self._memo = {}

    def _follow(self, leader: StepInputs, batch: StepBatch) -> None:
        """Begin the same step as `leader`, with the slots and tables of `batch`."""
        self._begin_tables(batch)
        self._alone = leader._alone
        self.positions, self.sample_rows = leader.positions, leader.sample_rows
        if self.exact:
            self.slots = mx.array(batch.slots, mx.int32)
            self.slot_runs = slot_runs(batch.slots, _FEW_RUNS)
        else:
            packed = self._staging.put(np.array(batch.slots, np.int32))
            self.slots, self.slot_runs = packed[: self.num_rows], None
        self.all_rows_sampled, self.active = leader.all_rows_sampled, True

    def can_be_alone(self, batch: StepBatch) -> bool:
        """Return whether a step of `batch` is laid out for decode rows of different sequences."""
        return not self.proposes and not batch.has_proposals

    def begin_rows(
        self,
        rotations: mx.array,
        slots: mx.array,
        decode: tuple[mx.array, mx.array],
        sample_rows: mx.array | None,
        tiles: Tiles | None = None,
        *,
        alone: bool = False,
    ) -> None:
        """Begin a step of `decode` rows: their block tables, int32 [rows, width], and lengths.

        The rows after them are those of `tiles`. `sample_rows` None stands for all rows. If rows
        are `alone`, no two of `decode` are of one sequence.
        `rotations` are the rotary positions [axes, rows], with one axis or, for M-RoPE, three.
        """
        self.num_rows, self.num_decode = rotations.shape[1], decode[0].shape[0]
        self.tiles, self._alone = tiles, alone and not self.proposes
        self.decode_seq_ids, self.chunks = (), ()
        self._tables, self.lengths = [], []
        self._memo = {"rows": decode}
        # Slices are views; an index would be a gather, which a kernel computes.
        axes = [rotations[axis : axis + 1].reshape(-1) for axis in range(rotations.shape[0])]
        self.positions = Positions.of(axes[0])
        if len(axes) > 1:
            self.positions.axes = tuple(map(Positions.of, axes))
        self.slots, self.slot_runs = slots, None
        self.all_rows_sampled = sample_rows is None
        self.sample_rows = mx.zeros((0,), mx.int32) if sample_rows is None else sample_rows
        self.rows_taken, self.active = False, True
        self.adapters.begin([])

    def follow_rows(
        self,
        leader: StepInputs,
        slots: mx.array,
        decode: tuple[mx.array, mx.array],
        tiles: Tiles | None,
    ) -> None:
        """Begin the step that `begin_rows` of `leader` began, with other slots and tables."""
        rows = None if leader.all_rows_sampled else leader.sample_rows
        alone = leader._alone
        self.begin_rows(leader.positions[None], slots, decode, rows, tiles, alone=alone)
        self.positions = leader.positions

    @property
    def fuses_experts(self) -> bool:
        """Whether routers and experts of the step that is being built may be fused.

        Adapters that change them, DeepStack and cross-attention need layers that are not.
        """
        return self.fuses_linears and self.adapters.fuses_experts

    @property
    def fuses_linears(self) -> bool:
        """Whether layers may be fused that add what adapters change, as `AdapterRows.joint`."""
        return self.active and self.adapters.fuses and not self.additions and not self.crosses

    @property
    def samples_few(self) -> bool:
        """Whether only sampled rows are needed, and are fewer, with padding, than the step's."""
        if self.keeps_rows:
            return False
        return not self.all_rows_sampled and self.sample_rows.shape[0] < self.num_rows

    def end(self) -> None:
        """Drop the arrays that only the construction of the graph needed."""
        self._memo, self.segments = {}, None
        self.positions.rotations, self.positions.axes = None, ()
        self.active, self.additions, self.crosses = False, (), False
        self.adapters.begin([])
        for follower in self.groups[1:]:
            follower._memo, follower.active = {}, False

    def remember(self, key: object, make: Callable[[], T]) -> T:
        """Return the value for `key`, made by `make` once per step."""
        if key not in self._memo:
            self._memo[key] = make()
        return self._memo[key]  # type: ignore[return-value]

    # Decode rows.

    @property
    def rows_alone(self) -> bool:
        """Whether kernels attend from all rows, of which each is the only one of its sequence."""
        return self._alone and not self.exact and not self.chunks and self.tiles is None

    def decode_rows(self) -> tuple[mx.array, mx.array]:
        """Return block tables int32 [rows, width] and lengths int32 [rows] of all decode rows."""
        return self.remember("rows", self._make_decode_rows)

    def _make_decode_rows(self) -> tuple[mx.array, mx.array]:
        assert self._padded_tables is not None, "the step was begun with a batch"
        tables = np.array(self._padded_tables(), np.int32)
        numbers = np.concatenate([tables.ravel(), np.array(self.lengths, np.int32)])
        packed = self._staging.put(numbers)
        return packed[: tables.size].reshape(tables.shape), packed[tables.size : len(numbers)]

    def tile_rows(self) -> tuple[mx.array, mx.array]:
        """Return block tables and lengths of the rows of tiles, as if each of them decoded."""
        assert self.tiles is not None, "the step has no tiles"
        return self.remember("tile rows", self.tiles.as_rows)

    def keys_of(self, row: int, chunk: int | None, window: int | None) -> KeyRange:
        """Return the keys that decode row `row`, or the tokens of `chunk`, see, without padding."""
        if chunk is None:
            table: Sequence[int] = self._tables[row]
            span = self._span(row, window)
        else:
            table, span = self.chunks[chunk].block_table, self.chunk_span(chunk, window)
        blocks = table[span.first_block : span.first_block + span.num_blocks]
        return KeyRange([blocks], span.start, span.stop)

    def decode_groups(self, window: int | None) -> tuple[list[DecodeGroup], mx.array | None]:
        """Return groups of similar length, and the order that sorts their outputs by row."""
        return self.remember(("decode", window), lambda: self._decode_groups(window))

    def _decode_groups(self, window: int | None) -> tuple[list[DecodeGroup], mx.array | None]:
        spans = [self._span(row, window) for row in range(self.num_decode)]
        alone: list[int] = []
        together: list[int] = []
        for row, span in enumerate(spans):
            few = self.num_decode <= _FEW_ROWS or span.num_blocks >= _MANY_BLOCKS
            (alone if few and consecutive(self._seen(row, span)) else together).append(row)
        groups = [[row] for row in alone]
        if together:
            found = length_groups([spans[row].num_blocks for row in together])
            groups += [[together[i] for i in group] for group in found]
        made = [self._decode_group(group, spans) for group in groups]
        order = [row for group in groups for row in group]
        if order == list(range(self.num_decode)):
            return made, None
        return made, mx.array(sorted(range(len(order)), key=order.__getitem__), mx.int32)

    def _decode_group(self, rows: list[int], spans: list[Span]) -> DecodeGroup:
        first = spans[rows[0]]
        start, stop, mask = first.start, first.stop, None
        if any(spans[row].start != start or spans[row].stop != stop for row in rows):
            start, stop = 0, max(spans[row].stop for row in rows)
            mask = _between([spans[r].start for r in rows], [spans[r].stop for r in rows], stop)
        width = max(spans[row].num_blocks for row in rows)
        tables = [self._seen(row, spans[row]) for row in rows]
        tables = [table + [0] * (width - len(table)) for table in tables]
        side_by_side = rows == list(range(rows[0], rows[0] + len(rows)))
        index = slice(rows[0], rows[0] + len(rows)) if side_by_side else mx.array(rows, mx.int32)
        return DecodeGroup(index, KeyRange(tables, start, stop), mask)

    def _span(self, row: int, window: int | None) -> Span:
        return visible(self.lengths[row], window, self.block_size)

    def _seen(self, row: int, span: Span) -> list[int]:
        return list(self._tables[row][span.first_block : span.first_block + span.num_blocks])

    # Chunks.

    def chunk_rows(self, index: int) -> tuple[mx.array, mx.array]:
        """Return tables and lengths of the rows of chunk `index`, as if each of them decoded."""
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

    def chunk_span(self, index: int, window: int | None) -> Span:
        """Return the span of keys that the tokens of chunk `index` see."""
        chunk = self.chunks[index]
        return visible(chunk.kv_length, window, self.block_size, queries=chunk.length)

    def chunk_keys(self, index: int, window: int | None) -> ChunkKeys:
        """Return the keys of chunk `index`, padding included, and their mask."""
        return self.remember(("chunk", index, window), lambda: self._chunk_keys(index, window))

    def _chunk_keys(self, index: int, window: int | None) -> ChunkKeys:
        chunk, size = self.chunks[index], self.block_size
        spans = () if chunk.in_windows and window is None else chunk.spans
        span = self.chunk_span(index, window)
        padding = chunk.padded_length - chunk.length
        table = list(chunk.block_table)
        if len(table) > -(-chunk.kv_length // size) and not self.exact:
            # The table is padded to a bucket: use all of it, and mask the padding.
            start, stop = 0, (len(table) - span.first_block) * size
        else:
            start, stop = span.start, span.stop + padding
        needed = -(-stop // size)
        blocks = table[span.first_block : span.first_block + needed]
        blocks += [0] * (needed - len(blocks))
        keys = KeyRange([blocks], start, stop)
        aligned = stop == span.stop + padding
        unseen = window is not None and stop - start > window
        if aligned and not unseen and not spans:
            return ChunkKeys(keys, None if chunk.padded_length == 1 else "causal")
        # Positions counted from the first gathered key.
        first_query = span.stop - chunk.length
        queries = first_query + mx.arange(chunk.padded_length, dtype=mx.int32)[:, None]
        queries = mx.minimum(queries, stop - 1)  # padding rows must see at least one key
        positions = mx.arange(start, stop, dtype=mx.int32)[None]
        mask = positions <= queries
        before = first_query - (chunk.kv_length - chunk.length)
        for first, last in spans:
            low, high = first + before, last + before
            of_queries = (queries >= low) & (queries < high)
            mask = mask | (of_queries & (positions >= low) & (positions < high))
        if window is not None:
            mask = mask & (positions > queries - window)
        return ChunkKeys(keys, mask, is_causal=not spans)


def _between(starts: list[int], stops: list[int], keys: int) -> mx.array:
    """Return bool [rows, 1, 1, keys]: whether starts <= key < stops."""
    index = mx.arange(keys, dtype=mx.int32)[None]
    mask = index < mx.array(stops, mx.int32)[:, None]
    if any(starts):
        mask = mask & (index >= mx.array(starts, mx.int32)[:, None])
    return mask[:, None, None, :]
