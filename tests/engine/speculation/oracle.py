"""A proposer that knows the outputs, and proposes wrong tokens at a given rate."""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping

from modelpack_engine.core.sequence import Sequence
from modelpack_engine.engine import Engine
from modelpack_engine.speculation.speculator import Speculator
from tests.engine.serving.tiny import VOCAB


class Oracle:
    """Proposes `answers`, the outputs by (request, choice), with the share `wrong` replaced."""

    def __init__(
        self,
        answers: Mapping[tuple[str, int], list[int]],
        *,
        seed: int = 0,
        wrong: float = 0.0,
        wrong_tokens: Iterable[int] = range(VOCAB),
        silent: float = 0.0,
    ) -> None:
        self.answers = answers
        self.wrong, self.silent = wrong, silent
        self.wrong_tokens = list(wrong_tokens)
        self.random = random.Random(seed)
        self.released: list[int] = []

    def expects(self, sequences: Iterable[Sequence]) -> bool:
        return self.random.random() >= self.silent

    def propose(self, lengths: Mapping[Sequence, int]) -> Mapping[Sequence, list[int]]:
        found = {}
        for sequence, length in lengths.items():
            assert sequence.num_inflight == 0
            assert length > 0
            if self.random.random() < self.silent:
                continue
            answer = self.answers.get((sequence.request_id, sequence.index), [])
            start = len(sequence.output_token_ids)
            guess = answer[start : start + length]
            guess += [self.random.choice(self.wrong_tokens)] * (length - len(guess))
            found[sequence] = [
                self.random.choice(self.wrong_tokens) if self.random.random() < self.wrong else t
                for t in guess
            ]
        return found

    def release(self, seq_ids: Iterable[int]) -> None:
        self.released += seq_ids


def speculate(engine: Engine, oracle: Oracle, num_tokens: int = 4, max_batch: int = 64) -> None:
    """Let `oracle` propose for the engine."""
    engine._speculator = Speculator(oracle, num_tokens=num_tokens, max_batch=max_batch)
