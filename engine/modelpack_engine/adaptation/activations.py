"""Activations: how much memory the arrays of a step take, beside weights and KV cache."""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear

#: What norms, sums, rotations and activations add to the outputs of the linear layers, as a factor,
#: less what the GPU is done with before two steps are handed over. Measured: 1.55 for
#: Llama-3.2-1B's shape (benchmarks/results/engine-h200.md).
_BESIDE = 1.6
#: Experts that a token goes to, at most: what a layer is made of does not tell.
_MOST_EXPERTS = 8


@dataclass(frozen=True, slots=True)
class StepMemory:
    """Bytes that a step's arrays take: for each row, and however many there are."""

    per_row: int = 0
    per_step: int = 0


def step_memory(model: nn.Module, vocab_size: int) -> StepMemory:
    """Return about how much memory steps of `model` take; the head runs on few rows.

    MLX gives memory back when the GPU has done what it was handed, and by then the host has handed
    it most of a step: so all layers count. Quantised weights are written out for many rows.
    """
    outputs = written_out = 0
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.QuantizedLinear):
            size = module["weight"].shape[0]
            if size == vocab_size and "layers" not in name:
                continue
            outputs += size
            if isinstance(module, nn.QuantizedLinear):
                written_out += size * module["scales"].shape[1] * module.group_size
        elif isinstance(module, SwitchLinear | QuantizedSwitchLinear):
            experts, size = module["weight"].shape[:2]
            outputs += size * min(experts, _MOST_EXPERTS)
    itemsize = _itemsize(model)
    return StepMemory(int(outputs * _BESIDE) * itemsize, written_out * itemsize)


def _itemsize(model: nn.Module) -> int:
    """Return the bytes of an element of what layers put out: as many as the norms' weights have."""
    sizes = [
        module["weight"].dtype.size
        for _, module in model.named_modules()
        if isinstance(module, nn.RMSNorm | nn.LayerNorm) and "weight" in module
    ]
    return max(sizes, default=mx.bfloat16.size)
