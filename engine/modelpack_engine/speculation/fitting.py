"""What of the proposed tokens a step has room for. Plain integers."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Tokens
from typing import TYPE_CHECKING

from modelpack_engine.schedule import Proposal

if TYPE_CHECKING:
    from modelpack_engine.block_manager import BlockManager
    from modelpack_engine.schedule import SchedulerConfig
    from modelpack_engine.sequence import Sequence

#: What each sequence may go on with.
Proposed = Mapping["Sequence", Tokens[int]]


def fit_proposals(
    decode: list[Sequence],
    proposed: Proposed | None,
    config: SchedulerConfig,
    blocks: BlockManager,
) -> tuple[list[Sequence], list[Proposal]]:
    """Part the sequences that decode into those that do so alone, and those with a proposal.

    A proposal is cut to the rows of a step, to what its sequence may still generate, and to the
    blocks that are available: nobody is preempted for a guess.
    """
    if not proposed:
        return decode, []
    alone: list[Sequence] = []
    proposals: list[Proposal] = []
    rows = len(decode)
    for sequence in decode:
        token_ids = tuple(proposed.get(sequence, ()))
        # The step samples one token more than are proposed.
        token_ids = token_ids[: max(0, sequence.max_num_tokens - sequence.num_tokens - 1)]
        while token_ids and (
            config.buckets.pad_rows(rows + len(token_ids)) > config.max_num_batched_tokens
            or not blocks.grow(sequence, sequence.num_computed_tokens + 1 + len(token_ids))
        ):
            token_ids = token_ids[:-1]
        if token_ids:
            assert not sequence.num_inflight, "its newest token is not known"
            rows += len(token_ids)
            proposals.append(Proposal(sequence, token_ids))
        else:
            alone.append(sequence)
    return alone, proposals
