"""Pooling: from the hidden states of a text's tokens to one vector.

The modes and their names are sentence-transformers' (modules/pooling.py). The vectors of several
modes are concatenated.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from enum import StrEnum
from typing import Any

import mlx.core as mx

from modelpack_engine.errors import ModelLoadError


class PoolingMode(StrEnum):
    """How vectors of tokens become one."""

    CLS = "cls"  # the first token
    MAX = "max"
    MEAN = "mean"
    MEAN_SQRT_LEN = "mean_sqrt_len_tokens"  # the sum over the root of how many there are
    WEIGHTED_MEAN = "weightedmean"  # later tokens weigh more
    LAST = "lasttoken"


#: The keys of N_Pooling/config.json before modes had a name, in the order of their vectors.
_FLAGS: Mapping[str, PoolingMode] = {
    "pooling_mode_cls_token": PoolingMode.CLS,
    "pooling_mode_max_tokens": PoolingMode.MAX,
    "pooling_mode_mean_tokens": PoolingMode.MEAN,
    "pooling_mode_mean_sqrt_len_tokens": PoolingMode.MEAN_SQRT_LEN,
    "pooling_mode_weightedmean_tokens": PoolingMode.WEIGHTED_MEAN,
    "pooling_mode_lasttoken": PoolingMode.LAST,
}


def parse_pooling(config: Mapping[str, Any], what: str) -> tuple[PoolingMode, ...]:
    """Return the modes that N_Pooling/config.json asks for; `what` names it in errors."""
    named = config.get("pooling_mode")
    if named is not None:
        names = [named] if isinstance(named, str) else named
        try:
            modes = tuple(PoolingMode(name) for name in names)
        except (TypeError, ValueError):
            raise ModelLoadError(
                f"{what}: pooling_mode {str(named)[:100]!r} is not known"
            ) from None
        if not modes:
            raise ModelLoadError(f"{what}: pooling_mode is empty")
        return modes
    unknown = [
        key
        for key, value in config.items()
        if key.startswith("pooling_mode_") and key not in _FLAGS and value
    ]
    if unknown:
        raise ModelLoadError(f"{what}: {unknown[0][:100]} is not known")
    return tuple(mode for key, mode in _FLAGS.items() if config.get(key)) or (PoolingMode.MEAN,)


def pool(
    hidden: mx.array, lengths: mx.array, modes: Sequence[PoolingMode], skipped: mx.array
) -> mx.array:
    """Return one vector a text, float32 [texts, modes * size].

    `hidden` [texts, tokens, size] is filled up on the right; `lengths` int32 [texts] says how
    many tokens are real. The first `skipped` int32 [texts] of them, a prompt, are left out.
    """
    hidden = hidden.astype(mx.float32)
    vectors = [_MODES[mode](hidden, lengths, skipped) for mode in modes]
    return vectors[0] if len(vectors) == 1 else mx.concatenate(vectors, axis=-1)


def _real(hidden: mx.array, lengths: mx.array, skipped: mx.array) -> mx.array:
    """Return which places are tokens that count, [texts, tokens, 1]."""
    places = mx.arange(hidden.shape[1])[None, :]
    return ((places >= skipped[:, None]) & (places < lengths[:, None]))[..., None]


def _at(hidden: mx.array, places: mx.array) -> mx.array:
    return mx.take_along_axis(hidden, places[:, None, None], axis=1)[:, 0]


def _cls(hidden: mx.array, lengths: mx.array, skipped: mx.array) -> mx.array:
    return _at(hidden, mx.minimum(skipped, lengths - 1))


def _last(hidden: mx.array, lengths: mx.array, skipped: mx.array) -> mx.array:
    return _at(hidden, lengths - 1)


def _max(hidden: mx.array, lengths: mx.array, skipped: mx.array) -> mx.array:
    return mx.where(_real(hidden, lengths, skipped), hidden, -mx.inf).max(axis=1)


def _sum(hidden: mx.array, lengths: mx.array, skipped: mx.array) -> mx.array:
    return mx.where(_real(hidden, lengths, skipped), hidden, 0).sum(axis=1)


def _counted(lengths: mx.array, skipped: mx.array) -> mx.array:
    return (lengths - skipped)[:, None].astype(mx.float32)


def _mean(hidden: mx.array, lengths: mx.array, skipped: mx.array) -> mx.array:
    return _sum(hidden, lengths, skipped) / _counted(lengths, skipped)


def _mean_sqrt_len(hidden: mx.array, lengths: mx.array, skipped: mx.array) -> mx.array:
    return _sum(hidden, lengths, skipped) / mx.sqrt(_counted(lengths, skipped))


def _weighted_mean(hidden: mx.array, lengths: mx.array, skipped: mx.array) -> mx.array:
    weights = mx.arange(1, hidden.shape[1] + 1).astype(mx.float32)[None, :, None]
    weights = mx.where(_real(hidden, lengths, skipped), weights, 0)
    # Filled places may hold anything, infinities too, of which nothing may stay.
    known = mx.where(weights > 0, hidden, 0)
    return (known * weights).sum(axis=1) / weights.sum(axis=1)


_MODES: Mapping[PoolingMode, Callable[[mx.array, mx.array, mx.array], mx.array]] = {
    PoolingMode.CLS: _cls,
    PoolingMode.MAX: _max,
    PoolingMode.MEAN: _mean,
    PoolingMode.MEAN_SQRT_LEN: _mean_sqrt_len,
    PoolingMode.WEIGHTED_MEAN: _weighted_mean,
    PoolingMode.LAST: _last,
}
