"""Whether MLX launches work as CUDA graphs: good for most models, bad for recurrent ones.

A graph similar to an earlier one launches quickly; any other takes 0.2 ms per operation. Steps of
recurrent models have a piece per prompt, in any number, and are rarely similar: most of a second
each. MLX reads the setting once, when it first computes, so a process's first model decides.
"""

from __future__ import annotations

import os
import threading

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import ArraysCache, CacheList, make_prompt_cache

GRAPHS = "MLX_USE_CUDA_GRAPHS"
_lock = threading.Lock()
_decided = False


def choose(model: nn.Module) -> str | None:
    """Choose for this process, if `model` is its first: to be called before that is computed.

    What the user's environment says holds. Returns a note where the choice does not suit `model`.
    """
    global _decided
    if not mx.cuda.is_available():
        return None
    with _lock:
        first, _decided = not _decided, True
    recurrent = is_recurrent(model)
    if recurrent and first:
        os.environ.setdefault(GRAPHS, "0")
    off = os.environ.get(GRAPHS) == "0"
    if recurrent and not off:
        return "several times slower beside another model: a process of its own would be better"
    if off and not recurrent:
        return "slower for single requests beside a recurrent model: CUDA graphs are off"
    return None


def is_recurrent(model: nn.Module) -> bool:
    """Return whether a model has layers that keep a state instead of keys."""
    try:
        caches = list(make_prompt_cache(model))
    except (AttributeError, TypeError):  # what it is, others will say
        return False
    while caches:
        cache = caches.pop()
        if isinstance(cache, ArraysCache):
            return True
        if isinstance(cache, CacheList):
            caches += cache.caches
    return False
