"""Random draws that depend on a request's seed and the token's position, and on nothing else.

A token is drawn by the Gumbel-max trick: each token of the vocabulary gets noise of its own, and
the largest sum of logit and noise wins. The noise belongs to the token rather than to its rank or
to a point of the cumulative distribution, so that a logit that differs in its last bit, as it does
between batches of different shapes, all but never changes the draw.
"""

from __future__ import annotations

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

_LEAST = 2.0**-33  # below the least positive uniform number, 2 ** -32


def mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Scramble 64-bit numbers, one to one: a step of SplitMix64 (doi:10.1145/2660193.2660195)."""
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def seeds_of(numbers: list[int]) -> NDArray[np.uint64]:
    """Fold any integers to 64 bits; -1 and 2 ** 64 - 1 are the same seed."""
    return np.array([number & 0xFFFFFFFFFFFFFFFF for number in numbers], dtype=np.uint64)


def keys(seeds: NDArray[np.uint64], positions: NDArray[np.uint64]) -> NDArray[np.uint32]:
    """Return the random key of each draw, uint32 [rows, 2]: its seed folded with its position.

    The seed is scrambled first, since people count seeds up as positions are.
    """
    folded = mix(mix(seeds) + positions)
    return np.stack([folded >> np.uint64(32), folded], axis=-1).astype(np.uint32)


def gumbel(row_keys: mx.array, vocab_size: int) -> mx.array:
    """Return Gumbel noise, float32 [rows, vocab_size]; a row depends on its key only.

    -log1p(-u) rather than -log(u): the noise that wins comes from the smallest exponentials, and
    float32 resolves numbers near 0 far better than near 1.
    """

    def uniform(key: mx.array) -> mx.array:
        return mx.random.uniform(shape=(vocab_size,), key=key)

    u = mx.maximum(mx.vmap(uniform)(row_keys), _LEAST)
    return -mx.log(-mx.log1p(-u))


def draw(logits: mx.array, least: mx.array | None, row_keys: mx.array) -> mx.array:
    """Draw a token of each row by softmax over the logits that are `least` ([rows, 1]) or more."""
    if least is not None:
        logits = mx.where(logits >= least, logits, -mx.inf)
    return mx.argmax(logits + gumbel(row_keys, logits.shape[-1]), axis=-1).astype(mx.int32)
