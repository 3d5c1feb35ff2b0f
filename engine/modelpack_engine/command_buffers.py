"""How much work MLX hands to a GPU at once, and what it keeps of how it did.

MLX hands over what it has encoded when the arrays of it add up to a limit, and counts a whole pool
of keys for every kernel that reads some of it: with gigabytes of KV cache, that is after every
layer. The limit of operations is enough.

On CUDA it keeps graphs, and plans of convolutions and attention, for the shapes it has met. Once it
has met twice as many as it keeps, it raises an error instead of computing: a server meets any
number of shapes in its life.

On CUDA again, what is handed over at once becomes a graph, and one that is not like any before
takes 0.2 ms an operation. Small ones are like others more often (see `cuda_graphs`).

MLX reads all of these from the environment when it first uses the GPU (mlx/backend/cuda/device.cpp
and lru_cache.h, mlx/backend/metal/device.cpp).
"""

from __future__ import annotations

import os
import sys

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
