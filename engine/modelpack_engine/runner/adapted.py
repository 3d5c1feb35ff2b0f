"""Adapted: an mlx-lm model prepared to run the flattened batch of a step, and its paged caches.

Most modules run on the rows of all sequences at once. Attention that failed the self-test runs
sequence by sequence: `_call` calls the module once for each decode row and chunk, with a `KVView`,
which shows it the paged cache of one sequence. Recurrent layers of known classes run once for all
rows of a compiled step. Otherwise, they run once for all decode rows, and once for each chunk, or
for all chunks of similar length together if they support padding.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.models.cache import ArraysCache, CacheList, KVCache, RotatingKVCache

from modelpack_engine import kernels
from modelpack_engine.attention.cache_handle import LostHandleError, RowMask
from modelpack_engine.attention.kv_pools import KVLayout, length_groups
from modelpack_engine.attention.metadata import StepInputs
from modelpack_engine.attention.paged import PagedKV
from modelpack_engine.core.batch import StepBatch
from modelpack_engine.core.block_manager import PrefixSnapshots
from modelpack_engine.core.buckets import EXACT, Buckets
from modelpack_engine.layers import (
    convolution,
    delta_rule,
    linear_attention,
    segments,
    state_space,
)
from modelpack_engine.layers.add_norm import Sums
from modelpack_engine.layers.segments import LayerStates
from modelpack_engine.patches.functions import fast_recurrence
from modelpack_engine.patches.fused_layers import fuse
from modelpack_engine.patches.fused_recurrences import fuse_recurrences
from modelpack_engine.patches.modules import (
    Call,
    ClassSwaps,
    add_to_layers,
    fold_quantised,
    halve_linears,
    patch_modules,
    rotate_by_axes,
    take_logit_rows,
)
from modelpack_engine.patches.recurrent import mask_position, recurrence_of
from modelpack_engine.runner.hidden_states import HiddenStates
from modelpack_engine.runner.model_layout import Leaf, ModelLayout, StateLayout
from modelpack_engine.runner.recurrent import (
    Marks,
    RecurrentState,
    SlotSnapshot,
    Snapshot,
    SnapshotSlots,
    StateContents,
    StateRows,
    repeated,
    take_snapshot,
)

#: The most slots that are kept free for snapshots that are still used after they were dropped.
_SPARE_SLOTS = 16


class Adapted:
    """A model with the classes of some modules swapped, and the caches to call it with.

    Attention modules of the classes in `per_sequence` run sequence by sequence, and others on rows;
    recurrent modules run in groups of sequences. `fold` flattens the inputs of quantised
    linears to two dimensions. `fused` layers run by fused kernels.
    """

    def __init__(
        self,
        model: nn.Module,
        layout: ModelLayout,
        step: StepInputs,
        *,
        num_blocks: int,
        window_blocks: tuple[int, ...] = (),
        buckets: Buckets = EXACT,
        per_sequence: frozenset[str] = frozenset(),
        fold: bool = False,
        fused: bool = False,
    ) -> None:
        self.model = model
        self.layout = layout
        self.swaps = ClassSwaps()
        self.rows = StateRows(buckets.pad_rows)
        self.paged: list[PagedKV] = []
        self.states: list[RecurrentState] = []
        self.taken: list[Snapshot] = []  # snapshots taken by the last step
        self._owners: dict[int, nn.Module] = {}
        self._step, self._num_blocks = step, (num_blocks, *window_blocks)
        self.caches = [self._cache(entry) for entry in layout.tree]
        self.snapshots = PrefixSnapshots(layout.num_snapshots) if self.states else None
        self._slots: SnapshotSlots | None = None
        self._marks: dict[int, tuple[int, SlotSnapshot]] | None = None  # None if steps copy states
        self.patched = patch_modules(model, self.swaps)
        self.per_sequence: Counter[str] = Counter()
        self.recurrent: Counter[str] = Counter()
        #: Whether any attention runs sequence by sequence.
        self.row_by_row = self._split(per_sequence)
        #: Whether recurrent layers can compute all rows of a step in one call.
        self.by_segments = self._computes_segments()
        if layout.inner is not None:
            take_logit_rows(layout.inner, step, self.swaps)
        self.sums = Sums()
        self.hidden_states: HiddenStates | None = None  # recorded for an EAGLE head
        self.hidden: mx.array | None = None  # those of the last step
        self.fused: dict[str, int] = {}
        if fused:
            owners = {id(self._owners[id(kv)]): kv for kv in self.paged if id(kv) in self._owners}
            self.fused = fuse(model, owners, self.sums, step, self.swaps, layout.inner)
            if self.by_segments:
                self._fuse_recurrences()
        rotate_by_axes(model, self.swaps)  # after `fuse`, which looks for the classes of rotations
        add_to_layers(model, step, self.swaps)
        self.folded = fold_quantised(model, self.swaps, dequantise=fused) if fold else 0
        if step.second_stream is not None:
            halve_linears(model, self.swaps, step.second_stream)

    def keep_in_slots(self) -> None:
        """Make compiled steps keep snapshots in slots, if layers compute segments.

        A snapshot that a sequence starts from, or that moves to the offload, keeps its slot after
        it was dropped. So there are more slots than snapshots.
        """
        if not self.by_segments:
            return
        count = self.layout.num_snapshots
        self._slots = SnapshotSlots(self.states, self.state_layouts, count)
        spare = min(max(count // 4, 1), _SPARE_SLOTS)
        self.snapshots = PrefixSnapshots(count - spare, within_chunks=True)

    def mark(self, batch: StepBatch) -> Marks:
        """Return where a compiled step keeps snapshots; `finish` names them."""
        self._marks = {}
        if self.snapshots is None or self._slots is None:
            return {}
        wanted = [(batch.decode_seq_ids[row], 1) for row, _ in batch.decode_snapshots]
        wanted += [
            (chunk.seq_id, chunk.snapshot_after)
            for chunk in batch.chunks
            if chunk.snapshot_hash is not None and chunk.snapshot_hash not in self.snapshots
        ]
        for seq_id, count in wanted:
            found = self._slots.take()
            if found is None:
                self.snapshots.evict_oldest()
                found = self._slots.take()
            if found is None:  # what was evicted is still used: the others may be, too
                break
            self._marks[seq_id] = count, found
        return self._marks

    def _fuse_recurrences(self) -> None:
        def view(cache: Any) -> LayerStates | None:
            if not isinstance(cache, RecurrentState) or self._step.segments is None:
                return None
            return cache.segments_view(self._step.segments)

        dtype = _rows_dtype(self.state_layouts[0])
        count = fuse_recurrences(self.model, dtype, view, self.sums, self._step, self.swaps)
        if count:
            self.fused["recurrence"] = count

    def _cache(self, entry: Leaf | tuple[Leaf, ...]) -> Any:
        if isinstance(entry, tuple):
            return CacheList(*(self._cache(leaf) for leaf in entry))
        if isinstance(entry.content, StateLayout):
            size = len(entry.content.shapes)
            state = RecurrentState(size, self._step, self.rows, entry.name)
            self.states.append(state)
            return state
        if entry.content is None:
            return None
        group = self._group(entry.content)
        paged = PagedKV(
            entry.content,
            self._step.of_group(group),
            num_blocks=self._num_blocks[group],
            name=entry.name,
            frees_blocks=group > 0 or self.layout.window is not None,
        )
        self.paged.append(paged)
        if entry.owner is not None:
            self._owners[id(paged)] = entry.owner
        return paged

    def _group(self, content: KVLayout) -> int:
        """Return the group of a layer: 0, or one more than the index of its window pool."""
        return self.layout.windows.index(content.window) if len(self._num_blocks) > 1 else 0

    def _split(self, per_sequence: frozenset[str]) -> bool:
        """Make modules run sequence by sequence; return whether these include any attention."""
        done: set[int] = set()
        for leaf in self.layout.leaves():
            owner = leaf.owner
            if owner is None or id(owner) in done:
                continue
            name = type(owner).__name__
            if isinstance(leaf.content, StateLayout):
                self.recurrent[name] += 1
            elif name in per_sequence:
                self.per_sequence[name] += 1
            else:
                continue
            done.add(id(owner))
            self.swaps.override(owner, _call)
        attention = any(id(self._owners.get(id(kv))) in done for kv in self.paged)
        if self.per_sequence or attention:
            for paged in self.paged:
                paged.row_masks = True
        return bool(self.per_sequence) or attention

    def _computes_segments(self) -> bool:
        return bool(self.states) and all(
            leaf.owner is not None
            and (known := recurrence_of(leaf.owner)) is not None
            and segments.supports(
                leaf.content.shapes,
                leaf.content.dtypes,
                only_float32="linear_attention" not in known.kernels,
            )
            and _are_right(known.kernels, leaf.owner, leaf.content)
            for leaf in self.layout.leaves()
            if isinstance(leaf.content, StateLayout)
        )

    @cached_property
    def state_layouts(self) -> list[StateLayout]:
        """Return the layout of the state of each recurrent layer."""
        contents = (leaf.content for leaf in self.layout.leaves())
        return [content for content in contents if isinstance(content, StateLayout)]

    def owner_class(self, error: LostHandleError) -> str | None:
        """Return the class name of the module that lost a handle, if it is known."""
        owner = self._owners.get(id(error.cache))
        return None if owner is None else type(owner).__name__

    def attention_classes(self) -> frozenset[str]:
        """Return the class names of all modules that use a paged cache."""
        return frozenset(type(owner).__name__ for owner in self._owners.values())

    def pools(self) -> list[mx.array]:
        """Return the arrays a step writes: evaluate them with its tokens, and do not keep them."""
        arrays = [pool for kv in self.paged for pool in (kv.pools.keys, kv.pools.values)]
        arrays += [a for state in self.states for a in state.arrays if a is not None]
        if self.hidden is not None:
            arrays.append(self.hidden)
        return arrays + [array for snapshot in self.taken for array in snapshot.arrays]

    def state_contents(self) -> StateContents | None:
        """Return the access to the contents of snapshots; None for a model without such state."""
        return StateContents(self.states, self.state_layouts) if self.states else None

    def begin(self, batch: StepBatch, *, by_segments: bool = False) -> None:
        """Plan where the recurrent states of a step come from."""
        self._marks = None
        if self.states:
            self.rows.begin(batch, by_segments=by_segments)

    def finish(self, batch: StepBatch) -> None:
        """Adopt the states of a step, once its graph is built, and its snapshots.

        The states after decode rows are kept without a hash: their last token is not known yet.
        """
        snapshots = self.snapshots
        if snapshots is None:
            return
        self.rows.finish()
        self.taken = []
        for row, index in batch.decode_snapshots:
            seq_id = batch.decode_seq_ids[row]
            if (snapshot := self._snapshot(seq_id)) is not None:
                snapshots.put_unnamed(seq_id, index, snapshot)
        for chunk in batch.chunks:
            hash_ = chunk.snapshot_hash
            if hash_ is None or hash_ in snapshots:
                continue
            at_end = chunk.snapshot_after == chunk.length
            if (snapshot := self._snapshot(chunk.seq_id, at_end=at_end)) is not None:
                snapshots.put(hash_, snapshot)

    def _snapshot(self, seq_id: int, *, at_end: bool = True) -> Snapshot | SlotSnapshot | None:
        """Return the snapshot of a sequence's state where the step kept it, or else a copy."""
        if self._marks is not None:
            return self._marks.get(seq_id, (0, None))[1]
        if not at_end:  # steps that copy states have only those at the end
            return None
        self.taken.append(snapshot := take_snapshot(self.states, self.rows.rows[seq_id]))
        return snapshot

    def run(self, token_ids: mx.array, input_embeddings: mx.array | None = None) -> mx.array:
        """Call the model on the rows of the step that has begun, and end it; return the logits.

        `input_embeddings` is [rows, width], or [1 + layers, rows, width] with DeepStack. Raises
        `LostHandleError` if a layer did not attend to its paged cache.
        """
        extra = {}
        if input_embeddings is not None:
            rows = input_embeddings
            if rows.ndim > 2:
                rows, *additions = rows
                self._step.additions = tuple(additions)
            extra = {"input_embeddings": rows[:, None]}
        try:
            logits: mx.array = self.model(token_ids[:, None], cache=self.caches, **extra)
            for paged in self.paged:
                paged.close()
            if self.hidden_states is not None:
                self.hidden = self.hidden_states.take(self.sums, len(token_ids))
        except BaseException:
            for paged in self.paged:
                paged.abandon()
            raise
        finally:
            self.sums.clear()
            self._step.end()
        return logits

    @property
    def writes_in_place(self) -> bool:
        """Whether kernels write all keys and values straight into the memory of the pools."""
        return not self._step.exact and all(
            kernels.may_write(kv.layout.dtype, kv.layout.pool_dtype, kv.layout.quantised)
            for kv in self.paged
        )

    def slots(self) -> list[mx.array]:
        """Return the arrays of snapshots in slots, which kernels write in place."""
        return [array for state in self.states for array in state.slots]

    def written_by(self, output: mx.array) -> None:
        """Let what reads the states wait for this output of the step, which writes them in place.

        The layers have computed segments. Readers have to be evaluated after the step: MLX runs
        what it evaluates in order, but within it knows only what writes an array as an output.
        """
        arrays = [array for state in self.states for array in state.arrays if array is not None]
        found = iter(mx.depends(arrays, [output]))
        for state in self.states:
            state.arrays = [next(found) for _ in state.arrays]

    def replace_pools(self, layout: ModelLayout, *num_blocks: int) -> None:
        """Replace the pools by pools of zeros for `layout`, with `num_blocks` for each group."""
        self.layout = layout
        for kv, content in zip(self.paged, layout.kv_layouts(), strict=True):
            kv.replace_pools(content, num_blocks[self._group(content)])

    def reset(self) -> None:
        """Forget all sequences."""
        self.rows.clear()
        for state in self.states:
            state.arrays = [None] * len(state.arrays)

    def notes(self) -> tuple[str, ...]:
        """Describe the adaptations applied to the model."""
        notes = [f"{name}: {reason}" for name, reason in self.patched.items()]
        notes += [f"{name} x{n} sequence by sequence" for name, n in self.per_sequence.items()]
        notes += [f"{name} x{n} recurrent" for name, n in self.recurrent.items()]
        return tuple(notes)

    def undo(self) -> None:
        """Restore the model's classes, and drop the pools."""
        self.swaps.undo()
        self._step.adapters.joint.clear()
        self._step.adapters.bypassed.clear()
        self.paged, self.states, self.caches = [], [], []
        self.hidden = self._slots = self._marks = None


