"""Adapted: a model with patched modules and paged caches, which runs on a flattened batch."""

from __future__ import annotations

from collections import Counter
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import CacheList

from modelpack_engine import kernels
from modelpack_engine.attention.cache_handle import LostHandleError
from modelpack_engine.attention.kv_pools import KVLayout
from modelpack_engine.attention.metadata import StepInputs
from modelpack_engine.attention.paged import PagedKV
from modelpack_engine.core.batch import StepBatch
from modelpack_engine.core.block_manager import PrefixSnapshots
from modelpack_engine.core.buckets import EXACT, Buckets
from modelpack_engine.layers.add_norm import Sums
from modelpack_engine.patches.fused_layers import fuse
from modelpack_engine.patches.modules import (
    ClassSwaps,
    fold_quantised,
    halve_linears,
    patch_modules,
    take_logit_rows,
)
from modelpack_engine.runner.model_layout import Leaf, ModelLayout, StateLayout
from modelpack_engine.runner.per_sequence import run_per_sequence
from modelpack_engine.runner.recurrent import RecurrentState, Snapshot, StateRows


class Adapted:
    """A model with the classes of some modules swapped, and the caches to call it with.

    Attention modules of the classes in `per_sequence` run sequence by sequence, the others on rows;
    recurrent modules always run in pieces. `notes` says in words what was done.
    """

    def __init__(
        self,
        model: nn.Module,
        layout: ModelLayout,
        step: StepInputs,
        *,
        num_blocks: int,
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
        self.taken: list[Snapshot] = []  # by the step that was built last
        self._owners: dict[int, nn.Module] = {}
        self._step, self._num_blocks = step, num_blocks
        self.caches = [self._cache(entry) for entry in layout.tree]
        self.snapshots = PrefixSnapshots(layout.num_snapshots) if self.states else None
        self.patched = patch_modules(model, self.swaps)
        self.per_sequence: Counter[str] = Counter()
        self.recurrent: Counter[str] = Counter()
        #: Whether attention runs in pieces anywhere: a decode row each.
        self.row_by_row = self._split(per_sequence)
        if layout.inner is not None:
            take_logit_rows(layout.inner, step, self.swaps)
        self.sums = Sums()
        self.fused: dict[str, int] = {}
        if fused:
            owners = {id(self._owners[id(kv)]): kv for kv in self.paged if id(kv) in self._owners}
            self.fused = fuse(model, owners, self.sums, step, self.swaps, layout.inner)
        self.folded = fold_quantised(model, self.swaps, dequantise=fused) if fold else 0
        if step.second_stream is not None:
            halve_linears(model, self.swaps, step.second_stream)

    def _cache(self, entry: Leaf | tuple[Leaf, ...]) -> Any:
        if isinstance(entry, tuple):
            return CacheList(*(self._cache(leaf) for leaf in entry))
        if isinstance(entry.content, StateLayout):
            size = len(entry.content.shapes)
            state = RecurrentState(size, self._step, self.rows, name=entry.name)
            self.states.append(state)
            return state
        if entry.content is None:
            return None
        paged = PagedKV(
            entry.content,
            self._step,
            num_blocks=self._num_blocks,
            name=entry.name,
            gives_up=self.layout.window is not None,
        )
        self.paged.append(paged)
        if entry.owner is not None:
            self._owners[id(paged)] = entry.owner
        return paged

    def _split(self, per_sequence: frozenset[str]) -> bool:
        """Have modules run in pieces; return whether that includes any attention."""
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
            run_per_sequence(owner, self.swaps)
        attention = any(id(self._owners.get(id(kv))) in done for kv in self.paged)
        if self.per_sequence or attention:
            for paged in self.paged:
                paged.row_masks = True
        return bool(self.per_sequence) or attention

    def owner_class(self, error: LostHandleError) -> str | None:
        """Return the class of the module that lost a handle, if it is known."""
        owner = self._owners.get(id(error.cache))
        return None if owner is None else type(owner).__name__

    def attention_classes(self) -> frozenset[str]:
        """Return the classes of all modules that use a paged cache."""
        return frozenset(type(owner).__name__ for owner in self._owners.values())

    def pools(self) -> list[mx.array]:
        """Return what a step writes: to be evaluated with its tokens, and not to be kept."""
        arrays = [pool for kv in self.paged for pool in (kv.pools.keys, kv.pools.values)]
        arrays += [a for state in self.states for a in state.arrays if a is not None]
        return arrays + [array for snapshot in self.taken for array in snapshot.arrays]

    def begin(self, batch: StepBatch) -> None:
        """Find the states that a step starts from."""
        if self.states:
            self.rows.begin(batch)

    def finish(self, batch: StepBatch) -> None:
        """Adopt a step's states, once its graph is built, and keep snapshots of some.

        One is of the state after a chunk that ends with a block, and goes by the block's hash.
        """
        if not self.states:
            return
        self.rows.finish()
        self.taken = []
        snapshots = self.snapshots
        for chunk in batch.chunks:
            hash_ = chunk.block_hash
            if snapshots is not None and hash_ is not None and hash_ not in snapshots:
                snapshot = Snapshot(self.states, self.rows.rows[chunk.seq_id])
                snapshots.put(hash_, snapshot)
                self.taken.append(snapshot)

    def close(self) -> None:
        """End a step; raise `LostHandleError` if a layer did not attend to its paged cache."""
        self.sums.clear()
        for paged in self.paged:
            paged.close()

    def abandon(self) -> None:
        """End a step that failed while it was built."""
        self.sums.clear()
        for paged in self.paged:
            paged.abandon()

    @property
    def writes_in_place(self) -> bool:
        """Whether kernels write all keys and values, into the memory of the pools."""
        return not self._step.exact and all(
            kernels.may_write(kv.layout.dtype, kv.layout.pool_dtype, kv.layout.quantised)
            for kv in self.paged
        )

    def replace_pools(self, layout: ModelLayout, num_blocks: int) -> None:
        """Lay out the same caches as `layout` says, with `num_blocks` blocks of zeros."""
        self.layout = layout
        contents = [leaf.content for leaf in layout.leaves()]
        found = [content for content in contents if isinstance(content, KVLayout)]
        for kv, content in zip(self.paged, found, strict=True):
            kv.replace_pools(content, num_blocks)

    def reset(self) -> None:
        """Forget all sequences."""
        self.rows.clear()
        for state in self.states:
            state.arrays = [None] * len(state.arrays)

    def notes(self) -> tuple[str, ...]:
        """Say in words what was done to run the model."""
        notes = [f"{name}: {reason}" for name, reason in self.patched.items()]
        notes += [f"{name} x{n} sequence by sequence" for name, n in self.per_sequence.items()]
        notes += [f"{name} x{n} recurrent" for name, n in self.recurrent.items()]
        return tuple(notes)

    def undo(self) -> None:
        """Give the model back as it was, and drop the pools."""
        self.swaps.undo()
        self.paged, self.states, self.caches = [], [], []
