"""ContiguousRunner: one forward per request, on mlx-lm's own caches. The last resort.

For models that no other tier runs correctly. Slow, since the weights are read once per request, and
without a prefix cache; but every answer is the one that mlx-lm gives.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.models.cache import make_prompt_cache

from modelpack_engine.errors import EngineError

if TYPE_CHECKING:
    from modelpack_engine.core.batch import StepBatch


class ContiguousRunner:
    """Runs the pieces of a batch one after the other."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._caches: dict[int, list[Any]] = {}
        self._touched: list[list[Any]] = []

    def forward(self, batch: StepBatch, token_ids: mx.array, rows: list[int]) -> mx.array:
        """Return the logits of `rows`, [rows, vocabulary]."""
        self._touched = []
        found: dict[int, mx.array] = {}
        for row, seq_id in enumerate(batch.decode_seq_ids):
            if seq_id not in self._caches:
                raise EngineError(f"sequence {seq_id} goes on, but its cache is not there")
            found[row] = self._run(seq_id, token_ids[row : row + 1])[0]
        for chunk in batch.chunks:
            if chunk.kv_length == chunk.length:
                self._caches[chunk.seq_id] = make_prompt_cache(self.model)
            logits = self._run(chunk.seq_id, token_ids[chunk.row : chunk.row + chunk.length])
            found.update((chunk.row + index, logits[index]) for index in range(chunk.length))
        if not rows:
            return mx.stack(list(found.values()))[:0]
        return mx.stack([found[row] for row in rows])

    def _run(self, seq_id: int, ids: mx.array) -> mx.array:
        cache = self._caches[seq_id]
        self._touched.append(cache)
        logits: mx.array = self.model(ids[None], cache=cache)
        return logits[0]

    def pools(self) -> list[mx.array]:
        """Return what the last step wrote."""
        states = [entry.state for cache in self._touched for entry in cache]
        found: Any = tree_flatten(states)
        return [value for _, value in found if isinstance(value, mx.array)]

    def release(self, seq_ids: Iterable[int]) -> None:
        """Drop the caches of sequences."""
        for seq_id in seq_ids:
            self._caches.pop(seq_id, None)
