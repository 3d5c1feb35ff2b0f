"""Continuations: when the next step can be expected, and what room it gets."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest

from modelpack_engine.core.block_manager import BlockManager
from modelpack_engine.core.block_pool import NULL_BLOCK
from modelpack_engine.core.buckets import Buckets
from modelpack_engine.core.sequence import Sequence
from modelpack_engine.request import SamplingParams
from modelpack_engine.runner.continued import (
    Continued,
    Expected,
    continued,
    next_layout,
    write_rows,
)
from modelpack_engine.runner.paged import Layout
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
        pytest.param(Case(draft=(21, 22)), True, id="a shorter draft"),
        pytest.param(Case(draft=(21, 22, 23, 24, 25)), True, id="a longer draft"),
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

    def lay_out(sequences: list[Continued]) -> int:
        [each] = sequences
        laid_out[each.shift] = each
        return each.shift

    expected = Expected([made], [4], 3, blocks, lay_out)
    if case.num_blocks == Case.num_blocks and case.most == Case.most:
        assert list(laid_out) == [1, 2, 3, 4], "before the tokens are known"
    found = expected.after([list(case.tokens)], [list(case.draft)])
    assert (found is not None) == goes_on
    if found is None:
        assert made.block_table[: len(before)] == before
        return
    shift, token_ids = found
    each = laid_out[shift]
    assert shift == each.shift == len(case.tokens)
    assert (each.row, each.count) == (0, 1 + len(case.draft))
    assert token_ids == [[case.tokens[-1], *case.draft]]
    # The keys and values of all tokens but the last have slots after the step.
    assert len(made.block_table) >= blocks.blocks_for(8 + len(case.tokens) + len(case.draft))
    rows = each.sample_rows()
    count = 1 + len(case.draft)
    assert [row.num_output for row in rows] == [3 + len(case.tokens) + i for i in range(count)]
    assert [row.position - row.num_output for row in rows] == [5] * count


@pytest.mark.parametrize(
    ("most", "is_graph", "laid_out"), [(4, True, 4), (4, False, 1), (5, True, 0)]
)
def test_what_is_laid_out_before_the_tokens_are_known(
    most: int, is_graph: bool, laid_out: int
) -> None:
    """Nothing behind a lookup that is longer than a draft: another one will follow it."""
    blocks = BlockManager(20, SIZE)
    found: list[int] = []

    def lay_out(sequences: list[Continued]) -> int | None:
        found.append(sequences[0].shift)
        return 1 if is_graph else None

    Expected([sequence(Case(), blocks)], [most], 3, blocks, lay_out)
    assert found == list(range(1, laid_out + 1))


def test_no_sequence_gets_a_block_if_all_cannot() -> None:
    """Otherwise the token of one sequence could lack a block that another's proposal has."""
    blocks = BlockManager(8, SIZE)
    both = [sequence(Case(), blocks) for _ in range(2)]
    assert blocks.can_allocate(1)
    assert not blocks.can_allocate(2)
    before = [each.block_table.copy() for each in both]
    assert continued(both, [(2, 4), (2, 4)], blocks) is None
    assert [each.block_table for each in both] == before


def test_rows_follow_each_other() -> None:
    blocks = BlockManager(20, SIZE)
    both = [sequence(Case(), blocks) for _ in range(2)]
    found: list[list[Continued]] = []
    expected = Expected(both, [4, 3], 3, blocks, lambda each: found.append(each) or 1)
    assert found == [], "the numbers of tokens have too many combinations"
    after = expected.after([[11], [14, 15, 16]], [[21, 22, 23], [31, 32]])
    assert after == (1, [[11, 21, 22, 23], [16, 31, 32]])
    assert [(each.row, each.count, each.shift) for each in found[0]] == [(0, 4, 1), (4, 3, 3)]
    layout, count = next_layout(found[0], Buckets(rows=(8,), table_width=(4,)), SIZE)
    assert layout == Layout(8, 8, 4, 0, 1, None)
    buckets, single = Buckets(rows=(8,), table_width=(4,)), [replace(found[0][0], count=1)]
    assert next_layout(single, buckets, SIZE)[0].alone
    assert not next_layout(single, buckets, SIZE, proposes=True)[0].alone
    columns = np.zeros(count, np.int32)
    write_rows(columns, layout, SIZE, found[0])
    positions, lengths, slots = columns[:24].reshape(3, 8).tolist()
    assert positions == [8, 9, 10, 11, 10, 11, 12, 0]
    assert lengths == [9, 10, 11, 12, 11, 12, 13, 1]
    tables = columns[24:].reshape(8, 4)
    for row, position in enumerate(positions[:7]):
        blocks_of_row = both[row > 3].block_table[: position // SIZE + 1]
        assert tables[row].tolist() == blocks_of_row + [NULL_BLOCK] * (4 - len(blocks_of_row))
        assert slots[row] == blocks_of_row[-1] * SIZE + position % SIZE
    assert tables[7].tolist() == [NULL_BLOCK] * 4


def test_tables_that_lose_blocks() -> None:
    """The tables that were read would have blocks that are released with the tokens."""
    blocks = BlockManager(20, SIZE, window=8)
    made = sequence(Case(), blocks)
    assert continued([made], [(1, 4)], blocks) is None
