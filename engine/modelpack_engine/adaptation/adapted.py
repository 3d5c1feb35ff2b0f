"""Adapted: a model made to run on rows, in one of the ways that there are."""

from __future__ import annotations

from collections import Counter
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import CacheList

from modelpack_engine.adaptation.folded import fold_quantised
from modelpack_engine.adaptation.halves import halve_linears
from modelpack_engine.adaptation.layout import Leaf, ModelLayout, StateLayout
from modelpack_engine.adaptation.logit_rows import take_logit_rows
from modelpack_engine.adaptation.patches import patch_modules
from modelpack_engine.adaptation.pieces import run_in_pieces
from modelpack_engine.adaptation.recurrent import RecurrentState, StateRows
from modelpack_engine.adaptation.swaps import ClassSwaps
from modelpack_engine.attention.handles import LostHandleError
from modelpack_engine.attention.paged import PagedKV
from modelpack_engine.attention.step import StepInputs


class Adapted:
    """A model with the classes of some modules swapped, and the caches to call it with.

    Attention modules of the classes in `in_pieces` run sequence by sequence, the others on rows;
    recurrent modules always run in pieces. `notes` says in words what was done.
    """

    def __init__(
        self,
        model: nn.Module,
        layout: ModelLayout,
        step: StepInputs,
        *,
        num_blocks: int,
        in_pieces: frozenset[str] = frozenset(),
        fold: bool = False,
    ) -> None:
        self.model = model
        self.layout = layout
        self.swaps = ClassSwaps()
        self.rows = StateRows()
        self.paged: list[PagedKV] = []
        self.states: list[RecurrentState] = []
        self._owners: dict[int, nn.Module] = {}
        self._step, self._num_blocks = step, num_blocks
        self.caches = [self._cache(entry) for entry in layout.tree]
        self.patched = patch_modules(model, self.swaps)
        self.in_pieces: Counter[str] = Counter()
        self.recurrent: Counter[str] = Counter()
        self._split(in_pieces)
        if layout.inner is not None:
            take_logit_rows(layout.inner, step, self.swaps)
        self.folded = fold_quantised(model, self.swaps) if fold else 0
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
        paged = PagedKV(entry.content, self._step, num_blocks=self._num_blocks, name=entry.name)
        self.paged.append(paged)
        if entry.owner is not None:
            self._owners[id(paged)] = entry.owner
        return paged

    def _split(self, in_pieces: frozenset[str]) -> None:
        done: set[int] = set()
        for leaf in self.layout.leaves():
            owner = leaf.owner
            if owner is None or id(owner) in done:
                continue
            name = type(owner).__name__
            if isinstance(leaf.content, StateLayout):
                self.recurrent[name] += 1
            elif name in in_pieces:
                self.in_pieces[name] += 1
            else:
                continue
            done.add(id(owner))
            run_in_pieces(owner, self.swaps)
        if self.in_pieces or any(id(self._owners.get(id(kv))) in done for kv in self.paged):
            for paged in self.paged:
                paged.row_masks = True

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
        return arrays

    def close(self) -> None:
        """End a step; raise `LostHandleError` if a layer did not attend to its paged cache."""
        for paged in self.paged:
            paged.close()

    def abandon(self) -> None:
        """End a step that failed while it was built."""
        for paged in self.paged:
            paged.abandon()

    def reset(self) -> None:
        """Forget all sequences."""
        self.rows.clear()
        for state in self.states:
            state.arrays = [None] * len(state.arrays)

    def scrub(self, blocks: list[int], block_size: int) -> None:
        """Zero the keys and values of `blocks`."""
        slots = mx.array([b * block_size + i for b in blocks for i in range(block_size)], mx.int32)
        for kv in self.paged:
            kv.pools.zero(slots)

    def notes(self) -> tuple[str, ...]:
        """Say in words what was done to run the model."""
        notes = [f"{name}: {reason}" for name, reason in self.patched.items()]
        notes += [f"{name} x{n} sequence by sequence" for name, n in self.in_pieces.items()]
        notes += [f"{name} x{n} recurrent" for name, n in self.recurrent.items()]
        return tuple(notes)

    def undo(self) -> None:
        """Give the model back as it was, and drop the pools."""
        self.swaps.undo()
        self.paged, self.states, self.caches = [], [], []
