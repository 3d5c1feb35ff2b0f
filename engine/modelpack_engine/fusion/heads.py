"""Products by heads: latent attention's, for all rows of a step at once.

mlx-lm multiplies [rows, heads, 1, in] with [heads, in, out]. On CUDA that is rows times heads
products of one row, each of which reads the weights again: 0.12 ms of 64 rows of DeepSeek's shape.
With heads first, it is as many products as there are heads.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.mla import MultiLinear, QuantizedMultiLinear

from modelpack_engine.adaptation.swaps import Call, ClassSwaps
from modelpack_engine.attention.step import StepInputs


def fuse_heads(module: nn.Module, step: StepInputs, swaps: ClassSwaps) -> bool:
    """Let a product by heads take all rows of a step together; return whether `module` is one."""
    if not isinstance(module, MultiLinear | QuantizedMultiLinear):
        return False

    def call(original: Call, heads: Any, x: mx.array, transpose: bool = True) -> Any:
        if not step.active or x.ndim != 4 or x.shape[2] != 1 or x.shape[0] == 1:
            return original(heads, x, transpose)
        by_heads = mx.contiguous(x[:, :, 0].swapaxes(0, 1))
        return original(heads, by_heads, transpose).swapaxes(0, 1)[:, :, None]

    swaps.override(module, call)
    return True
