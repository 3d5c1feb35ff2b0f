"""Environment variables: the limits that MLX reads, and vllm-metal's settings of the engine.

MLX commits a command buffer when the size of its arrays reaches a limit, and counts a whole KV pool
for every kernel that reads part of it: with gigabytes of KV cache, it would commit after every
layer. The limit on operations is enough.

On CUDA, MLX caches graphs, and plans of convolutions and attention, for the shapes that it has
seen. After twice as many shapes as the cache holds, it raises an error instead of computing. A
server sees any number of shapes.

On CUDA, a command buffer becomes a graph. A graph that is not similar to an earlier one takes
0.2 ms for each operation; small graphs are similar more often (see `cuda_graphs`).

Source: mlx/backend/cuda/device.cpp and lru_cache.h, mlx/backend/metal/device.cpp.
"""

from __future__ import annotations

import os
import sys

from modelpack_engine.errors import EngineError

_SETTINGS = {
    "MLX_MAX_MB_PER_BUFFER": "100000000",  # more than any pool
    "MLX_ENABLE_CACHE_THRASHING_CHECK": "0",
    "MLX_CUDA_GRAPH_CACHE_SIZE": "2000",  # a model's steps have hundreds of shapes
}
_OPERATIONS = "MLX_MAX_OPS_PER_BUFFER", "30"


def set_limits() -> None:
    """Set MLX's limits for a server, unless the user's environment sets them."""
    for name, value in _SETTINGS.items():
        os.environ.setdefault(name, value)
    if sys.platform != "darwin":  # measured on CUDA
        os.environ.setdefault(*_OPERATIONS)


MEMORY_FRACTION = "VLLM_METAL_MEMORY_FRACTION"
USE_PAGED_ATTENTION = "VLLM_METAL_USE_PAGED_ATTENTION"

_YES = frozenset({"1", "true", "yes", "on"})
_NO = frozenset({"0", "false", "no", "off"})


def memory_fraction() -> float | None:
    """Return the share of the GPU's memory to use, above 0 and up to 1; None if unset or "auto"."""
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
    """Return whether paged attention is used: unless the variable switches it off."""
    text = os.environ.get(USE_PAGED_ATTENTION, "").strip()
    if text.lower() in _NO:
        return False
    if text and text.lower() not in _YES:
        raise EngineError(
            f"{USE_PAGED_ATTENTION} is {text[:100]!r}, expected 1 or 0",
            hint="unset it, or give 0 to run without paged attention",
        )
    return True
