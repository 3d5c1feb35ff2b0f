"""The recurrent classes of mlx-lm that compute prompts of several sequences in one call."""

from __future__ import annotations

import inspect
from functools import lru_cache
from typing import Any

import mlx.nn as nn

_CONVOLUTION = ("convolution",)
_DELTA_RULE, _STATE_SPACE = ("convolution", "delta_rule"), ("convolution", "state_space")

#: The modules of `layers` that compute from their states, by the module of mlx-lm that defines a
#: class. The classes use a mask, and the lengths in their cache, for padding after a prompt.
PADDED = {
    ("bailing_moe_v3", "BailingKDA"): _DELTA_RULE,
    ("falcon_h1", "FalconH1Mixer"): _STATE_SPACE,
    ("granitemoehybrid", "GraniteMoeHybridMamba2Mixer"): _STATE_SPACE,
    ("kimi_k3", "KimiK3DeltaAttention"): _DELTA_RULE,
    ("kimi_linear", "KimiDeltaAttention"): _DELTA_RULE,
    ("lfm2", "ShortConv"): _CONVOLUTION,
    ("lfm2_moe", "ShortConv"): _CONVOLUTION,
    ("mamba2", "Mamba2Block"): _STATE_SPACE,
    ("nemotron_h", "NemotronHMamba2Mixer"): _STATE_SPACE,
    ("qwen3_5", "GatedDeltaNet"): _DELTA_RULE,
    ("qwen3_next", "Qwen3NextGatedDeltaNet"): _DELTA_RULE,
}


def mask_position(module: nn.Module) -> int | None:
    """Return the position of the mask among a module's arguments; None for other classes."""
    base = _known(type(module))  # type: ignore[arg-type]  # it has a hash
    if base is None:
        return None
    return list(inspect.signature(base.__call__).parameters).index("mask") - 1  # self


def kernels_of(module: nn.Module) -> tuple[str, ...]:
    """Return the modules of `layers` that compute from the states of a module of these classes."""
    base = _known(type(module))  # type: ignore[arg-type]  # it has a hash
    return () if base is None else PADDED[base.__module__.rpartition(".")[2], base.__qualname__]


def count(model: nn.Module) -> int:
    """Return how many modules of a model are of these classes."""
    return sum(mask_position(module) is not None for module in model.modules())


@lru_cache(maxsize=256)
def _known(kind: type) -> Any:
    for base in kind.__mro__:  # without those of swapped classes
        if (base.__module__.rpartition(".")[2], base.__qualname__) in PADDED:
            return base
    return None