_KERNELS = {
    "convolution": convolution.verdict,
    "delta_rule": delta_rule.verdict,
    "linear_attention": linear_attention.verdict,
    "state_space": state_space.verdict,
}


def _rows_dtype(layout: StateLayout) -> mx.Dtype:
    """Return the type of a layer's rows: states of convolutions have it, others are float32."""
    return min((dtype for dtype in layout.dtypes if dtype), key=lambda dtype: dtype.size)


def _are_right(kernels: tuple[str, ...], module: nn.Module, layout: StateLayout) -> bool:
    """Return whether the kernels that compute from a module's states are right on this device."""
    dtypes = {_rows_dtype(layout)}
    if "convolution" not in kernels:  # no state has the type of the rows: weights do
        weights: Any = tree_flatten(module.parameters())
        dtypes |= {leaf.dtype for _, leaf in weights if mx.issubdtype(leaf.dtype, mx.floating)}
    return all(_KERNELS[name](dtype) is None for name in kernels for dtype in dtypes)


class KVView(KVCache):
    """The keys and values that one decode row or chunk sees, with the interface of mlx-lm's cache.

    With `attend`, an update returns the pool's keys and values, which include the new rows. Without
    it, an update returns zeros of the same shape before the new rows. `new` keeps the new rows.
    """

    def __init__(self, cache: PagedKV, row: int, chunk: int | None, *, attend: bool) -> None:
        KVCache.__init__(self)
        self.cache = cache
        if chunk is None:
            self.length, self.total = 1, cache.step.lengths[row]
        else:
            found = cache.step.chunks[chunk]
            self.length, self.total = found.length, found.kv_length
        self.offset = self.total - self.length
        self.attend = attend
        self.row, self.chunk = row, chunk
        self.new: tuple[mx.array, mx.array] | None = None

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> Any:
        """Keep new rows [1, heads, length, dim]; return all visible keys and values, in order."""
        self.new = (keys, values)
        self.offset = self.total
        if self.attend:
            self.keys, self.values = self.cache.fetch(self.row, self.chunk)
        else:
            seen = self.total - self.length
            if self.cache.layout.window is not None:
                seen = min(seen, self.cache.layout.window - 1)
            self.keys, self.values = (
                mx.concatenate([mx.zeros((1, a.shape[1], seen, a.shape[3]), a.dtype), a], axis=2)
                for a in (keys, values)
            )
        return self.keys, self.values

    def keys_and_values(self) -> tuple[mx.array, mx.array]:
        """Return the visible keys and values, for layers that only read this cache."""
        return self.cache.fetch(self.row, self.chunk)

    def make_mask(self, *args: Any, **kwargs: Any) -> Any:
        """Return the mask that mlx-lm's own cache would return."""
        length = args[0] if args else kwargs.pop("N")
        return self.mask_for(length, cache_window=self.cache.layout.window, **kwargs)

    def mask_for(self, length: int, *, cache_window: int | None, **request: Any) -> Any:
        """Return the mask of mlx-lm's cache with `cache_window` at this view's offset."""
        model: KVCache | RotatingKVCache
        model = KVCache() if cache_window is None else RotatingKVCache(cache_window)
        model.offset = self.total - self.length
        if cache_window is not None and length == 1:
            # mlx-lm rotates this mask by its ring buffer's position; our keys are in order.
            window = request.get("window_size")
            if window is None or window >= min(self.total, cache_window):
                return None
            keys = min(self.total, cache_window)
            return mx.arange(keys) >= keys - window
        return model.make_mask(length, **request)


