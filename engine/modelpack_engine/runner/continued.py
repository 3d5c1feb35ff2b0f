"""Continuations: the step that is expected after one that verifies proposals.

The host reads a head's draft together with the tokens, and the next step usually verifies it for
the same sequences. `move_rows` derives the numbers of that step from the numbers of the step
before, in a fraction of the time that the host takes to schedule a step and to lay it out. So
`Replays` launches the expected step first, and compares it with the scheduled one afterwards.

Its numbers depend on how many tokens the step before gives, but not on which. So `Expected` lays
out the step for each number of tokens of a lone sequence while the device still computes them.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Several
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from modelpack_engine.core.block_manager import BlockManager
from modelpack_engine.core.scheduler import Proposal
from modelpack_engine.core.sequence import Sequence
from modelpack_engine.runner.paged import Layout
from modelpack_engine.sampling.sampler import SampleRow


@dataclass(frozen=True, slots=True)
class Continued:
    """A sequence of a step that verifies proposals, in the step that is expected next.

    Its newest token and the proposed ones have `count` rows from `row` on in both steps. Its
    positions move by `shift`, the number of tokens that it gets by the first one.
    """

    sequence: Sequence
    row: int
    count: int
    shift: int

    @property
    def num_tokens(self) -> int:
        """The tokens for which the expected step needs slots."""
        return self.sequence.num_known_tokens + self.shift + self.count - 1

    def sample_rows(self) -> list[SampleRow]:
        """Return the rows that sample the tokens after each of the sequence's rows."""
        num_prompt = len(self.sequence.prompt_token_ids)
        first = len(self.sequence.output_token_ids) + self.shift
        return [
            SampleRow(self.sequence.seq_id, num_prompt + num_output, num_output, None, ())
            for num_output in range(first, first + self.count)
        ]


#: Returns the numbers of the expected step, without its tokens; None if it is another one.
LayOut = Callable[[list[Continued]], NDArray[np.int32] | None]


class Expected:
    """The steps that may follow one that verifies `proposals`, as `lay_out` lays them out."""

    def __init__(self, proposals: Several[Proposal], blocks: BlockManager, lay_out: LayOut) -> None:
        self._proposals, self._blocks, self._lay_out = proposals, blocks, lay_out
        self._known: dict[tuple[int, ...], NDArray[np.int32] | None] = {}
        if len(proposals) == 1:  # the numbers of several sequences have too many combinations
            for shift in range(1, len(proposals[0].token_ids) + 2):
                self._numbers((shift,))

    def after(
        self, tokens: Several[list[int]], proposed: Several[list[int]]
    ) -> tuple[NDArray[np.int32], list[list[int]]] | None:
        """Return the numbers of the next step, and the tokens in its rows of each sequence.

        The host has read the step's `tokens` and not emitted them, and `proposed` are the next
        proposals. None if the next step will be another one: a sequence ends, or its proposal has
        another length.
        """
        for proposal, token_ids, drafted in zip(self._proposals, tokens, proposed, strict=True):
            sequence, params = proposal.sequence, proposal.sequence.params
            eos = () if params.ignore_eos else sequence.eos_token_ids
            if (
                sequence.is_finished
                or not token_ids
                or any(i < 0 or i in eos or i in params.stop_token_ids for i in token_ids)
                or len(drafted) != len(proposal.token_ids)
            ):
                return None
        numbers = self._numbers(tuple(map(len, tokens)))
        if numbers is None:
            return None
        return numbers, [
            [token_ids[-1], *drafted] for token_ids, drafted in zip(tokens, proposed, strict=True)
        ]

    def _numbers(self, shifts: tuple[int, ...]) -> NDArray[np.int32] | None:
        if shifts not in self._known:
            sequences = continued(self._proposals, shifts, self._blocks)
            self._known[shifts] = None if sequences is None else self._lay_out(sequences)
        return self._known[shifts]


def continued(
    proposals: Several[Proposal], shifts: Several[int], blocks: BlockManager
) -> list[Continued] | None:
    """Return the sequences of a step in the expected next one, and allocate their blocks.

    The step verifies one of `proposals` for each sequence, which gets as many tokens as `shifts`
    says. None if a sequence ends, blocks are lacking, or tables lose their first blocks.
    """
    if blocks.releases_blocks:
        return None
    found, row = [], 0
    for proposal, shift in zip(proposals, shifts, strict=True):
        count = 1 + len(proposal.token_ids)
        found.append(Continued(proposal.sequence, row, count, shift))
        row += count
    if any(each.num_tokens >= each.sequence.max_num_tokens for each in found):
        return None
    missing = sum(
        max(0, blocks.blocks_for(each.num_tokens) - len(each.sequence.block_table))
        for each in found
    )
    # Without room for all, one sequence's proposal could take the block of another one's token.
    if not blocks.can_allocate(missing):
        return None
    grown = all(blocks.grow(each.sequence, each.num_tokens) for each in found)
    return found if grown else None


def move_rows(
    numbers: NDArray[np.int32], layout: Layout, block_size: int, sequences: Several[Continued]
) -> bool:
    """Change the columns of a step of decode rows to those of the expected next step.

    Return False if that step has another layout.
    """
    if layout != Layout(layout.rows, layout.rows, layout.width, 0, 1, None):
        return False  # windows, segments, adapters or rotations of pictures
    positions, lengths, slots = numbers[: 3 * layout.rows].reshape(3, layout.rows)
    tables = numbers[3 * layout.rows : (3 + layout.width) * layout.rows]
    tables = tables.reshape(layout.rows, layout.width)
    for each in sequences:
        rows = slice(each.row, each.row + each.count)
        positions[rows] += each.shift
        lengths[rows] += each.shift
        ends = positions[rows] // block_size  # index of each row's last block
        if ends[-1] >= layout.width:
            return False
        blocks = np.array(each.sequence.block_table[: int(ends[-1]) + 1], np.int32)
        slots[rows] = blocks[ends] * block_size + positions[rows] % block_size
        for row, end in enumerate(ends.tolist(), each.row):
            tables[row, : end + 1] = blocks[: end + 1]
    return True
