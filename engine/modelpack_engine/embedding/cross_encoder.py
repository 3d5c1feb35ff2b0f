"""CrossEncoder: judges how well a document answers a query, reading both at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from modelpack_engine.embedding.arrays import as_arrays
from modelpack_engine.embedding.batching import BatchLimits, split_batches
from modelpack_engine.embedding.encoder import Encoder
from modelpack_engine.embedding.inputs import InputReader, Prepared, check_total
from modelpack_engine.embedding.results import Pair, Scores
from modelpack_engine.errors import EngineError


@dataclass(frozen=True, slots=True)
class CrossEncoderConfig:
    """`max_length` counts the tokens of query and document together, with the special ones."""

    architecture: str
    max_length: int


class CrossEncoder:
    """Not thread-safe, but for `read`: calls to MLX have to come from the thread that loaded it."""

    def __init__(
        self,
        config: CrossEncoderConfig,
        reader: InputReader,
        encoder: Encoder,
        *,
        limits: BatchLimits | None = None,
        notes: tuple[str, ...] = (),
        weight_bytes: int = 0,
    ) -> None:
        self.config = config
        self.tokenizer = reader.tokenizer
        self.vocab_size = reader.vocab_size
        self.limits = limits or BatchLimits()
        self.notes = notes
        self.weight_bytes = weight_bytes
        self._reader = reader
        self._encoder = encoder

    def score(self, pairs: Sequence[Pair], *, truncate: bool = False) -> Scores:
        """Return the logits of (query, document); `sigmoid` makes them lie between 0 and 1.

        `truncate` cuts the longer text of a pair that is too long. Raises `ContextLengthError`
        else, and `EngineError` if a logit is no number.
        """
        prepared = self.read(pairs, truncate=truncate)
        logits = [0.0] * len(prepared)
        for places in split_batches([len(each) for each in prepared], self.limits):
            for place, logit in zip(places, self.run([prepared[at] for at in places]), strict=True):
                logits[place] = logit
        return self.finish(logits, prepared)

    def read(self, pairs: Sequence[Pair], *, truncate: bool) -> list[Prepared]:
        """Return the pairs as tokens; any thread may call it."""
        prepared = []
        total = 0
        for index, (query, document) in enumerate(pairs):
            one = self._reader.read_pair(index, query, document, truncate=truncate)
            total += len(one)
            check_total(total, "documents")
            prepared.append(one)
        return prepared

    def run(self, batch: Sequence[Prepared]) -> list[float]:
        """Return the logits of one batch."""
        token_ids, type_ids, lengths, _ = as_arrays(batch)
        hidden = self._encoder(token_ids, lengths, type_ids)
        logits = self._encoder.classify(hidden, lengths)[:, 0].astype(mx.float32)
        mx.eval(logits)
        return [float(logit) for logit in np.array(logits)]

    def finish(self, logits: Sequence[float], prepared: Sequence[Prepared]) -> Scores:
        """Return what a request gets; any thread may call it."""
        for index, logit in enumerate(logits):
            if not np.isfinite(logit):
                raise EngineError(f"the score of document {index} is no finite number")
        return Scores(tuple(logits), tuple(len(each) for each in prepared))
