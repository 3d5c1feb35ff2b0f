"""Sampling in NumPy and float64, one row at a time, as the documentation defines it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


def kept(
    logits: Floats, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0
) -> NDArray[np.bool_]:
    """Return which tokens of a row min-p, top-k and top-p keep, with ties of the last one."""
    order = np.argsort(-logits, kind="stable")
    ordered = logits[order]
    mass = np.exp(ordered - ordered[0])
    stays = mass >= min_p
    if top_k > 0:
        stays[top_k:] = False
    mass = np.where(stays, mass, 0)
    if top_p < 1:
        above = np.cumsum(mass) - mass
        stays &= above < top_p * mass.sum()
    return logits >= ordered[stays].min()


def penalised(
    logits: Floats,
    prompt: Sequence[int],
    output: Sequence[int],
    repetition: float,
    presence: float,
    frequency: float,
) -> Floats:
    """Return one row with penalties applied."""
    result = logits.copy()
    for token in {*prompt, *output}:
        result[token] = (
            result[token] / repetition if result[token] > 0 else result[token] * repetition
        )
    for token in set(output):
        result[token] -= frequency * list(output).count(token) + presence
    return result


def log_softmax(logits: Floats) -> Floats:
    """Over the last axis."""
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def chi_square(counts: NDArray[np.int_], probabilities: Floats) -> float:
    """Return Pearson's statistic in standard deviations from its mean; above 5 is significant."""
    total, likely = counts.sum(), probabilities > 0
    assert counts[~likely].sum() == 0, "an impossible token was drawn"
    expected = total * probabilities[likely]
    statistic = ((counts[likely] - expected) ** 2 / expected).sum()
    freedom = likely.sum() - 1
    return float((statistic - freedom) / np.sqrt(2 * freedom))


def softmax(logits: Floats) -> Floats:
    """Over the last axis."""
    return np.exp(log_softmax(logits))
