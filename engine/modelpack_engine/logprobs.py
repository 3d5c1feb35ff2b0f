"""Log-probabilities of tokens, sampled or of a prompt, under the model's own distribution.

They are log-softmax of the raw logits: before temperature, penalties, biases, masks and filters,
as OpenAI reports them (vLLM's `raw_logprobs`). So a token may be chosen that is not among the most
likely ones reported with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from modelpack_engine.outputs import TokenLogprob
from modelpack_engine.sampling_params import MAX_LOGPROBS

#: Rows that are worked on at once: bounds the memory that a long chunk of a prompt takes.
_ROWS_AT_ONCE = 256


@dataclass(frozen=True, slots=True)
class Logprobs:
    """Lazy device arrays: `chosen` float32 [rows]; `top_ids` int32 and `top` float32 [rows, k].

    The most likely come first. k is MAX_LOGPROBS (or the vocabulary's size, if that is less)
    whatever was asked for, so that shapes do not vary; it is 0 if no alternatives were.
    """

    chosen: mx.array
    top_ids: mx.array
    top: mx.array

    def arrays(self) -> tuple[mx.array, mx.array, mx.array]:
        """Return what has to be evaluated."""
        return self.chosen, self.top_ids, self.top

    def read(
        self, token_ids: Sequence[int], num_top: Sequence[int | None]
    ) -> list[TokenLogprob | None]:
        """Bring the first rows to the host, waiting for them.

        `token_ids` are the chosen ones and `num_top` how many alternatives each row asked for (None
        gives None). There may be fewer of them than rows: those were padding.
        """
        chosen: Any = self.chosen.tolist()
        top_ids: Any = self.top_ids.tolist()
        top: Any = self.top.tolist()
        found: list[TokenLogprob | None] = []
        for row, (token_id, wanted) in enumerate(zip(token_ids, num_top, strict=True)):
            if wanted is None:
                found.append(None)
                continue
            best = tuple(zip(top_ids[row][:wanted], top[row][:wanted], strict=True))
            found.append(TokenLogprob(token_id, chosen[row], best))
        return found


def gather_logprobs(logits: mx.array, token_ids: mx.array, num_top: int) -> Logprobs:
    """Return the log-probabilities of `token_ids` (int32 [rows]) and, if `num_top`, the highest.

    `logits` [rows, vocab_size] are the model's, of any float type. For a prompt's chunk, row i is
    the logits at position p and `token_ids[i]` the prompt's token at p + 1.
    """
    parts = [
        _gather(
            logits[start : start + _ROWS_AT_ONCE], token_ids[start : start + _ROWS_AT_ONCE], num_top
        )
        for start in range(0, logits.shape[0], _ROWS_AT_ONCE)
    ]
    if len(parts) == 1:
        return Logprobs(*parts[0])
    chosen, top_ids, top = zip(*parts, strict=True)
    return Logprobs(*(mx.concatenate(list(part)) for part in (chosen, top_ids, top)))


def _gather(
    logits: mx.array, token_ids: mx.array, num_top: int
) -> tuple[mx.array, mx.array, mx.array]:
    logits = logits.astype(mx.float32)
    total = mx.logsumexp(logits, axis=-1, keepdims=True)
    chosen = (mx.take_along_axis(logits, token_ids[:, None], axis=-1) - total)[:, 0]
    k = min(MAX_LOGPROBS, logits.shape[-1]) if num_top else 0
    ids = mx.argpartition(logits, -k, axis=-1)[:, -k:] if k else token_ids[:, None][:, :0]
    values = mx.take_along_axis(logits, ids, axis=-1)
    order = mx.argsort(-values, axis=-1)
    ids = mx.take_along_axis(ids, order, axis=-1).astype(mx.int32)
    return chosen, ids, mx.take_along_axis(values, order, axis=-1) - total
