"""What requests change about logits before a token is chosen: pure functions on device arrays.

Logits are float32 [rows, vocab_size], and so are the results. A token that must not be chosen
gets minus infinity.
"""

from __future__ import annotations

import mlx.core as mx

#: A top-k up to this sorts that many of the most likely tokens; a larger one the vocabulary.
WINDOW = 1024


def mask(logits: mx.array, allowed: mx.array) -> mx.array:
    """Keep the tokens whose bit is set in `allowed`.

    That is uint8 [rows, ceil(vocab_size / 8)], a bit for each token, the least significant first.
    """
    vocab_size = logits.shape[-1]
    bits = (allowed[:, :, None] >> mx.arange(8, dtype=mx.uint8)) & 1
    keep = bits.reshape(allowed.shape[0], -1)[:, :vocab_size]
    return mx.where(keep, logits, -mx.inf)


def penalise(
    logits: mx.array,
    counts: mx.array,
    repetition: mx.array,
    presence: mx.array,
    frequency: mx.array,
) -> mx.array:
    """Make tokens that occurred less likely; the penalties are float32 [rows, 1].

    `counts` is TokenHistory's. Repetition (CTRL, arXiv:1909.05858) counts prompt and output;
    presence and frequency (OpenAI) count the output only. The order is vLLM's.
    """
    repeated = mx.where(logits > 0, logits / repetition, logits * repetition)
    logits = mx.where(counts > 0, repeated, logits)
    outputs = (counts >> 1).astype(mx.float32)
    return logits - frequency * outputs - presence * (outputs > 0)


def cutoff(
    logits: mx.array, floor: mx.array, top_k: mx.array, top_p: mx.array, *, windowed: bool
) -> mx.array:
    """Return the least logit that top-k and top-p keep, float32 [rows, 1], by one sort.

    `floor` (float32) is the least that min-p keeps, `top_k` is int32 from 1 to vocab_size, `top_p`
    float32; all are [rows, 1]. Top-p is the smallest set of the most likely tokens, among those
    that top-k and min-p keep, that holds `top_p` of their probability. Since the answer is a value,
    tokens that tie with the last one kept are kept as well, whatever their order.

    `windowed` promises that every top-k is at most WINDOW.
    """
    if windowed:
        logits = mx.topk(logits, WINDOW, axis=-1)
    ascending = mx.sort(logits, axis=-1)
    rank = mx.arange(ascending.shape[-1] - 1, -1, -1)
    kept = (rank < top_k) & (ascending >= floor)
    mass = mx.where(kept, mx.exp(ascending - ascending[:, -1:]), 0)
    above = mx.cumsum(mass, axis=-1, reverse=True, inclusive=False)
    total = above[:, :1] + mass[:, :1]
    kept = kept & ((above < top_p * total) | (top_p >= 1))
    return mx.where(kept, ascending, mx.inf).min(axis=-1, keepdims=True)
