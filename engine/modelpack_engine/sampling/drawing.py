"""Tokens of rows some of which are drawn: by one kernel on a GPU, else by MLX's functions.

Those sort whole vocabularies for top-k and top-p, and make the noise in a dozen passes over them.
"""

from __future__ import annotations

from functools import cache

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from modelpack_engine.attention.kernels import launch
from modelpack_engine.attention.kernels.plan import vector_width
from modelpack_engine.managed_memory import Staging
from modelpack_engine.sampling import draw, logits
from modelpack_engine.sampling.plan import Draws, Entry, plan_draws
from modelpack_engine.sampling_params import SamplingParams

Keys = NDArray[np.uint32]

_MOST_SIMDGROUPS = 16
#: Metal has smaller inputs elsewhere.
_FEWEST = 64
#: Last bits of a float32 that are zeros in all of a type's.
_ZEROS = {mx.float32: 0, mx.float16: 13, mx.bfloat16: 16}


def choose(batch_logits: mx.array, draws: Draws, keys: Keys, staging: Staging) -> mx.array:
    """Return int32 tokens of logits [rows, vocab_size]: drawn by `draws`, or the most likely.

    `keys` are uint32 [rows drawn, 2]. A row depends on its logits, settings and key only.
    """
    if verdict(batch_logits.dtype, batch_logits.shape[-1]) is None:
        return by_kernel(batch_logits, draws, keys, staging)
    return by_functions(batch_logits, draws, keys, staging)


def by_functions(batch_logits: mx.array, draws: Draws, keys: Keys, staging: Staging) -> mx.array:
    """Return what `choose` does, by MLX's functions."""
    arrays = draws.arrays
    token_ids = mx.argmax(batch_logits, axis=-1).astype(mx.int32)
    scaled = batch_logits[arrays.rows].astype(mx.float32) / arrays.temperature
    least = None
    if arrays.log_min_p is not None or arrays.filters:
        least = mx.full((scaled.shape[0], 1), -mx.inf)
        if arrays.log_min_p is not None:
            least = scaled.max(axis=-1, keepdims=True) + arrays.log_min_p
        for f in arrays.filters:
            least[f.rows] = logits.cutoff(
                scaled[f.rows], least[f.rows], f.top_k, f.top_p, windowed=f.windowed
            )
    staged = staging.put(keys.ravel().view(np.int32))[: keys.size]
    row_keys = staged.view(mx.uint32).reshape(keys.shape)
    token_ids[arrays.rows] = draw.draw(scaled, least, row_keys)[arrays.sources]
    return token_ids


def by_kernel(batch_logits: mx.array, draws: Draws, keys: Keys, staging: Staging) -> mx.array:
    """Return what `choose` does, by the kernel."""
    rows, vocab_size = batch_logits.shape
    settings = draws.settings.copy()
    distinct = slice(draws.num_drawn)
    settings[draws.batch_rows[distinct], 4:] = keys[distinct].view(np.int32)
    vector = vector_width(batch_logits.dtype.size, vocab_size)
    simdgroups = min(_MOST_SIMDGROUPS, max(1, vocab_size // 512))
    (token_ids,) = launch.run(
        "draw",
        [batch_logits, staging.put(settings.ravel())],
        [("T", batch_logits.dtype)],
        [
            ("V", vocab_size),
            ("VEC", vector),
            ("SHIFT", _ZEROS[batch_logits.dtype]),
            ("NSG", simdgroups),
        ],
        threads=rows * simdgroups * 32,
        group=simdgroups * 32,
        shapes=[(rows,)],
        dtypes=[mx.int32],
    )
    return token_ids


@cache
def verdict(dtype: mx.Dtype, vocab_size: int) -> str | None:
    """Return None if the kernel draws what MLX's functions do, else what is off.

    The first call for logits of a type and width compiles it.
    """
    if launch.backend() == "none":
        return "there is no GPU"
    if dtype not in _ZEROS or vocab_size < _FEWEST:
        return f"there is no kernel for {vocab_size} logits in {dtype}"
    return launch.verdict(_compare, dtype, vocab_size)


def _compare(dtype: mx.Dtype, vocab_size: int) -> str | None:
    k = max(2, vocab_size // 50)
    kinds = {
        "none": SamplingParams(temperature=0),
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
    keys, staging = draw.keys(draws.seeds, positions), Staging()
    ways = by_kernel, by_functions
    found, wanted = (np.array(way(some.astype(dtype), draws, keys, staging)) for way in ways)
    for name, at in zip(kinds, range(0, rows, each), strict=True):
        if (found[at : at + each] != wanted[at : at + each]).any():
            return f"tokens by {name} are others"
    return None
