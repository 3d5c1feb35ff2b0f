"""FallbackRunner: run one forward pass per request, on mlx-lm's own caches.

The last resort, for models that no paged tier runs correctly. It is slow, since each request reads
the weights again, and it has no prefix cache; but it always returns mlx-lm's logits.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.models.cache import make_prompt_cache

from modelpack_engine.attention.metadata import AdapterRows
from modelpack_engine.errors import EngineError

if TYPE_CHECKING:
    from modelpack_engine.core.batch import StepBatch, StepShape
    from modelpack_engine.core.buckets import Buckets
    from modelpack_engine.platform.device import Staging
    from modelpack_engine.runner.model_layout import ModelLayout


class FallbackRunner:
    """A `ModelRunner` that runs the decode rows and chunks of a batch one after the other."""

    tier = "fallback"
    fused: Mapping[str, int] = {}
    supports_prefix_cache = can_go_back = writes_in_place = False
    snapshots = None
    computes_at_once = False

    def __init__(
        self,
        model: nn.Module,
        layout: ModelLayout | None,
        buckets: Buckets,
        staging: Staging,
        notes: tuple[str, ...],
    ) -> None:
        self.model, self.layout, self.notes = model, layout, notes
        self.buckets, self.staging = buckets, staging
        self.adapter_rows: AdapterRows | None = AdapterRows()
        self._caches: dict[int, list[Any]] = {}
        self._last_caches: list[list[Any]] = []  # those that the last step wrote

    def forward(
        self, batch: StepBatch, token_ids: mx.array, input_embeddings: mx.array | None = None
    ) -> mx.array:
        self.release(batch.released)
        self._last_caches = []
        found: dict[int, mx.array] = {}
        for row, seq_id in enumerate(batch.decode_seq_ids):
            if seq_id not in self._caches:
                raise EngineError(f"sequence {seq_id} has no cache to continue from")
            with self._adapters(batch, row):
                found[row] = self._run(seq_id, token_ids[row : row + 1])[0]
        for chunk in batch.chunks:
            if chunk.kv_length == chunk.length:
                self._caches[chunk.seq_id] = make_prompt_cache(self.model)
            with self._adapters(batch, chunk.row, chunk.length):
                rows = slice(chunk.row, chunk.row + chunk.length)
                embeddings = None if input_embeddings is None else input_embeddings[rows]
                logits = self._run(chunk.seq_id, token_ids[rows], embeddings)
            found.update((chunk.row + index, logits[index]) for index in range(chunk.length))
        if not batch.sample_rows:
            return mx.stack(list(found.values()))[:0]
        return mx.stack([found[row] for row in batch.sample_rows])

    @contextmanager
    def _adapters(self, batch: StepBatch, row: int, count: int = 1) -> Iterator[None]:
        assert self.adapter_rows is not None
        self.adapter_rows.begin(batch.adapter_slots[row : row + count])
        try:
            yield
        finally:
            self.adapter_rows.begin([])

    def _run(self, seq_id: int, ids: mx.array, embeddings: mx.array | None = None) -> mx.array:
        cache = self._caches[seq_id]
        self._last_caches.append(cache)
        extra = {} if embeddings is None else {"input_embeddings": embeddings[None]}
        logits: mx.array = self.model(ids[None], cache=cache, **extra)
        return logits[0]

    def pools(self) -> list[mx.array]:
        states = [entry.state for cache in self._last_caches for entry in cache]
        found: Any = tree_flatten(states)
        return [value for _, value in found if isinstance(value, mx.array)]

    def release(self, seq_ids: Iterable[int]) -> None:
        for seq_id in seq_ids:
            self._caches.pop(seq_id, None)

    def verified(self, seq_id: int, num_tokens: int) -> None:
        """Do nothing: there is no recurrent state to keep."""

    def scrub(self, blocks: Iterable[int], group: int = 0) -> None:
        """Do nothing: no two sequences share memory."""

    def scrub_slots(self, slots: list[int], group: int = 0) -> None:
        """Do nothing: no two sequences share memory."""

    def block_contents(self) -> tuple[()]:
        """Return nothing: there are no blocks."""
        return ()

    def state_contents(self) -> None:
        """Return None: there are no snapshots."""

    def warm_up(self, shapes: Iterable[StepShape]) -> None:
        """Do nothing: shapes are not padded, so every length is a shape of its own."""

    def undo(self) -> None:
        """Do nothing: the model's classes are unchanged."""
