"""The accepted tokens of a proposal, and the part of it that fits in a step."""

from __future__ import annotations

import pytest

from modelpack_engine.core.block_manager import BlockManager
from modelpack_engine.core.buckets import EXACT, Buckets
from modelpack_engine.core.scheduler import SchedulerConfig, fit_proposals
from modelpack_engine.core.sequence import Sequence
from modelpack_engine.request import SamplingParams
from modelpack_engine.runner.step import Verdict, verify

PADDED = Buckets(rows=(1, 2, 4, 8, 16), chunk=(2, 4))


@pytest.mark.parametrize(
    ("proposed", "drawn", "expected"),
    [
        ([1, 2], [1, 2, 3], Verdict(3)),
        ([1, 2], [1, 9, 3], Verdict(2)),
        ([1, 2], [9, 2, 3], Verdict(1)),  # equal tokens after a wrong one do not count
        ([1, 1], [9, 1, 1], Verdict(1)),
        ([1], [1, 1], Verdict(2)),
        ([1, 2], [1, -1, 3], Verdict(1, 1)),  # NaN after an accepted token: left to the next step
        ([1, 2], [1, 2, -1], Verdict(2, 2)),
        ([1, 2], [9, -1, -1], Verdict(1, 1)),  # NaN after a wrong token: only its slots matter
        ([1, 2], [9, 3, -1], Verdict(1, 2)),
        ([1, 2], [-1, -1, -1], Verdict(0, 0)),
        ([1, -1], [1, -1, 3], Verdict(1, 1)),
    ],
)
def test_a_token_counts_if_all_before_it_were_right(
    proposed: list[int], drawn: list[int], expected: Verdict
) -> None:
    assert verify(proposed, drawn, no_token=-1) == expected


def sequence(length: int, max_tokens: int = 50) -> Sequence:
    made = Sequence("r", list(range(length)), SamplingParams())
    made.max_num_tokens = length + max_tokens
    made.num_computed_tokens = length - 1
    return made


@pytest.mark.parametrize(
    ("buckets", "max_rows", "num_blocks", "max_tokens", "expected"),
    [
        (EXACT, 64, 99, 50, [5, 3, 0]),
        (EXACT, 8, 99, 50, [5, 0, 0]),  # three rows without proposals
        (EXACT, 9, 99, 50, [5, 1, 0]),
        (EXACT, 3, 99, 50, [0, 0, 0]),
        (PADDED, 16, 99, 50, [5, 3, 0]),
        (PADDED, 15, 99, 50, [5, 0, 0]),  # nine rows are padded to sixteen
        (PADDED, 4, 99, 50, [1, 0, 0]),
        (EXACT, 64, 99, 1, [0, 0, 0]),  # no proposal for the last token
        (EXACT, 64, 99, 3, [2, 2, 0]),
        (EXACT, 64, 4, 50, [2, 2, 0]),  # three blocks of four tokens
    ],
)
def test_proposals_are_cut_to_what_there_is_room_for(
    buckets: Buckets, max_rows: int, num_blocks: int, max_tokens: int, expected: list[int]
) -> None:
    sequences = [sequence(2, max_tokens) for _ in range(3)]
    blocks = BlockManager(num_blocks, 4)
    for one in sequences:
        assert blocks.grow(one, 2)
    config = SchedulerConfig(3, max_rows, 100, buckets=buckets)
    proposed = {sequences[0]: [1, 2, 3, 4, 5], sequences[1]: [6, 7, 8]}
    alone, proposals = fit_proposals(sequences, proposed, config, blocks)
    found = {proposal.sequence: list(proposal.token_ids) for proposal in proposals}
    assert [len(found.get(one, ())) for one in sequences] == expected
    assert set(alone) == {one for one in sequences if one not in found}
    for one, token_ids in found.items():
        assert token_ids == proposed[one][: len(token_ids)]
        assert len(one.block_table) * 4 >= 2 + len(token_ids)
    if num_blocks == 99:
        assert blocks.num_used == sum(len(one.block_table) for one in sequences)


def test_nothing_proposed_changes_nothing() -> None:
    sequences = [sequence(2)]
    config = SchedulerConfig(1, 8, 100)
    assert fit_proposals(sequences, None, config, BlockManager(2, 4)) == (sequences, [])
