"""Recurrent state of the running sequences: each has the same row in the arrays of all layers.

A recurrent layer (Mamba, gated delta nets, short convolutions, …) keeps a state per sequence.
Where kernels compute the segments of a step, they read the states from rows of arrays and write
them to others, and the arrays stay. Otherwise, the states after a step are new arrays in the order
of the step's rows. As long as the batch has the same sequences, the next step uses these without
gathering or scattering rows.

Each row of a proposal has a state of its own. Once the tokens are verified, the sequence
continues from the row of the last accepted token.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import ArraysCache
from numpy.typing import NDArray

from modelpack_engine.attention.metadata import Segments, States, StepInputs
from modelpack_engine.core.buckets import round_up
from modelpack_engine.errors import EngineError
from modelpack_engine.layers.segments import LayerStates

if TYPE_CHECKING:
    from modelpack_engine.core.batch import Chunk, StepBatch
    from modelpack_engine.runner.model_layout import StateLayout


#: The alignment of parts in bytes, enough for every type.
_ALIGNMENT = 16

#: The numbers of segments of a step: few, as graphs are compiled for each.
_SIZES = (1, 4, 16, 64)


@dataclass(frozen=True, slots=True)
class _Part:
    """The place of one array of a layer's state within a snapshot's array of the same type."""

    start: int
    shape: tuple[int, ...]
    dtype: mx.Dtype


#: Where the arrays of each layer's state are within the arrays of a snapshot.
_Places = dict["RecurrentState", list[_Part | None]]

#: The shape without the batch, and the type, of each array of a layer's state.
_Shapes = Iterable[tuple[tuple[int, ...], mx.Dtype] | None]


class Snapshot:
    """The states of one sequence in all layers, in one array for each type."""

    def __init__(self, places: _Places, arrays: dict[mx.Dtype, mx.array]) -> None:
        self.places, self._arrays = places, arrays

    @property
    def arrays(self) -> list[mx.array]:
        """The arrays of the snapshot, one for each type."""
        return list(self._arrays.values())

    def of(self, state: RecurrentState) -> list[mx.array | None]:
        """Return the arrays of one layer, with batch size 1."""
        return [None if part is None else self._array(part) for part in self.places[state]]

    def _array(self, part: _Part) -> mx.array:
        stop = part.start + math.prod(part.shape)
        return mx.contiguous(self._arrays[part.dtype][part.start : stop]).reshape(part.shape)


class SlotSnapshot:
    """The states of one sequence, in a slot of all layers' arrays: free when this is deleted."""

    def __init__(self, states: Sequence[RecurrentState], slot: int, free: list[int]) -> None:
        self.slot, self._states, self._free = slot, states, free

    def __del__(self) -> None:
        self._free.append(self.slot)

    def of(self, state: RecurrentState) -> list[mx.array | None]:
        """Return the arrays of one layer, with batch size 1."""
        return [array[self.slot : self.slot + 1] for array in self._written(state)]

    def copy(self) -> Snapshot:
        """Return a copy in arrays of its own."""
        arrays = {state: list[mx.array | None](self._written(state)) for state in self._states}
        return _copied(arrays, self.slot)

    @staticmethod
    def _written(state: RecurrentState) -> list[mx.array]:
        """Return the slots of a layer after all writes, which come with those of states."""
        states = [array for array in state.arrays if array is not None]
        return mx.depends(state.slots, states) if states else state.slots


class SnapshotSlots:
    """`count` slots for snapshots, in arrays [count, …] of the layers, which kernels write."""

    def __init__(
        self, states: Sequence[RecurrentState], layouts: Sequence[StateLayout], count: int
    ) -> None:
        self._states, self._free = states, list(range(count))
        for state, layout in zip(states, layouts, strict=True):
            state.slots = [
                mx.zeros((count, *shape[1:]), dtype)
                for shape, dtype in zip(layout.shapes, layout.dtypes, strict=True)
                if shape is not None and dtype is not None
            ]

    def take(self) -> SlotSnapshot | None:
        """Return a free slot, or None."""
        return SlotSnapshot(self._states, self._free.pop(), self._free) if self._free else None


