"""Logit rows: the head runs on the rows that are sampled, not on all rows of a prefill."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn

from modelpack_engine.adaptation.swaps import Call, ClassSwaps
from modelpack_engine.attention.step import StepInputs


def take_logit_rows(inner: nn.Module, step: StepInputs, swaps: ClassSwaps) -> None:
    """Let `inner`, the model without its head, return the step's sampled rows only.

    Whatever the outer model applies (head, scaling, softcap) then sees those rows. Calls that are
    not part of a step (a cache of mlx-lm's own) are left alone: `step.active` tells.
    """

    def call(original: Call, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        hidden = original(module, *args, **kwargs)
        if not step.active or not isinstance(hidden, mx.array):
            return hidden
        if hidden.shape[0] != step.num_rows:
            return hidden
        step.rows_taken = True
        if step.all_rows_sampled:
            return hidden
        return hidden[step.sample_rows]

    swaps.override(inner, call)
