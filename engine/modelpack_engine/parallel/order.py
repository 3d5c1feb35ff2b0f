"""Collectives in one order on all ranks: that in which the model's code calls for them.

MLX computes what does not depend on each other in any order, and a graph that differs a little
(rank 0 samples, the others do not) may be walked in another one. In most models every sum needs the
one before it. But where sequences are computed one by one, their sums are independent of each
other: two ranks that come by them in a different order add up parts of different sequences, and
nothing says so. Hence each collective is made to depend on the one before it in its step.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx

from modelpack_engine.adaptation.paged import PagedRunner
from modelpack_engine.batch import StepBatch
from modelpack_engine.model_runner import ModelRunner

_COLLECTIVES = ("all_sum", "all_gather")
#: What the last collective of the step returned.
_last: mx.array | None = None
_installed: set[str] = set()


def install() -> None:
    """Order the collectives of this process, which is a rank: of its threads one computes."""
    for name in _COLLECTIVES:
        if name not in _installed:
            setattr(mx.distributed, name, _ordered(getattr(mx.distributed, name)))
            _installed.add(name)


def begin() -> None:
    """Begin a step: steps are ordered by being launched one after the other."""
    global _last
    _last = None


def _ordered(collective: Callable[..., mx.array]) -> Callable[..., mx.array]:
    def call(x: mx.array, **arguments: Any) -> mx.array:
        global _last
        if _last is not None:
            x = mx.depends([x], [_last])[0]
        _last = collective(x, **arguments)
        return _last

    return call


class _OrderedPages(PagedRunner):
    """Runs it on pages; the self-test goes through here, too."""

    def forward(self, batch: StepBatch, token_ids: mx.array) -> mx.array:
        begin()
        logits = super().forward(batch, token_ids)
        if self.is_compiled(batch):
            begin()  # what a trace leaves is no array; all that it makes hangs together anyway
        return logits


class OrderedRunner(ModelRunner):
    """Runs a rank's part of a model, whose collectives are in order."""

    pages = _OrderedPages

    def forward(self, batch: StepBatch, token_ids: mx.array) -> mx.array:
        begin()  # for the contiguous tier
        return super().forward(batch, token_ids)