#: By seq_id: after how many of its rows a step keeps the state of a sequence, and where.
Marks = Mapping[int, tuple[int, SlotSnapshot]]


def take_snapshot(states: Sequence[RecurrentState], row: int) -> Snapshot:
    """Return a copy of the states of one sequence.

    The state itself is usually a view: a row of the states of all sequences, or the end of an array
    that a whole chunk computed. Keeping the view would keep all of that memory.
    """
    return _copied({state: state.arrays for state in states}, row)


def _copied(arrays: Mapping[RecurrentState, list[mx.array | None]], row: int) -> Snapshot:
    """Return a copy of a row of the arrays of all layers."""
    places, sizes = _places(
        (state, [None if a is None else (a.shape[1:], a.dtype) for a in some])
        for state, some in arrays.items()
    )
    pieces: dict[mx.Dtype, list[mx.array]] = {dtype: [] for dtype in sizes}
    for state, some in arrays.items():
        for array, part in zip(some, places[state], strict=True):
            if array is not None and part is not None:
                piece = array[row : row + 1].reshape(-1)  # a view; MLX would gather `array[row]`
                found = pieces[part.dtype]
                padding = _padding(piece.size, part.dtype, first=not found)
                found.append(piece)
                if padding:
                    found.append(mx.zeros((padding,), part.dtype))
    return Snapshot(places, {dtype: mx.concatenate(some) for dtype, some in pieces.items()})


def _places(
    layers: Iterable[tuple[RecurrentState, _Shapes]],
) -> tuple[_Places, dict[mx.Dtype, int]]:
    """Return the places of all layers, and the size of the array of each type."""
    places: _Places = {}
    sizes: dict[mx.Dtype, int] = {}
    for state, shapes in layers:
        parts = places[state] = list[_Part | None]()
        for found in shapes:
            if found is None:
                parts.append(None)
                continue
            shape, dtype = found
            start, size = sizes.get(dtype, 0), math.prod(shape)
            parts.append(_Part(start, (1, *shape), dtype))
            sizes[dtype] = start + size + _padding(size, dtype, first=dtype not in sizes)
    return places, sizes


def _padding(size: int, dtype: mx.Dtype, *, first: bool) -> int:
    """Return the elements after a part of `size`, so that the next one is aligned.

    There are some after the `first`, as MLX does not copy a single array to join it.
    """
    each = _ALIGNMENT // dtype.size
    return -size % each + first * each


class StateContents:
    """Snapshots as bytes, and back: `length` bytes for the states that `layouts` describe."""

    def __init__(self, states: Sequence[RecurrentState], layouts: Sequence[StateLayout]) -> None:
        def shapes(layout: StateLayout) -> _Shapes:
            for shape, dtype in zip(layout.shapes, layout.dtypes, strict=True):
                yield None if shape is None or dtype is None else (shape[1:], dtype)

        pairs = zip(states, layouts, strict=True)
        self._places, self._sizes = _places((state, shapes(layout)) for state, layout in pairs)
        self.length = sum(size * dtype.size for dtype, size in self._sizes.items())

    def describe(self) -> list[str]:
        """Describe the layout of a snapshot; equal descriptions mean compatible bytes."""
        return [f"state {parts}" for parts in self._places.values()]

    def read(self, snapshot: Snapshot | SlotSnapshot) -> mx.array | None:
        """Return uint8 [1, length]; None for states of other shapes, which a few models have."""
        snapshot = snapshot.copy() if isinstance(snapshot, SlotSnapshot) else snapshot
        if snapshot.places != self._places:
            return None
        arrays = dict(zip(self._sizes, snapshot.arrays, strict=True))
        return mx.concatenate([array.view(mx.uint8) for array in arrays.values()])[None]

    def snapshot(self, content: bytes) -> Snapshot:
        """Return the snapshot whose bytes `read` returned."""
        data: Any = memoryview(content)
        whole, start = mx.array(data), 0
        arrays = {}
        for dtype, size in self._sizes.items():
            stop = start + size * dtype.size
            arrays[dtype] = mx.contiguous(whole[start:stop]).view(dtype)
            start = stop
        return Snapshot(self._places, arrays)


