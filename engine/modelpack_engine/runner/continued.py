"""Continuations: the step that is expected after one whose graph drafts.

The host reads a head's draft together with the tokens, and the next step usually verifies it, or a
lookup, for the same sequences. What such a step reads is laid out here in a fraction of the time
that the host takes to schedule it and to lay out its batch. So `Replays` launches the expected step
first, and compares it with the scheduled one afterwards.

Its numbers depend on how many tokens the step before gives, but not on which. So `Expected` lays
out the step for each number of tokens of a lone sequence while the device still computes them.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Several
from dataclasses import dataclass
from itertools import accumulate
from typing import Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from modelpack_engine.core.block_manager import BlockManager
from modelpack_engine.core.block_pool import NULL_BLOCK
from modelpack_engine.core.buckets import Buckets
from modelpack_engine.core.sequence import Sequence
from modelpack_engine.runner.paged import Layout
from modelpack_engine.sampling.sampler import SampleRow


@dataclass(frozen=True, slots=True)
class Continued:
    """A sequence in the step that is expected next.

    Its newest token and the proposed ones have `count` rows from `row` on. Before the step, it gets
    `shift` tokens, which the host has not emitted.
    """

    sequence: Sequence
    row: int
    count: int
    shift: int

    @property
    def first(self) -> int:
        """The position of the first row."""
        return self.sequence.num_known_tokens + self.shift - 1

    @property
    def num_tokens(self) -> int:
        """The tokens for which the step needs slots."""
        return self.first + self.count

    def sample_rows(self) -> list[SampleRow]:
        """Return the rows that sample the tokens after each of the sequence's rows."""
        num_prompt = len(self.sequence.prompt_token_ids)
        first = len(self.sequence.output_token_ids) + self.shift
        return [
            SampleRow(self.sequence.seq_id, num_prompt + num_output, num_output, None, ())
            for num_output in range(first, first + self.count)
        ]


Step = TypeVar("Step")


class Expected(Generic[Step]):
    """The steps that may follow one that gives `sequences` up to `most` tokens each.

    `lay_out` returns a step without its tokens; None if there can be none. Usually, `num_drafted`
    tokens are proposed.
    """

    def __init__(
        self,
        sequences: Several[Sequence],
        most: Several[int],
        num_drafted: int,
        blocks: BlockManager,
        lay_out: Callable[[list[Continued]], Step | None],
    ) -> None:
        self._sequences, self._blocks, self._lay_out = sequences, blocks, lay_out
        self._known: dict[tuple[tuple[int, int], ...], Step | None] = {}
        # The numbers of several sequences have too many combinations, and a lookup that is longer
        # than a draft is probably followed by one as long.
        count = 1 + num_drafted
        if len(sequences) == 1 and most[0] <= count:
            for shift in range(1, most[0] + 1):
                if self._step(((shift, count),)) is None:
                    break

    def after(
        self, tokens: Several[list[int]], proposed: Several[list[int]]
    ) -> tuple[Step, list[list[int]]] | None:
        """Return the next step, and the tokens in its rows of each sequence.

        The host has read the last step's `tokens` and not emitted them, and `proposed` are the next
        proposals. None if a sequence ends, or if the step cannot be laid out.
        """
        for sequence, token_ids in zip(self._sequences, tokens, strict=True):
            params = sequence.params
            eos = () if params.ignore_eos else sequence.eos_token_ids
            if (
                sequence.is_finished
                or not token_ids
                or any(i < 0 or i in eos or i in params.stop_token_ids for i in token_ids)
            ):
                return None
        pairs = list(zip(tokens, proposed, strict=True))
        step = self._step(tuple((len(known), 1 + len(drafted)) for known, drafted in pairs))
        return None if step is None else (step, [[known[-1], *drafted] for known, drafted in pairs])

    def _step(self, sizes: tuple[tuple[int, int], ...]) -> Step | None:
        if sizes not in self._known:
            sequences = continued(self._sequences, sizes, self._blocks)
            self._known[sizes] = None if sequences is None else self._lay_out(sequences)
        return self._known[sizes]


def continued(
    sequences: Several[Sequence], sizes: Several[tuple[int, int]], blocks: BlockManager
) -> list[Continued] | None:
    """Return all sequences of a step in the expected next one, and allocate their blocks.

    `sizes` has the number of tokens that each gets, and of its rows then. None if a sequence ends,
    blocks are lacking, or tables lose their first blocks.
    """
    if blocks.releases_blocks:
        return None
    rows = accumulate((count for _, count in sizes), initial=0)
    found = [
        Continued(sequence, row, count, shift)
        for sequence, row, (shift, count) in zip(sequences, rows, sizes, strict=False)
    ]
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


def next_layout(
    sequences: Several[Continued], buckets: Buckets, block_size: int, *, proposes: bool = False
) -> tuple[Layout, int]:
    """Return the layout of a step of decode rows, and how many numbers its columns have.

    There are neither windows nor adapters nor rotations of pictures. Steps may have proposals if
    the runner `proposes`.
    """
    rows = buckets.pad_rows(sequences[-1].row + sequences[-1].count)
    longest = max(each.num_tokens for each in sequences)
    width = buckets.pad_table_width(-(-longest // block_size))
    alone = not proposes and all(each.count == 1 for each in sequences)
    return Layout(rows, rows, width, 0, 1, None, alone=alone), (3 + width) * rows


def write_rows(
    columns: NDArray[np.int32], layout: Layout, block_size: int, sequences: Several[Continued]
) -> None:
    """Write the columns of a step to zeros, int32."""
    positions, lengths, slots = columns[: 3 * layout.rows].reshape(3, layout.rows)
    tables = columns[3 * layout.rows :].reshape(layout.rows, layout.width)
    assert NULL_BLOCK == 0, "tables are zeros behind their blocks"
    for each in sequences:
        of_sequence = slice(each.row, each.row + each.count)
        of_rows = np.arange(each.first, each.num_tokens, dtype=np.int32)
        ends = of_rows // block_size  # index of each row's last block
        blocks = np.array(each.sequence.block_table[: int(ends[-1]) + 1], np.int32)
        positions[of_sequence] = of_rows
        slots[of_sequence] = blocks[ends] * block_size + of_rows % block_size
        for row, end in enumerate(ends.tolist(), each.row):
            tables[row, : end + 1] = blocks[: end + 1]
    lengths[:] = positions + 1
