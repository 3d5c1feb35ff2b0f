"""Proposer: what guesses how sequences go on."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Protocol

from modelpack_engine.sequence import Sequence


class Proposer(Protocol):
    """Guesses tokens. A wrong guess costs time, and never changes an output."""

    def expects(self, sequences: Iterable[Sequence]) -> bool:
        """Return whether proposals are likely, by the tokens known so far; cheap.

        There may be a token in flight: to propose anything, the engine has to wait for it.
        """
        ...

    def propose(self, lengths: Mapping[Sequence, int]) -> Mapping[Sequence, list[int]]:
        """Return at most so many tokens for each sequence, none of which has tokens in flight."""
        ...

    def release(self, seq_ids: Iterable[int]) -> None:
        """Drop what is kept for sequences that ended or were preempted."""
        ...
