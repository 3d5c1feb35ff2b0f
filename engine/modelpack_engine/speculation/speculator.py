"""Speculator: when proposals are worth having, how long they are, and what became of them.

A proposal needs the newest token of its sequence, and whether it was right is known only once its
step has been read. So a step with proposals is built after the step before it has been read, and
the device waits for the host in between: nothing is built ahead. That, and rows that turn out to be
wrong, cost more the more sequences run, while there is less to gain, since a step of many rows is
worth its price anyway. Above `max_batch` sequences nothing is proposed.
"""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as Tokens
from dataclasses import replace

from modelpack_engine.outputs import EngineStats
from modelpack_engine.schedule import Proposal
from modelpack_engine.sequence import Sequence
from modelpack_engine.speculation.fitting import Proposed
from modelpack_engine.speculation.masks import MaskOf, can_look_ahead
from modelpack_engine.speculation.proposer import Proposer


class Speculator:
    """Asks a proposer for up to `num_tokens` tokens a sequence, while at most `max_batch` run."""

    def __init__(self, proposer: Proposer, *, num_tokens: int, max_batch: int) -> None:
        assert num_tokens > 0
        self.num_tokens = num_tokens
        self.max_batch = max_batch
        self.num_proposals = self.proposed_tokens = self.accepted_tokens = 0
        self._proposer = proposer
        self._lengths: dict[int, int] = {}  # by seq_id, how many tokens are proposed next

    @property
    def most_rows(self) -> int:
        """The most decode rows of a step with proposals."""
        return self.max_batch * (1 + self.num_tokens)

    def worth_waiting(self, sequences: Tokens[Sequence]) -> bool:
        """Return whether to wait for the tokens in flight of `sequences`, which decode."""
        return self._may(sequences) and self._proposer.expects(sequences)

    def propose(self, sequences: Tokens[Sequence], mask_of: MaskOf) -> Proposed:
        """Return proposals for some of `sequences`, which decode, with no token in flight.

        None for those whose masks cannot look ahead.
        """
        if not self._may(sequences):
            return {}
        lengths = {}
        for sequence in sequences:
            room = sequence.max_num_tokens - sequence.num_tokens - 1
            length = min(self._lengths.get(sequence.seq_id, self.num_tokens), room)
            if length > 0 and can_look_ahead(mask_of(sequence)):
                lengths[sequence] = length
        return self._proposer.propose(lengths) if lengths else {}

    def verified(self, proposal: Proposal, num_accepted: int, *, spoilt: bool = False) -> None:
        """Take note of how many tokens of a proposal were right.

        All of them: the next is longer. Else it is as long as what was right, and one more. After
        one that `spoilt` its step there is none.
        """
        proposed = len(proposal.token_ids)
        self.num_proposals += 1
        self.proposed_tokens += proposed
        self.accepted_tokens += num_accepted
        length = 2 * proposed if num_accepted == proposed else num_accepted + 1
        self._lengths[proposal.sequence.seq_id] = 0 if spoilt else min(length, self.num_tokens)

    def counted(self, stats: EngineStats) -> EngineStats:
        """Return `stats` with what was proposed since the start."""
        return replace(
            stats,
            num_proposals=self.num_proposals,
            proposed_tokens=self.proposed_tokens,
            accepted_tokens=self.accepted_tokens,
        )

    def release(self, seq_ids: Iterable[int]) -> None:
        """Forget sequences that ended or were preempted."""
        for seq_id in seq_ids:
            self._lengths.pop(seq_id, None)
        self._proposer.release(seq_ids)

    def _may(self, sequences: Tokens[Sequence]) -> bool:
        return 0 < len(sequences) <= self.max_batch
