"""The recurrent classes of mlx-lm that compute the rows of several sequences in one call."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import mlx.nn as nn


@dataclass(frozen=True, slots=True)
class Recurrence:
    """How a class computes from its states.

    `kernels` are the modules of `layers` that it needs. A `padded` class uses a mask, and the
    lengths in its cache, for padding after a prompt. Classes `by_rows` take the rows of a step as
    [rows, 1, …], others as [1, rows, …].
    """

    kernels: tuple[str, ...]
    padded: bool = True
    by_rows: bool = False


_CONVOLUTION = Recurrence(("convolution",))
_DELTA_RULE = Recurrence(("convolution", "delta_rule"))
_STATE_SPACE = Recurrence(("convolution", "state_space"))
_LINEAR = Recurrence(("linear_attention",), padded=False, by_rows=True)
_SHIFTED = Recurrence(("convolution", "linear_attention"), padded=False, by_rows=True)

#: By the module of mlx-lm that defines a class, and its name.
KNOWN = {
    ("bailing_hybrid", "LinearAttention"): _LINEAR,
    ("bailing_moe_linear", "LinearAttention"): _LINEAR,
    ("bailing_moe_v3", "BailingKDA"): _DELTA_RULE,
    ("falcon_h1", "FalconH1Mixer"): _STATE_SPACE,
    ("granitemoehybrid", "GraniteMoeHybridMamba2Mixer"): _STATE_SPACE,
    ("kimi_k3", "KimiK3DeltaAttention"): _DELTA_RULE,
    ("kimi_linear", "KimiDeltaAttention"): _DELTA_RULE,
    ("lfm2", "ShortConv"): _CONVOLUTION,
    ("lfm2_moe", "ShortConv"): _CONVOLUTION,
    ("mamba2", "Mamba2Block"): _STATE_SPACE,
    ("nemotron_h", "NemotronHMamba2Mixer"): _STATE_SPACE,
    ("olmo_hybrid", "GatedDeltaNet"): Recurrence(_DELTA_RULE.kernels, padded=False),
    ("plamo2", "Mamba"): Recurrence(_STATE_SPACE.kernels, padded=False),
    ("qwen3_5", "GatedDeltaNet"): _DELTA_RULE,
    ("qwen3_next", "Qwen3NextGatedDeltaNet"): _DELTA_RULE,
    ("rwkv7", "Rwkv7Layer"): _SHIFTED,
}


def recurrence_of(module: nn.Module) -> Recurrence | None:
    """Return how a module computes from its states, if it is of these classes."""
    base = _known(type(module))  # type: ignore[arg-type]  # it has a hash
    return None if base is None else KNOWN[base.__module__.rpartition(".")[2], base.__qualname__]


def mask_position(module: nn.Module) -> int | None:
    """Return the position of the mask among a module's arguments; None for other classes."""
    known = recurrence_of(module)
    if known is None or not known.padded:
        return None
    base = _known(type(module))  # type: ignore[arg-type]  # it has a hash
    return list(inspect.signature(base.__call__).parameters).index("mask") - 1  # self


def count(model: nn.Module) -> int:
    """Return how many modules of a model are of these classes."""
    return sum(recurrence_of(module) is not None for module in model.modules())


@lru_cache(maxsize=256)
def _known(kind: type) -> Any:
    for base in kind.__mro__:  # without those of swapped classes
        if (base.__module__.rpartition(".")[2], base.__qualname__) in KNOWN:
            return base
    return None
