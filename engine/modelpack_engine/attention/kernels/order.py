"""Which write a pool's contents come from, so that readers can be ordered after it.

A write in place puts out a token (int32 [1], 0) and no pool. The pools that `write_kv` returns are
remembered here together with it, for as long as they live.
"""

from __future__ import annotations

from weakref import ref

import mlx.core as mx

_tokens: dict[int, tuple[ref[mx.array], mx.array]] = {}


def written(pool: mx.array, token: mx.array) -> mx.array:
    """Return `pool`, which `token` came with."""
    key = id(pool)

    def forget(gone: ref[mx.array]) -> None:
        if key in _tokens and _tokens[key][0] is gone:
            del _tokens[key]

    _tokens[key] = ref(pool, forget), token
    return pool


def token_of(pool: mx.array | None) -> mx.array | None:
    """Return the token of the last write to `pool`, or None if MLX itself made its contents."""
    found = _tokens.get(id(pool))
    return found[1] if found is not None and found[0]() is pool else None


def after(indices: mx.array, *pools: mx.array | None) -> mx.array:
    """Return `indices` (int32), ordered after the writes to `pools`.

    Whatever gathers from a pool with MLX's functions has to use such indices; see the package.
    """
    tokens = {id(token): token for pool in pools if (token := token_of(pool)) is not None}
    for token in tokens.values():
        indices = indices + token
    return indices
