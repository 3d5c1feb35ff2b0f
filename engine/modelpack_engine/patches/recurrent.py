"""The recurrent classes of mlx-lm that compute prompts of several sequences in one call."""

from __future__ import annotations

import inspect
from functools import lru_cache

import mlx.nn as nn

#: By the module that defines them. They use a mask, and the lengths in their cache, for padding
#: after a prompt; and they compute from their states by functions that the engine replaces.
PADDED = frozenset(
    {
        ("bailing_moe_v3", "BailingKDA"),
        ("falcon_h1", "FalconH1Mixer"),
        ("granitemoehybrid", "GraniteMoeHybridMamba2Mixer"),
        ("kimi_k3", "KimiK3DeltaAttention"),
        ("kimi_linear", "KimiDeltaAttention"),
        ("lfm2", "ShortConv"),
        ("lfm2_moe", "ShortConv"),
        ("mamba2", "Mamba2Block"),
        ("nemotron_h", "NemotronHMamba2Mixer"),
        ("qwen3_5", "GatedDeltaNet"),
        ("qwen3_next", "Qwen3NextGatedDeltaNet"),
    }
)


def mask_position(module: nn.Module) -> int | None:
    """Return the position of the mask among a module's arguments; None for other classes."""
    kind: type = type(module)
    return _mask_position(kind)


def count(model: nn.Module) -> int:
    """Return how many modules of a model are of these classes."""
    return sum(mask_position(module) is not None for module in model.modules())


@lru_cache(maxsize=256)
def _mask_position(kind: type) -> int | None:
    for base in kind.__mro__:  # without those of swapped classes
        if (base.__module__.rpartition(".")[2], base.__qualname__) in PADDED:
            return list(inspect.signature(base.__call__).parameters).index("mask") - 1  # self
    return None