Cache = PagedKV | RecurrentState


class Padded:
    """Chunks of prompts of similar length as an array [chunks, tokens, …], padded at their ends."""

    def __init__(self, step: StepInputs, indices: list[int]) -> None:
        self.indices = indices
        chunks = [step.chunks[index] for index in indices]
        self.lengths = [chunk.length for chunk in chunks]
        self.width = max(self.lengths)
        #: The row of the step for each token; padding repeats the last row of its chunk.
        self.places = [c.row + min(i, c.length - 1) for c in chunks for i in range(self.width)]
        self.rows = mx.array(self.places, mx.int32).reshape(len(chunks), self.width)
        self.mask: mx.array | None = None
        if min(self.lengths) < self.width:
            self.mask = mx.arange(self.width) < mx.array(self.lengths)[:, None]

    def cut(self, rows: mx.array) -> mx.array:
        """Return the chunks of an array [rows, 1, …] of the whole step."""
        return rows[:, 0][self.rows]

    def view(self, state: RecurrentState) -> ArraysCache:
        """Return the states before the chunks."""
        view = state.chunks_view(self.indices)
        if self.mask is not None:
            view.prepare(lengths=self.lengths)
        return view


# The longest chunks that are padded: the computation of longer ones costs more than a call.
_MOST_PADDED = 64


