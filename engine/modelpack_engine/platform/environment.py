"""Limits that MLX reads from the environment: work per command buffer, graphs and plans kept.

MLX commits a command buffer when its arrays add up to a limit, and counts a whole KV pool for every
kernel that reads part of it: with gigabytes of KV cache, after every layer. The limit on operations
is enough.

On CUDA it keeps graphs, and plans of convolutions and attention, for the shapes that it has seen.
Once it has seen twice as many as it keeps, it raises an error instead of computing: a server sees
any number of shapes.

On CUDA again, a command buffer becomes a graph, and one that is not similar to an earlier one takes
0.2 ms per operation. Small ones are similar more often (see `cuda_graphs`).

Source: mlx/backend/cuda/device.cpp and lru_cache.h, mlx/backend/metal/device.cpp.
"""

from __future__ import annotations

import os
import sys

from modelpack_engine.errors import EngineError

_SETTINGS = {
    "MLX_MAX_MB_PER_BUFFER": "100000000",  # more than any pool has
    "MLX_ENABLE_CACHE_THRASHING_CHECK": "0",
    "MLX_CUDA_GRAPH_CACHE_SIZE": "2000",  # the shapes of a model's steps take hundreds
}
_OPERATIONS = "MLX_MAX_OPS_PER_BUFFER", "30"


def set_limits() -> None:
    """Set what suits a server, as far as the user's environment says nothing else."""
    for name, value in _SETTINGS.items():
        os.environ.setdefault(name, value)
    if sys.platform != "darwin":  # measured on CUDA
        os.environ.setdefault(*_OPERATIONS)


MEMORY_FRACTION = "VLLM_METAL_MEMORY_FRACTION"
USE_PAGED_ATTENTION = "VLLM_METAL_USE_PAGED_ATTENTION"

_YES = frozenset({"1", "true", "yes", "on"})
_NO = frozenset({"0", "false", "no", "off"})


def memory_fraction() -> float | None:
    """Return the share of the GPU's memory that is asked for, above 0 and up to 1.

    None for "auto", and where nothing is set.
    """
    text = os.environ.get(MEMORY_FRACTION, "").strip()
    if text.lower() in ("", "auto"):
        return None
    try:
        share = float(text)
    except ValueError:
        share = float("nan")
    if not 0 < share <= 1:
        raise EngineError(
            f"{MEMORY_FRACTION} is {text[:100]!r}, expected 'auto' or a number above 0, up to 1",
            hint="unset it, or give a share such as 0.8",
        )
    return share


def uses_paged_attention() -> bool:
    """Return whether keys and values are paged: unless it is switched off."""
    text = os.environ.get(USE_PAGED_ATTENTION, "").strip()
    if text.lower() in _NO:
        return False
    if text and text.lower() not in _YES:
        raise EngineError(
            f"{USE_PAGED_ATTENTION} is {text[:100]!r}, expected 1 or 0",
            hint="unset it, or give 0 to run without paged attention",
        )
    return True
