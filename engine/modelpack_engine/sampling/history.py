"""TokenHistory: which tokens each penalised sequence holds, counted on the device."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

#: Each output token adds this; the lowest bit says whether the prompt holds the token.
OUTPUT = 2

_FIRST_CAPACITY = 8


class TokenHistory:
    """Counts of the tokens of penalised sequences, a row of int32 [vocab_size] for each.

    A count is twice the number of times that the output holds the token, plus one if the prompt
    holds it. The rows exist from the first penalised sequence on (`vocab_size` * 4 bytes each, in
    powers of two) and are reused afterwards.

    The in-flight rule: `append` extends the graph that the next `counts` reads, so the token
    sampled at step N is counted at step N + 1 although the host has not seen it. Nothing here needs
    an evaluation of its own: evaluating the tokens of a step brings the counts up to date, and at
    most one step's append is pending. The pool is updated in place as long as the step that reads
    it is evaluated before the one that appends to it is submitted.
    """

    def __init__(self, vocab_size: int, max_num_seqs: int) -> None:
        self._vocab_size = vocab_size
        self._first_capacity = min(_FIRST_CAPACITY, max_num_seqs)
        self._counts: mx.array | None = None
        self._free: list[int] = []

    def open(self, prompt_token_ids: Sequence[int], output_token_ids: Sequence[int]) -> int:
        """Return a slot that holds these tokens, until it is closed."""
        if self._counts is None or not self._free:
            self._grow()
        assert self._counts is not None
        slot = self._free.pop()
        self._counts[slot] = mx.array(self._count(prompt_token_ids, output_token_ids))
        return slot

    def close(self, slot: int) -> None:
        """Give the slot back."""
        self._free.append(slot)

    def counts(self, slots: mx.array) -> mx.array:
        """Return the counts of `slots` (int32 [rows]) as int32 [rows, vocab_size]."""
        assert self._counts is not None, "a slot was opened"
        return self._counts[slots]

    def append(self, slots: mx.array, token_ids: mx.array, amounts: mx.array) -> None:
        """Add `amounts` to one token of each slot (all int32 [rows]): OUTPUT, or 0 for padding."""
        assert self._counts is not None, "a slot was opened"
        self._counts = self._counts.at[slots, token_ids].add(amounts)

    def _count(self, prompt: Sequence[int], output: Sequence[int]) -> NDArray[np.int32]:
        row = np.zeros(self._vocab_size, dtype=np.int32)
        np.add.at(row, np.asarray(output, dtype=np.int64), OUTPUT)
        row[np.asarray(prompt, dtype=np.int64)] |= 1
        return row

    def _grow(self) -> None:
        more = self._first_capacity if self._counts is None else self._counts.shape[0]
        empty = mx.zeros((more, self._vocab_size), dtype=mx.int32)
        if self._counts is None:
            self._counts, first = empty, 0
        else:
            first = self._counts.shape[0]
            self._counts = mx.concatenate([self._counts, empty])
        self._free.extend(range(first + more - 1, first - 1, -1))