def _groups(lengths: list[int]) -> list[list[int]]:
    """Return the chunks that run together: short ones of similar and long ones of equal length."""
    short = [index for index, length in enumerate(lengths) if length <= _MOST_PADDED]
    groups = [[short[at] for at in group] for group in length_groups([lengths[i] for i in short])]
    long: dict[int, list[int]] = {}
    for index, length in enumerate(lengths):
        if length > _MOST_PADDED:
            long.setdefault(length, []).append(index)
    return [*groups, *long.values()]


class Prompts:
    """All chunks of a step, in groups that run together."""

    def __init__(self, step: StepInputs) -> None:
        lengths = [chunk.length for chunk in step.chunks]
        self.groups = [Padded(step, indices) for indices in _groups(lengths)]
        order = [index for group in self.groups for index in group.indices]
        #: The place of each chunk in the groups; None if it is the same.
        self.order: mx.array | None = None
        if order != sorted(order):
            self.order = mx.array(sorted(range(len(order)), key=order.__getitem__), mx.int32)
        self.first = step.num_decode
        places = [0] * (step.num_rows - self.first)
        start = 0
        for group in self.groups:
            for index, length in zip(group.indices, group.lengths, strict=True):
                row = step.chunks[index].row - self.first
                places[row : row + length] = range(start, start + length)
                start += group.width
        self.places = mx.array(places, mx.int32)

    def join(self, outputs: list[mx.array]) -> mx.array:
        """Return rows [rows, 1, …] of the groups' outputs, from the first row of a chunk on."""
        flat = [output.reshape(-1, 1, *output.shape[2:]) for output in outputs]
        return (flat[0] if len(flat) == 1 else mx.concatenate(flat))[self.places]

    def states(self, views: list[ArraysCache]) -> list[ArraysCache]:
        """Return the states after the chunks, in the order of the chunks."""
        if self.order is None:
            return views
        joined = ArraysCache(len(views[0].cache))
        for slot in range(len(joined.cache)):
            found = [view[slot] for view in views]
            if all(array is not None for array in found):
                joined[slot] = mx.concatenate(found)[self.order]
        return [joined]


