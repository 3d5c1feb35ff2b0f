"""Handles: what a paged KV cache returns to a model instead of all keys and values.

A model calls `cache.update_and_fetch(keys, values)` and passes the result to
`mx.fast.scaled_dot_product_attention`, which `patches.functions` replaces. A handle holds the new
rows, so that shape and dtype are right, and its cache, which the replaced function uses. MLX's
functions return plain arrays, so a model that transforms the keys after the update loses the
handle. That is an error and never a wrong result: see `LostHandleError` and `PagedKV.close`.

A handle never refers to the pool: a second reference would make each write copy the pool.
"""

from __future__ import annotations

from typing import Any, Literal, Protocol

import mlx.core as mx

from modelpack_engine.errors import EngineError


class LostHandleError(EngineError):
    """A layer did not compute its attention from the handles of its cache (`cache`, if known)."""

    def __init__(self, message: str, *, cache: Attends | None = None) -> None:
        super().__init__(message)
        self.cache = cache


class Attends(Protocol):
    """A cache that computes attention for the rows of the current step."""

    def attend(
        self,
        queries: mx.array,
        *,
        scale: float,
        window: int | None = None,
        sinks: mx.array | None = None,
        softcap: float | None = None,
        query_pe: mx.array | None = None,
        key_dtype: mx.Dtype | None = None,
    ) -> mx.array:
        """Return the attention output [rows, heads, 1, value dim] of `queries`."""


Part = Literal["keys", "values"]


class KVHandle(mx.array):
    """New key or value rows [rows, kv heads, 1, dim], with their cache."""

    cache: Attends
    part: Part
    transposed: bool

    def astype(self, dtype: mx.Dtype, *args: Any, **kwargs: Any) -> mx.array:
        """Cast, as models that attend in float32 do."""
        cast = mx.array.astype(self, dtype, *args, **kwargs)
        return make_handle(cast, self.cache, self.part, self.transposed)

    def swapaxes(self, axis1: int, axis2: int, *args: Any, **kwargs: Any) -> mx.array:
        """Transpose the last two axes, as models do before a matmul with queries."""
        swapped = mx.array.swapaxes(self, axis1, axis2, *args, **kwargs)
        last_two = {axis1 % self.ndim, axis2 % self.ndim} == {self.ndim - 1, self.ndim - 2}
        if not last_two:
            return swapped
        return make_handle(swapped, self.cache, self.part, not self.transposed)

    def __rmatmul__(self, queries: mx.array) -> mx.array:
        """Keep `queries` (already scaled) for the attention call, which gets the scores as mask.

        Latent attention (DeepSeek V3 and its family) computes rotary scores outside of the
        attention function and adds them to those of the latents. Python tries a subclass's
        reflected operator first, so this method is called.
        """
        if self.part != "values" or not self.transposed:
            raise LostHandleError("the layer multiplies queries and keys itself", cache=self.cache)
        scores = RotaryScores(mx.zeros((1,), queries.dtype))
        scores.queries = queries
        return scores


class RotaryScores(mx.array):
    """A placeholder for rotary scores that holds their queries [rows, heads, 1, dim]."""

    queries: mx.array


class RowMask(mx.array):
    """A placeholder that a cache's `make_mask` returns: the requested mask, applied per row."""

    window: int | None
    cache_window: int | None
    as_array: bool


def make_handle(rows: mx.array, cache: Attends, part: Part, transposed: bool = False) -> KVHandle:
    """Return `rows` as a handle of `cache`."""
    handle = KVHandle(rows)
    handle.cache, handle.part, handle.transposed = cache, part, transposed
    return handle


def make_row_mask(window: int | None, cache_window: int | None, as_array: bool) -> RowMask:
    """Return a mask with the requested window and the window of its cache."""
    mask = RowMask(mx.zeros((1,), mx.bool_))
    mask.window, mask.cache_window, mask.as_array = window, cache_window, as_array
    return mask
