"""KVView: one sequence's part of a paged cache, as a cache of mlx-lm's kind."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import KVCache, RotatingKVCache

from modelpack_engine.attention.paged import PagedKV


class KVView(KVCache):
    """Keys and values of the sequence of one piece: a decode row, or a chunk.

    `attend` chooses what an update returns: what the pool holds, the new rows included, or only
    something of the right shape. `new` keeps the rows.
    """

    def __init__(self, cache: PagedKV, row: int, chunk: int | None, *, attend: bool) -> None:
        KVCache.__init__(self)
        self.cache = cache
        self.length, self.total = _extent(cache, row, chunk)
        self.offset = self.total - self.length
        self.attend = attend
        self.row, self.chunk = row, chunk
        self.new: tuple[mx.array, mx.array] | None = None

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> Any:
        """Note new rows [1, heads, length, dim]; return all that may be seen, in order."""
        self.new = (keys, values)
        self.offset = self.total
        if self.attend:
            self.keys, self.values = self.cache.fetch(self.row, self.chunk)
        else:
            seen = self.total - self.length
            if self.cache.layout.window is not None:
                seen = min(seen, self.cache.layout.window - 1)
            self.keys, self.values = (
                mx.concatenate([mx.zeros((1, a.shape[1], seen, a.shape[3]), a.dtype), a], axis=2)
                for a in (keys, values)
            )
        return self.keys, self.values

    def keys_and_values(self) -> tuple[mx.array, mx.array]:
        """Return what is seen, also for layers that share this cache without writing to it."""
        return self.cache.fetch(self.row, self.chunk)

    def make_mask(self, *args: Any, **kwargs: Any) -> Any:
        """Return the mask that mlx-lm's own cache would."""
        length = args[0] if args else kwargs.pop("N")
        return self.mask_for(length, cache_window=self.cache.layout.window, **kwargs)

    def mask_for(self, length: int, *, cache_window: int | None, **request: Any) -> Any:
        """Return the mask of a cache with `cache_window` that stands where this one stands."""
        model: KVCache | RotatingKVCache
        model = KVCache() if cache_window is None else RotatingKVCache(cache_window)
        model.offset = self.total - self.length
        if cache_window is not None and length == 1:
            # Our keys are in order: the mask is not to be rolled by the ring's position.
            window = request.get("window_size")
            if window is None or window >= min(self.total, cache_window):
                return None
            keys = min(self.total, cache_window)
            return mx.arange(keys) >= keys - window
        return model.make_mask(length, **request)


def _extent(cache: PagedKV, row: int, chunk: int | None) -> tuple[int, int]:
    """Return how many tokens a piece adds, and its sequence's length with them."""
    if chunk is not None:
        found = cache.step.chunks[chunk]
        return found.length, found.kv_length
    return 1, cache.step.decode_length(row)