@dataclass(frozen=True, slots=True)
class Piece:
    """Rows [start, stop) of a step that run together: decode rows [n, 1, …] or a chunk [1, n, …].

    `chunk` is the index of the chunk; None for decode rows. A row of a proposal `follows` the piece
    before it: its recurrent state continues from there.
    """

    start: int
    stop: int
    chunk: int | None
    follows: bool = False

    def cut(self, rows: mx.array) -> mx.array:
        """Return the piece's part of an array [rows, 1, …] of the whole step."""
        cut = rows[self.start : self.stop]
        return cut if self.chunk is None else cut.swapaxes(0, 1)

    def uncut(self, array: mx.array) -> mx.array:
        """Return an output of the piece as rows [rows, 1, …]."""
        return array if self.chunk is None else array.swapaxes(0, 1)


def _call(original: Call, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Run `module` piece by piece if it is called with the caches of a step."""
    values = [*args, *kwargs.values()]
    caches = [leaf for value in values for leaf in _leaves(value)]
    if not caches:
        return original(module, *args, **kwargs)
    if caches[0].step.segments is not None:
        return _call_with_segments(original, module, args, kwargs, caches)
    return _Pieces(original, module, args, kwargs, caches).run()


def _call_with_segments(
    original: Call,
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    caches: list[Cache],
) -> Any:
    """Run a recurrent module once, on all rows of the step, as `Recurrence` says."""
    (state,) = caches
    assert isinstance(state, RecurrentState), "modules that attend run in other steps"
    step = state.step
    assert step.segments is not None, "the caller has looked"
    view = state.segments_view(step.segments)
    known = recurrence_of(module)
    turns = known is None or not known.by_rows

    def given(value: Any) -> Any:
        if value is state:
            return view
        if turns and isinstance(value, mx.array) and value.shape[:2] == (step.num_rows, 1):
            return value.swapaxes(0, 1)
        return value

    with fast_recurrence(view):
        made: Any = original(
            module, *map(given, args), **{name: given(value) for name, value in kwargs.items()}
        )
    view.check()
    return made.swapaxes(0, 1) if turns else made


def _leaves(value: Any) -> list[Cache]:
    if isinstance(value, PagedKV | RecurrentState):
        return [value]
    if isinstance(value, CacheList):
        return [leaf for member in value.caches for leaf in _leaves(member)]
    return []


class _Pieces:
    """One call of a module, split into pieces."""

    def __init__(
        self,
        original: Call,
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        caches: list[Cache],
    ) -> None:
        self.call: Callable[..., Any] = lambda *a, **k: original(module, *a, **k)
        self.mask_position = mask_position(module)
        self.args, self.kwargs = args, kwargs
        self.step = caches[0].step
        self.paged = [cache for cache in caches if isinstance(cache, PagedKV)]
        self.states = [cache for cache in caches if isinstance(cache, RecurrentState)]
        one_by_one = bool(self.paged)
        self.pieces = self.step.remember(
            ("pieces", one_by_one), lambda: list_pieces(self.step, one_by_one=one_by_one)
        )
        self.starts = [piece.start for piece in self.pieces]

    def run(self) -> Any:
        if self.mask_position is not None and len(self.step.chunks) > 1 and not self.paged:
            return self._run_together(self.mask_position)
        if self.paged:
            self._write()
        runs = self._run_pieces(self.pieces, attend=True)
        for state in self.states:
            made = [views[id(state)] for _, views in runs]
            first_chunk = len(made) - len(self.step.chunks)
            state.store(made[:first_chunk], made[first_chunk:])
        return self._join([output for output, _ in runs])

    def _run_together(self, mask_position: int) -> mx.array:
        """Run the decode rows in one call, and the chunks in one call for each group of lengths."""
        prompts: Prompts = self.step.remember("prompts", lambda: Prompts(self.step))
        rows = [piece for piece in self.pieces if piece.chunk is None]
        decode = self._run_pieces(rows, attend=True)
        outputs: list[mx.array] = []
        after: list[dict[int, ArraysCache]] = []
        for group in prompts.groups:
            views = {id(state): group.view(state) for state in self.states}
            args, kwargs = list(self._padded(self.args, group, views)), self.kwargs
            kwargs = {name: self._padded(value, group, views) for name, value in kwargs.items()}
            if len(args) > mask_position:
                args[mask_position] = group.mask
            else:
                kwargs["mask"] = group.mask
            with fast_recurrence(), self.step.adapters.only(group.places):
                outputs.append(self.call(*args, **kwargs))
            after.append(views)
        for state in self.states:
            chunks = prompts.states([views[id(state)] for views in after])
            state.store([views[id(state)] for _, views in decode], chunks)
        starts = [*(piece.start for piece in rows), prompts.first]
        return self._fill(starts, [*(output for output, _ in decode), prompts.join(outputs)])

    def _padded(self, value: Any, group: Padded, views: dict[int, ArraysCache]) -> Any:
        """Return the part of an argument that belongs to the chunks of `group`."""
        if isinstance(value, RecurrentState):
            return views[id(value)]
        if isinstance(value, mx.array) and value.shape[:2] == (self.step.num_rows, 1):
            return group.cut(value)
        if isinstance(value, tuple | list):
            return type(value)(self._padded(member, group, views) for member in value)
        return value

    def _write(self) -> None:
        """Run every piece to get its new rows, and write them to the pools."""
        learned = [views for _, views in self._run_pieces(self.pieces, attend=False)]
        for cache in self.paged:
            new = [views[id(cache)].new for views in learned]
            if any(rows is None for rows in new):
                continue  # The module only reads this cache.
            keys, values = (
                self._fill(self.starts, [rows[part].transpose(2, 1, 0, 3) for rows in new])
                for part in (0, 1)
            )
            cache.write(keys, values)

    def _run_pieces(
        self, pieces: Sequence[Piece], *, attend: bool
    ) -> list[tuple[Any, dict[int, Any]]]:
        runs: list[tuple[Any, dict[int, Any]]] = []
        for piece in pieces:
            before = runs[-1][1] if piece.follows else None
            runs.append(self._run_piece(piece, before, attend=attend))
        return runs

    def _run_piece(
        self, piece: Piece, before: dict[int, Any] | None, *, attend: bool
    ) -> tuple[Any, dict[int, Any]]:
        """Return the output of a piece, and its views; `before` are those it continues from."""
        views: dict[int, Any] = {}
        for paged in self.paged:
            views[id(paged)] = KVView(paged, piece.start, piece.chunk, attend=attend)
        for state in self.states:
            if before is not None:
                views[id(state)] = state.next_view(before[id(state)])
                continue
            views[id(state)] = (
                state.decode_view(slice(piece.start, piece.stop))
                if piece.chunk is None
                else state.chunk_view(piece.chunk)
            )
        args = [self._cut(value, piece, views) for value in self.args]
        kwargs = {name: self._cut(value, piece, views) for name, value in self.kwargs.items()}
        with fast_recurrence(), self.step.adapters.only(range(piece.start, piece.stop)):
            return self.call(*args, **kwargs), views

    def _cut(self, value: Any, piece: Piece, views: dict[int, Any]) -> Any:
        """Return the part of an argument that belongs to `piece`."""
        if isinstance(value, PagedKV | RecurrentState):
            return views[id(value)]
        if isinstance(value, CacheList):
            return CacheList(*(self._cut(member, piece, views) for member in value.caches))
        if isinstance(value, RowMask):
            return self._mask(value, piece, views)
        if isinstance(value, mx.array):
            if value is self.step.positions:
                return self._offset(piece)
            if value.ndim >= 2 and value.shape[:2] == (self.step.num_rows, 1):
                return piece.cut(value)
            return value
        if isinstance(value, tuple | list):
            return type(value)(self._cut(member, piece, views) for member in value)
        return value

    def _offset(self, piece: Piece) -> int | mx.array:
        """Return the position of the piece's first token, or the positions of its decode rows."""
        if piece.chunk is not None:
            chunk = self.step.chunks[piece.chunk]
            return chunk.kv_length - chunk.length
        if self.paged:
            return self.step.lengths[piece.start] - 1
        return self.step.positions[piece.start : piece.stop]

    def _mask(self, mask: RowMask, piece: Piece, views: dict[int, Any]) -> Any:
        view = next((v for v in views.values() if isinstance(v, KVView)), None)
        if view is None:
            return None
        return view.mask_for(
            piece.stop - piece.start if piece.chunk is not None else 1,
            cache_window=mask.cache_window,
            window_size=mask.window,
            return_array=mask.as_array,
        )

    def _join(self, outputs: list[Any]) -> Any:
        """Join the outputs of all pieces into the output for all rows."""
        first = outputs[0]
        if isinstance(first, mx.array):
            parts = [p.uncut(o) for p, o in zip(self.pieces, outputs, strict=True)]
            return self._fill(self.starts, parts)
        if isinstance(first, tuple | list):
            return type(first)(
                self._join([output[i] for output in outputs]) for i in range(len(first))
            )
        return first

    def _fill(self, starts: list[int], parts: list[mx.array]) -> mx.array:
        """Concatenate parts that begin at these rows, with zeros for padding rows."""
        filled: list[mx.array] = []
        row = 0
        for start, part in zip(starts, parts, strict=True):
            if start > row:
                filled.append(mx.zeros((start - row, *part.shape[1:]), part.dtype))
            filled.append(part)
            row = start + len(part)
        if row < self.step.num_rows:
            shape = (self.step.num_rows - row, *parts[-1].shape[1:])
            filled.append(mx.zeros(shape, parts[-1].dtype))
        return filled[0] if len(filled) == 1 else mx.concatenate(filled)


def list_pieces(step: StepInputs, *, one_by_one: bool) -> list[Piece]:
    """Return the pieces of a step: decode rows `one_by_one` or together, then each chunk.

    The list has no padding rows, unless decode rows run together. If all rows are padding, it has
    one of them, because the forward pass must return an output. Rows of proposals run one by one.
    """
    pieces = []
    ids = step.decode_seq_ids
    proposing = {*repeated(ids)}
    if one_by_one or proposing:
        together = 0
        if not one_by_one:  # rows of sequences without proposals come first
            together = next(row for row, seq_id in enumerate(ids) if seq_id in proposing)
            pieces += [Piece(0, together, None)] if together else []
        count = len(ids) or min(step.num_decode, 1)
        pieces += [
            Piece(row, row + 1, None, follows=0 < row < len(ids) and ids[row] == ids[row - 1])
            for row in range(together, count)
        ]
    elif step.num_decode:
        pieces.append(Piece(0, step.num_decode, None))
    for index, chunk in enumerate(step.chunks):
        pieces.append(Piece(chunk.row, chunk.row + chunk.length, index))
    return pieces