#: Where a state comes from: a row of the states before, a snapshot, or zeros.
_Source = int | Snapshot | SlotSnapshot | None


@dataclass(frozen=True, slots=True)
class _Plan:
    """Where the states of a step come from, as rows of the arrays.

    `decode` is None if the arrays are used unchanged. An entry of `chunks` is None for a sequence
    that starts, or a snapshot for one that starts after a cached prefix. `kept` are the rows of
    sequences that are not in this step, and the states before the rows of proposals, if they move.
    """

    decode: list[int] | None
    chunks: tuple[_Source, ...]
    kept: list[int]


@dataclass(slots=True)
class StateRows:
    """The row of each sequence in the state arrays; shared by all layers.

    Steps that compute segments write each state to a free row. Until the next step, its state
    before is unchanged: the step may run again. Other steps compute new arrays, whose number of
    rows is padded by `pad_rows`. On a GPU that leaves few sizes, so that MLX reuses memory: on
    CUDA, allocating arrays of a new size takes longer than a step.
    """

    pad_rows: Callable[[int], int] = int
    rows: dict[int, int] = field(default_factory=dict)
    total: int = 0
    plan: _Plan | None = None
    #: The fewest rows of arrays that stay: compiled steps are traced again when they grow.
    reserved: int = 1
    #: Counts how often the arrays were replaced by others.
    generation: int = 0
    _next_rows: dict[int, int] = field(default_factory=dict)
    #: By seq_id: the rows of the states before the proposal that the last step verifies, and after
    #: each of its rows.
    _proposed: dict[int, list[int]] = field(default_factory=dict)
    _next_proposed: dict[int, list[int]] = field(default_factory=dict)
    next_total: int = 0  # rows after the step that `begin` planned
    _stays: bool = False  # whether `segments` made the arrays

    def begin(self, batch: StepBatch, *, by_segments: bool = False) -> None:
        """Plan a step; unless it computes segments, decode rows have states, padding included.

        Raises `EngineError` if a sequence continues without a state.
        """
        decode = [self._row(seq_id) for seq_id in batch.decode_seq_ids]
        chunks = tuple(self._source(chunk) for chunk in batch.chunks)
        self._next_proposed = {}
        if by_segments:  # `segments` says where the states go
            self.plan = _Plan(decode, chunks, [])
            return
        self._leave()
        as_is = batch.num_decode == self.total and decode == list(range(len(decode)))
        decode += [0] * (batch.num_decode - len(decode))
        present = {*batch.decode_seq_ids, *(chunk.seq_id for chunk in batch.chunks)}
        kept = [seq_id for seq_id in self.rows if seq_id not in present]
        verified = repeated(batch.decode_seq_ids)
        rest = [self.rows[seq_id] for seq_id in [*kept, *verified]]
        self.plan = _Plan(None if as_is else decode, chunks, rest)
        self._next_rows = {}
        for row, seq_id in enumerate(batch.decode_seq_ids):
            self._next_rows.setdefault(seq_id, row)
        self.next_total = batch.num_decode
        for seq_id in [*(chunk.seq_id for chunk in batch.chunks), *kept]:
            self._next_rows[seq_id] = self.next_total
            self.next_total += 1
        for before, seq_id in enumerate(verified, self.next_total):
            first, count = self._next_rows[seq_id], batch.decode_seq_ids.count(seq_id)
            self._next_proposed[seq_id] = [before, *range(first, first + count)]
        self.next_total = self.pad_rows(self.next_total + len(verified))

    def finish(self) -> None:
        """Adopt the rows of the step that `begin` planned."""
        self.rows, self.total, self.plan = self._next_rows, self.next_total, None
        self._proposed = self._next_proposed

    def verified(self, seq_id: int, num_tokens: int) -> None:
        """Continue a sequence after the first `num_tokens` rows of its proposal; 0 is before it."""
        rows = self._proposed.pop(seq_id, None)
        if seq_id in self.rows and rows is not None:
            self.rows[seq_id] = rows[num_tokens]

    def hold(self, seq_id: int) -> None:
        """Keep the state of a sequence under an id of its own until `go_back` or `release`."""
        self.rows[_held(seq_id)] = self.rows[seq_id]

    def go_back(self, seq_id: int) -> None:
        """Continue a sequence from its state at the last `hold`."""
        self.rows[seq_id] = self.rows.pop(_held(seq_id))

    def segments(
        self,
        batch: StepBatch,
        chunk_rows: Sequence[int],
        num_rows: int,
        states: Sequence[RecurrentState],
        layouts: Sequence[StateLayout],
        marks: Marks,
    ) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """Return `runs` and `owners` of the `Segments` of the step that `begin` planned.

        There is a segment for each row that generates, and for each chunk. The first row of each
        chunk in the step is given. Snapshots are taken at the `marks`.
        """
        plan = self.plan
        assert plan is not None, "a step is being built"
        ids = batch.decode_seq_ids
        decode, sources = len(ids), [*(plan.decode or ()), *plan.chunks]
        # Without decode rows, padding has the sizes that steps will have.
        size = round_up(self.pad_rows(max(decode, batch.num_decode) + len(plan.chunks)), _SIZES)
        size = size or _SIZES[0]
        held = {*self.rows.values(), *(row for rows in self._proposed.values() for row in rows)}
        loaded = {id(each): each for each in plan.chunks if isinstance(each, Snapshot)}
        self._make_room(states, layouts, len(held) + len(sources) + len(loaded))
        free = (row for row in range(self.total) if row not in held)
        of_snapshot = {key: next(free) for key in loaded}
        for key, snapshot in loaded.items():
            self._load(states, snapshot, of_snapshot[key])
        after = [next(free) for _ in sources]
        rows = np.arange(decode, dtype=np.int32)
        runs = np.full((size, 6), (-1, 0, -1, -1, -1, -1), np.int32)
        runs[:decode, 1], runs[:decode, 2] = rows, 1
        runs[: len(after), 5] = after
        for row, source in enumerate(sources):
            if isinstance(source, SlotSnapshot):
                runs[row, 0] = -2 - source.slot
            elif source is not None:
                runs[row, 0] = of_snapshot[id(source)] if isinstance(source, Snapshot) else source
        owners = np.full(num_rows, -1, np.int32)
        owners[:decode] = rows
        for row, (chunk, first) in enumerate(zip(batch.chunks, chunk_rows, strict=True), decode):
            runs[row, 1:3] = first, chunk.length
            owners[first : first + chunk.length] = row
        places = {chunk.seq_id: row for row, chunk in enumerate(batch.chunks, decode)}
        for row, seq_id in enumerate(ids):
            first = places.setdefault(seq_id, row)
            if first < row:  # a proposal: from the first row of the sequence
                runs[row, 1:3] = first, row - first + 1
                proposed = self._next_proposed.setdefault(seq_id, [self.rows[seq_id], after[first]])
                proposed.append(after[row])
        for seq_id, (count, slot) in marks.items():
            runs[places[seq_id], 3:5] = count, slot.slot
        self._next_rows = self.rows | {seq_id: after[row] for seq_id, row in places.items()}
        self.next_total = self.total
        return runs, owners

    def _make_room(
        self, states: Sequence[RecurrentState], layouts: Sequence[StateLayout], count: int
    ) -> None:
        """Have arrays of at least `count` rows in all layers, which kernels can write in place."""
        first = states[0].arrays[0]
        found = 0 if first is None else first.shape[0]
        if self._stays and found >= count:
            return
        # Arrays of other steps may be views, of which a kernel would get a copy.
        size = max(count, self.reserved, found + found // 2 if self._stays else found + 1)
        self.generation += 1
        for state, layout in zip(states, layouts, strict=True):
            for index, (shape, dtype) in enumerate(zip(layout.shapes, layout.dtypes, strict=True)):
                assert shape is not None, "the layer computes segments"
                assert dtype is not None, "the layer computes segments"
                more, array = mx.zeros((size - found, *shape[1:]), dtype), state.arrays[index]
                state.arrays[index] = more if array is None else mx.concatenate([array, more])
        self.total, self._stays = size, True

    def _load(self, states: Sequence[RecurrentState], snapshot: Snapshot, row: int) -> None:
        """Write a snapshot to a free row of the arrays, for which MLX may make new ones."""
        self.generation += 1
        for state in states:
            for index, value in enumerate(snapshot.of(state)):
                array, state.arrays[index] = state.arrays[index], None
                assert array is not None, "there is room"
                assert value is not None, "the layer computes segments"
                array[row : row + 1] = value
                state.arrays[index] = array

    def set_aside(
        self, states: Sequence[RecurrentState], num_rows: int
    ) -> list[list[mx.array | None]]:
        """Reduce `states` to the `num_rows` rows, padding included, of a step of decode rows.

        Returns the rows of the other sequences in each layer, for `put_back` after the step is
        built.
        """
        plan = self.plan
        assert plan is not None, "a step is being built"
        assert not plan.chunks, "chunks start from states of their own"
        decode, kept = plan.decode, mx.array(plan.kept, mx.int32)
        if decode is None and num_rows != self.total:
            decode = list(range(self.total))
        if decode is not None:
            index = mx.array(decode + [0] * (num_rows - len(decode)), mx.int32)
        aside: list[list[mx.array | None]] = []
        for state in states:
            arrays = state.arrays
            aside.append([a[kept] if plan.kept and a is not None else None for a in arrays])
            if decode is not None:
                state.arrays = [None if a is None else a[index] for a in arrays]
        self.plan = _Plan(None, (), [])
        return aside

    def put_back(
        self, states: Sequence[RecurrentState], aside: list[list[mx.array | None]], num_rows: int
    ) -> None:
        """Append the rows that `set_aside` returned to the step's `num_rows` rows."""
        for state, rest in zip(states, aside, strict=True):
            for slot, (array, left_out) in enumerate(zip(state.arrays, rest, strict=True)):
                if array is None:
                    continue
                own = array if array.shape[0] == num_rows else array[:num_rows]
                parts = [own] if left_out is None else [own, left_out]
                state.arrays[slot] = _joined(parts, self.next_total)

    def release(self, seq_ids: Iterable[int]) -> None:
        """Forget sequences; their rows are dropped when the batch changes."""
        for seq_id in seq_ids:
            self.rows.pop(seq_id, None)
            self.rows.pop(_held(seq_id), None)
            self._proposed.pop(seq_id, None)

    def clear(self) -> None:
        """Forget all sequences."""
        self.rows, self.total, self.plan, self._proposed = {}, 0, None, {}
        self._leave()

    def _leave(self) -> None:
        """Count that other arrays replace those that `segments` made, if there are such."""
        self.generation += self._stays
        self._stays = False

    def _source(self, chunk: Chunk) -> _Source:
        if isinstance(chunk.snapshot, Snapshot | SlotSnapshot):
            return chunk.snapshot
        return None if chunk.kv_length == chunk.length else self._row(chunk.seq_id)

    def _row(self, seq_id: int) -> int:
        if seq_id not in self.rows:
            raise EngineError(f"sequence {seq_id} has no recurrent state to continue from")
        return self.rows[seq_id]


def _held(seq_id: int) -> int:
    """Return the id of the state that `StateRows.hold` keeps, which no sequence has."""
    return -2 - seq_id


def repeated(seq_ids: Sequence[int]) -> list[int]:
    """Return the ids that occur several times: the sequences that have proposals."""
    return [seq_id for seq_id, count in Counter(seq_ids).items() if count > 1]


class RecurrentState:
    """The states of one layer, in the place of mlx-lm's ArraysCache."""

    def __init__(self, size: int, step: StepInputs, rows: StateRows, name: str = "layer") -> None:
        self.step, self.rows, self.name = step, rows, name
        self.arrays: list[mx.array | None] = [None] * size
        self.slots: list[mx.array] = []  # [slots, …], if snapshots are kept in slots

    def make_mask(self, length: int) -> None:
        """Return no mask: no piece is padded."""
        return

    def __getitem__(self, index: int) -> mx.array:
        raise EngineError(f"{self.name} reads its recurrent state for rows of several sequences")

    def __setitem__(self, index: int, value: mx.array) -> None:
        raise EngineError(f"{self.name} writes its recurrent state for rows of several sequences")

    def decode_view(self, rows: slice) -> ArraysCache:
        """Return a cache with the states of the decode rows `rows` of this step."""
        plan = self._plan()
        view = ArraysCache(len(self.arrays))
        whole = rows == slice(0, self.step.num_decode)
        for index, array in enumerate(self.arrays):
            if array is None:
                continue
            if plan.decode is None:
                view[index] = array if whole else array[rows]
            else:
                view[index] = array[mx.array(plan.decode[rows], mx.int32)]
        return view

    def next_view(self, view: ArraysCache) -> ArraysCache:
        """Return a cache that continues after `view`, the row before in the same proposal."""
        following = ArraysCache(len(self.arrays))
        for slot in range(len(self.arrays)):
            following[slot] = view[slot]
        return following

    def chunk_view(self, index: int) -> ArraysCache:
        """Return a cache with the state of the sequence of chunk `index`."""
        view = ArraysCache(len(self.arrays))
        row = self._plan().chunks[index]
        if isinstance(row, Snapshot | SlotSnapshot):
            for slot, array in enumerate(row.of(self)):
                view[slot] = array
        elif row is not None:
            for slot, array in enumerate(self.arrays):
                view[slot] = None if array is None else array[row : row + 1]
        return view

    def chunks_view(self, indices: Sequence[int]) -> ArraysCache:
        """Return a cache with the states of the sequences of chunks `indices`, in this order."""
        rows = [self._plan().chunks[index] for index in indices]
        view = ArraysCache(len(self.arrays))
        if all(isinstance(row, int) for row in rows):
            index = mx.array(rows, mx.int32)
            for slot, array in enumerate(self.arrays):
                view[slot] = None if array is None else array[index]
            return view
        views = [self.chunk_view(index) for index in indices]
        for slot in range(len(self.arrays)):
            found = [each[slot] for each in views]
            given = next((array for array in found if array is not None), None)
            if given is not None:
                start = mx.zeros_like(given)
                view[slot] = mx.concatenate([start if a is None else a for a in found])
        return view

    def segments_view(self, segments: Segments) -> LayerStates:
        """Return the states of the segments of a step, for a call with all of its rows."""
        arrays = [array for array in self.arrays if array is not None]
        assert len(arrays) == len(self.arrays), "there is room before a step"
        states = map(States, arrays, self.slots or arrays)
        return LayerStates(list(states), segments, self.name)

    def store(self, decode: Sequence[ArraysCache], chunks: Sequence[ArraysCache]) -> None:
        """Store the states that the pieces computed: decode rows in order, then chunks."""
        kept = self._plan().kept
        for index, array in enumerate(self.arrays):
            parts = [view[index] for view in decode]
            if any(view[index] is None for view in (*decode, *chunks)):
                continue
            missing = self.step.num_decode - sum(part.shape[0] for part in parts)
            if missing:  # padding rows, which no piece ran
                parts.append(mx.zeros((missing, *parts[0].shape[1:]), parts[0].dtype))
            parts += [view[index] for view in chunks]
            if kept and array is not None:
                parts.append(array[mx.array(kept, mx.int32)])
            self.arrays[index] = _joined(parts, self.rows.next_total)

    def _plan(self) -> _Plan:
        plan = self.rows.plan
        assert plan is not None, "a step is being built"
        return plan


def _joined(parts: list[mx.array], total: int) -> mx.array:
    """Concatenate `parts` into an array of `total` rows; the rows added at the end are unused."""
    missing = total - sum(part.shape[0] for part in parts)
    if missing:
        parts = [*parts, mx.broadcast_to(parts[0][:1], (missing, *parts[0].shape[1:]))]
    return parts[0] if len(parts) == 1 else mx.concatenate(parts)
