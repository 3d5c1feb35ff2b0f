"""Continuations: when the next step can be expected, and what room it gets."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
from numpy.typing import NDArray

from modelpack_engine.core.block_manager import BlockManager
from modelpack_engine.core.scheduler import Proposal
from modelpack_engine.core.sequence import Sequence
from modelpack_engine.request import SamplingParams
from modelpack_engine.runner.continued import Continued, Expected, continued
from modelpack_engine.sampling.sampler import NO_TOKEN

SIZE, EOS = 4, 99


@dataclass(frozen=True)
class Case:
    """A sequence of 8 tokens with a proposal of 3, its `tokens` in the step, and its next draft."""

    tokens: tuple[int, ...] = (11, 12)
    draft: tuple[int, ...] = (21, 22, 23)
    most: int = 100
    ignore_eos: bool = False
    stop: tuple[int, ...] = ()
    num_blocks: int = 20


def sequence(case: Case, blocks: BlockManager) -> Sequence:
    params = SamplingParams(
        max_tokens=case.most, stop_token_ids=case.stop, ignore_eos=case.ignore_eos
    )
    made = Sequence("a", [1, 2, 3, 4, 5], params, eos_token_ids=frozenset({EOS}))
    made.max_num_tokens = 5 + case.most
    made.output_token_ids += [6, 7, 8]
    assert blocks.grow(made, 11)
    return made


@pytest.mark.parametrize(
    ("case", "goes_on"),
    [
        pytest.param(Case(), True, id="goes on"),
        pytest.param(Case(tokens=(11,)), True, id="no token accepted"),
        pytest.param(Case(tokens=(11, 12, 13, 14)), True, id="all accepted"),
        pytest.param(Case(draft=(21, 22)), False, id="a shorter draft"),
        pytest.param(Case(tokens=()), False, id="logits that are NaN"),
        pytest.param(Case(tokens=(NO_TOKEN,)), False, id="no token"),
        pytest.param(Case(tokens=(11, EOS)), False, id="the end"),
        pytest.param(Case(tokens=(11, EOS), ignore_eos=True), True, id="the end is ignored"),
        pytest.param(Case(tokens=(12, 11), stop=(12,)), False, id="a stop token"),
        pytest.param(Case(most=9), True, id="room for all tokens"),
        pytest.param(Case(most=8), False, id="room for fewer tokens"),
        pytest.param(Case(num_blocks=5), True, id="just enough blocks"),
        pytest.param(Case(num_blocks=4), False, id="blocks are lacking"),
    ],
)
def test_when_a_sequence_goes_on(case: Case, goes_on: bool) -> None:
    blocks = BlockManager(case.num_blocks, SIZE)
    made = sequence(case, blocks)
    before = made.block_table.copy()
    laid_out: dict[int, Continued] = {}

    def lay_out(sequences: list[Continued]) -> NDArray[np.int32]:
        [each] = sequences
        laid_out[each.shift] = each
        return np.array([each.shift], np.int32)

    expected = Expected([Proposal(made, (11, 12, 13))], blocks, lay_out)
    if case.num_blocks == Case.num_blocks and case.most == Case.most:
        assert list(laid_out) == [1, 2, 3, 4], "before the tokens are known"
    found = expected.after([list(case.tokens)], [list(case.draft)])
    assert (found is not None) == goes_on
    if found is None:
        assert made.block_table[: len(before)] == before
        return
    numbers, token_ids = found
    each = laid_out[len(case.tokens)]
    assert numbers.tolist() == [each.shift] == [len(case.tokens)]
    assert (each.row, each.count) == (0, 4)
    assert token_ids == [[case.tokens[-1], 21, 22, 23]]
    # The keys and values of all tokens but the last have slots after the step.
    assert len(made.block_table) >= blocks.blocks_for(8 + len(case.tokens) + 3)
    rows = each.sample_rows()
    assert [row.num_output for row in rows] == [3 + len(case.tokens) + i for i in range(4)]
    assert [row.position - row.num_output for row in rows] == [5] * 4


def test_no_sequence_gets_a_block_if_all_cannot() -> None:
    """Otherwise the token of one sequence could lack a block that another's proposal has."""
    blocks = BlockManager(8, SIZE)
    both = [sequence(Case(), blocks) for _ in range(2)]
    assert blocks.can_allocate(1)
    assert not blocks.can_allocate(2)
    proposals = [Proposal(each, (11, 12, 13)) for each in both]
    before = [each.block_table.copy() for each in both]
    assert continued(proposals, [2, 2], blocks) is None
    assert [each.block_table for each in both] == before


def test_rows_follow_each_other() -> None:
    blocks = BlockManager(20, SIZE)
    both = [sequence(Case(), blocks) for _ in range(2)]
    proposals = [Proposal(both[0], (11, 12, 13)), Proposal(both[1], (14, 15))]
    found: list[list[Continued]] = []
    expected = Expected(proposals, blocks, lambda each: found.append(each) or np.zeros(1, np.int32))
    assert found == [], "the numbers of tokens have too many combinations"
    after = expected.after([[11], [14, 15, 16]], [[21, 22, 23], [31, 32]])
    assert after is not None
    assert after[1] == [[11, 21, 22, 23], [16, 31, 32]]
    assert [(each.row, each.count, each.shift) for each in found[0]] == [(0, 4, 1), (4, 3, 3)]


def test_tables_that_lose_blocks() -> None:
    """The tables that were read would have blocks that are released with the tokens."""
    blocks = BlockManager(20, SIZE, window=8)
    made = sequence(Case(), blocks)
    assert continued([Proposal(made, (11, 12, 13))], [1], blocks) is None
