"""PagedRunner: a model whose attention reads and writes pages of one pool, in one of the tiers."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property
from typing import TYPE_CHECKING

import mlx.core as mx
import mlx.nn as nn

from modelpack_engine.adaptation.adapted import Adapted
from modelpack_engine.adaptation.compiled import CompiledSteps
from modelpack_engine.adaptation.layout import ModelLayout
from modelpack_engine.attention.step import StepInputs
from modelpack_engine.buckets import Buckets
from modelpack_engine.errors import EngineError, OutOfMemoryError
from modelpack_engine.managed_memory import Staging

if TYPE_CHECKING:
    from modelpack_engine.batch import StepBatch


class PagedRunner:
    """Runs a model on pages until `undo`, its steps compiled by MLX if that is wanted and possible.

    `in_pieces` are classes of attention modules that run sequence by sequence; `fold` and `fused`
    are as for `Adapted`. Raises `OutOfMemoryError` if the pools do not fit.
    """

    def __init__(
        self,
        model: nn.Module,
        layout: ModelLayout,
        step: StepInputs,
        *,
        staging: Staging,
        num_blocks: int,
        buckets: Buckets,
        in_pieces: frozenset[str],
        fold: bool,
        fused: bool,
        compiled: bool,
    ) -> None:
        self._model, self._step, self._buckets = model, step, buckets
        self.adapted = Adapted(
            model,
            layout,
            step,
            num_blocks=num_blocks,
            buckets=buckets,
            in_pieces=in_pieces,
            fold=fold,
            fused=fused,
        )
        self._allocate(num_blocks)
        self.compiled: CompiledSteps | None = None
        if compiled and CompiledSteps.can_run(self.adapted):
            self.compiled = CompiledSteps(model, self.adapted, step, buckets, staging)

    def replace_pools(self, layout: ModelLayout, num_blocks: int) -> None:
        """Take pools as `layout` has them instead, of unknown content."""
        self.adapted.replace_pools(layout, num_blocks)
        self._allocate(num_blocks)

    def _allocate(self, num_blocks: int) -> None:
        pools = self.adapted.pools()
        try:
            mx.eval(pools)
        except RuntimeError as error:
            size = sum(pool.nbytes for pool in pools)
            raise OutOfMemoryError(
                f"{num_blocks} blocks of the KV cache take {size} bytes: {error}",
                hint="give the KV cache less memory",
            ) from error

    @property
    def tier(self) -> str:
        """Return "handles", "patched" or "pieces"; see `adaptation.tiers`."""
        if self.adapted.in_pieces:
            return "pieces"
        return "patched" if self.adapted.patched else "handles"

    @cached_property
    def writes_in_place(self) -> bool:
        """Whether a kernel writes the pools, so that no step copies them."""
        return self.adapted.writes_in_place

    def forward(self, batch: StepBatch, token_ids: mx.array) -> mx.array:
        """Build a step: return logits [rows, vocabulary] of its sampled rows, not yet computed."""
        self.release(batch.released)
        adapted, rows = self.adapted, list(batch.sample_rows)
        if self.compiled is not None:
            if self.compiled.takes(batch):
                adapted.begin(batch)
                found = self.compiled.forward(batch, token_ids, rows)
                adapted.finish(batch)
                return found
            self.compiled.forget()
        count = len(rows)
        padded = self._buckets.pad_rows(count) or 1
        self._step.begin(batch, rows + [0] * (padded - count))
        adapted.begin(batch)
        logits: mx.array
        try:
            logits = self._model(token_ids[:, None], cache=adapted.caches)
            adapted.close()
        except BaseException:
            adapted.abandon()
            raise
        finally:
            self._step.end()
        adapted.finish(batch)
        if not self._step.rows_taken:
            logits = logits[self._step.sample_rows]
        if logits.shape[0] != padded:
            raise EngineError(f"the model made logits of {logits.shape[0]} rows, expected {padded}")
        return logits[:count, -1]

    def is_compiled(self, batch: StepBatch) -> bool:
        """Return whether a step's forward pass is one that MLX has compiled."""
        return self.compiled is not None and self.compiled.takes(batch)

    def pools(self) -> list[mx.array]:
        """Return what the last step writes."""
        return self.adapted.pools()

    def release(self, seq_ids: Iterable[int]) -> None:
        """Drop what is kept for sequences beside their blocks."""
        self.adapted.rows.release(seq_ids)

    def undo(self) -> None:
        """Give the model back as it was."""
        self.adapted.undo()
