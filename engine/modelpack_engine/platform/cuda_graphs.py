"""The choice of CUDA graphs in MLX, which suit most models, but not all recurrent ones.

A graph that is similar to an earlier one is launched quickly; any other takes 0.2 ms for each
operation. Steps of recurrent layers that are not compiled run each prompt on its own and are rarely
similar, so they take most of a second each. MLX reads the setting once, when it first computes: the
first model of a process decides.
"""

from __future__ import annotations

import os
import threading

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import ArraysCache, CacheList, make_prompt_cache

GRAPHS = "MLX_USE_CUDA_GRAPHS"
SLOW = "recurrent layers are several times slower with CUDA graphs: set MLX_USE_CUDA_GRAPHS=0"
_lock = threading.Lock()
_decided = False


def choose(model: nn.Module, num_compiled: int = 0) -> str | None:
    """Set CUDA graphs for this process if `model` is its first; call it before MLX computes.

    `num_compiled` of its recurrent layers run in compiled steps. The user's environment takes
    precedence. Return a note if the setting does not suit `model`.
    """
    global _decided
    if not mx.cuda.is_available():
        return None
    with _lock:
        first, _decided = not _decided, True
    irregular = recurrent_layers(model) > num_compiled
    if irregular and first:
        os.environ.setdefault(GRAPHS, "0")
    off = os.environ.get(GRAPHS) == "0"
    if irregular and not off:
        return "several times slower in one process with other models: run it on its own"
    if off and not irregular:
        return "single requests are slower: a recurrent model has switched CUDA graphs off"
    return None


def are_used() -> bool:
    """Return whether MLX uses CUDA graphs in this process."""
    return mx.cuda.is_available() and os.environ.get(GRAPHS) != "0"


def recurrent_layers(model: nn.Module) -> int:
    """Return how many layers of a model keep a state instead of keys."""
    try:
        caches = list(make_prompt_cache(model))
    except (AttributeError, TypeError):  # loading reports the model's errors
        return 0
    found = 0
    while caches:
        cache = caches.pop()
        found += isinstance(cache, ArraysCache)
        if isinstance(cache, CacheList):
            caches += cache.caches
    return found
