"""Tokens of the rows that are drawn: by one kernel where there is a GPU, else by MLX's functions.

Those sort whole vocabularies for top-k and top-p, and make the noise in a dozen passes over them.
"""

from __future__ import annotations

from functools import cache

import mlx.core as mx
import numpy as np

from modelpack_engine.attention.kernels import launch
from modelpack_engine.attention.kernels.plan import vector_width
from modelpack_engine.sampling import draw, logits
from modelpack_engine.sampling.plan import Draws, Entry, plan_draws
from modelpack_engine.sampling_params import SamplingParams

_MOST_SIMDGROUPS = 16
#: Metal has smaller inputs elsewhere.
_FEWEST = 64
#: Last bits of a float32 that are zeros in all of a type's.
_ZEROS = {mx.float32: 0, mx.float16: 13, mx.bfloat16: 16}


def drawn(batch_logits: mx.array, draws: Draws, row_keys: mx.array) -> mx.array:
    """Return a token for each of `draws.rows` of logits [rows, vocab_size], as int32.

    `row_keys` are uint32 [rows drawn, 2]. A row depends on its logits, settings and key only.
    """
    if can_draw_by_kernel(batch_logits.dtype, batch_logits.shape[-1]):
        return by_kernel(batch_logits, draws, row_keys)
    return by_functions(batch_logits, draws, row_keys)


def can_draw_by_kernel(dtype: mx.Dtype, vocab_size: int) -> bool:
    """Whether the kernel is right for such logits; the first call compiles and tests it."""
    return launch.backend() != "none" and verdict(dtype, vocab_size) is None


def by_functions(batch_logits: mx.array, draws: Draws, row_keys: mx.array) -> mx.array:
    """Return what `drawn` does, by MLX's functions."""
    scaled = batch_logits[draws.rows].astype(mx.float32) / draws.temperature
    least = None
    if draws.log_min_p is not None or draws.filters:
        least = mx.full((scaled.shape[0], 1), -mx.inf)
        if draws.log_min_p is not None:
            least = scaled.max(axis=-1, keepdims=True) + draws.log_min_p
        for f in draws.filters:
            least[f.rows] = logits.cutoff(
                scaled[f.rows], least[f.rows], f.top_k, f.top_p, windowed=f.windowed
            )
    return draw.draw(scaled, least, row_keys)[draws.sources]


def by_kernel(batch_logits: mx.array, draws: Draws, row_keys: mx.array) -> mx.array:
    """Return what `drawn` does, by the kernel."""
    count, vocab_size = draws.rows.size, batch_logits.shape[-1]
    vector = vector_width(batch_logits.dtype.size, vocab_size)
    simdgroups = min(_MOST_SIMDGROUPS, max(1, vocab_size // 512))
    (token_ids,) = launch.run(
        "draw",
        [batch_logits, draws.rows, draws.settings, row_keys],
        [("T", batch_logits.dtype)],
        [
            ("V", vocab_size),
            ("VEC", vector),
            ("SHIFT", _ZEROS[batch_logits.dtype]),
            ("NSG", simdgroups),
        ],
        threads=count * simdgroups * 32,
        group=simdgroups * 32,
        shapes=[(count,)],
        dtypes=[mx.int32],
    )
    return token_ids


@cache
def verdict(dtype: mx.Dtype, vocab_size: int) -> str | None:
    """Return None if the kernel draws what MLX's functions do, else what is off."""
    if dtype not in _ZEROS or vocab_size < _FEWEST:
        return f"there is no kernel for {vocab_size} logits in {dtype}"
    return launch.verdict(_compare, dtype, vocab_size)


def _compare(dtype: mx.Dtype, vocab_size: int) -> str | None:
    k = max(2, vocab_size // 50)
    kinds = {
        "all": SamplingParams(),
        "hot": SamplingParams(temperature=3.0),
        "top-k": SamplingParams(top_k=k),
        "top-p": SamplingParams(top_p=0.8),
        "min-p": SamplingParams(min_p=0.2, temperature=2.0),
        "top-k and top-p": SamplingParams(top_k=k, top_p=0.9, temperature=2.0),
        "all three": SamplingParams(top_k=2 * k, top_p=0.7, min_p=0.1, temperature=1.5),
    }
    each = 8
    entries = [Entry(params, seed, None, ()) for params in kinds.values() for seed in range(each)]
    rows = len(entries)
    draws = plan_draws(entries, rows, vocab_size)
    assert draws is not None, "all are drawn"
    some = mx.random.normal((rows, vocab_size), key=mx.random.key(23))
    some[:, ::7] = -mx.inf  # what a mask hides
    positions = np.arange(len(draws.seeds), dtype=np.uint64)
    keys = mx.array(draw.keys(draws.seeds, positions))
    ways = by_kernel, by_functions
    found, wanted = (np.array(way(some.astype(dtype), draws, keys)) for way in ways)
    for name, at in zip(kinds, range(0, rows, each), strict=True):
        if (found[at : at + each] != wanted[at : at + each]).any():
            return f"tokens by {name} are others"
    return None
