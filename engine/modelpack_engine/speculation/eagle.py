"""EagleProposer: propose tokens with an EAGLE-3 head or a model's own layer for multi-token
prediction, from the hidden states of the model's steps.

The head's input for a position is the model's hidden state there and the token after it. The engine
hands over the states of each step with `record`; the rows of rejected tokens are dropped with the
next proposal or step. The head drafts the most likely tokens, also for sampled requests.

On a GPU, a draft is part of the graph of the step whose rows it reads, or is launched right behind
it, with the tokens that are still on the device: the graph itself counts those that are accepted.
The host drafts again only for rows that it had kept, such as those of prompts that MLX computed.

A prefix from the prefix cache has no hidden states, so the head does not see it; its positions
count.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple, cast

import mlx.core as mx

from modelpack_engine.core.batch import StepBatch
from modelpack_engine.core.buckets import round_up
from modelpack_engine.core.scheduler import SchedulerOutput
from modelpack_engine.core.sequence import Sequence
from modelpack_engine.layers.kernels import take
from modelpack_engine.models.eagle import EagleHead
from modelpack_engine.models.mtp import MtpHead
from modelpack_engine.runner.hidden_states import HiddenRows, recorded_rows
from modelpack_engine.runner.replay import ReplayedTokens
from modelpack_engine.sampling.delivery import Outbox
from modelpack_engine.speculation.head_runner import (
    DraftWithin,
    HeadDraft,
    HeadRunner,
    Rows,
    padded,
)

# The rows that the head computes at a time while it reads a prompt.
_CHUNKS = (16, 64, 256)
# After so many steps by MLX, no graph is expected: a few are needed until a shape is recorded.
_STEPS_TO_GRAPH = 8


class _Drafted(NamedTuple):
    """The tokens that a head drafted for a sequence, and their probabilities if they are wanted."""

    token_ids: list[int]
    probabilities: list[float]


class _Launched:
    """A draft on its way to the host."""

    def __init__(self, draft: HeadDraft) -> None:
        self._draft = draft
        self._rows: list[list[int]] | None = None
        self._probabilities: list[list[float]] = []

    def read(self, index: int) -> tuple[int, _Drafted]:
        """Wait for the draft; return the number of rows that it read and what it drafted."""
        if self._rows is None:
            found, probabilities, delivery = self._draft
            if delivery is None:
                flat = cast("list[int]", found.reshape(-1).tolist())
            else:
                flat = delivery.read()
            width = found.shape[1]
            self._rows = [flat[at : at + width] for at in range(0, len(flat), width)]
            if probabilities is not None:
                self._probabilities = cast("list[list[float]]", probabilities.tolist())
        count, *token_ids = self._rows[index]
        probabilities_of = self._probabilities[index] if self._probabilities else []
        return count, _Drafted(token_ids, probabilities_of)


class _Replayed:
    """A draft in the graph of a step, on its way to the host; like `_Launched`."""

    def __init__(self, tokens: ReplayedTokens, width: int) -> None:
        self._tokens, self._width = tokens, width
        self._found: list[int] = []

    def read(self, index: int) -> tuple[int, _Drafted]:
        """Wait for the draft; return the number of rows that it read and what it drafted."""
        self._found = self._found or self._tokens.drafted()
        first = index * self._width
        count, *token_ids = self._found[first : first + self._width]
        return count, _Drafted(token_ids, [])


@dataclass(slots=True, eq=False)
class _Followed:
    """The head's state for one sequence: `length` rows in its region, and states to read.

    `pending` has pairs of the position of the first row and the states [rows, hidden]. `ahead` is a
    draft that was launched behind a step: the position of the step's first row, the sequence's
    index in the draft, the draft, and the number of rows. `length` does not count these yet. There
    is no draft if the head only reads the step's rows.
    """

    region: int
    length: int = 0
    pending: list[tuple[int, mx.array]] = field(default_factory=list)
    ahead: tuple[int, int, _Launched | _Replayed | None, int] | None = None

    def settle(self, position: int) -> tuple[int, int, _Launched | _Replayed | None] | None:
        """Count the rows that were accepted of a draft ahead: those before `position`.

        Return their number, the sequence's index in the draft, and the draft; None without one.
        """
        if self.ahead is None:
            return None
        (start, index, launched, rows), self.ahead = self.ahead, None
        count = min(max(position - start, 0), rows)
        self.length += count
        return count, index, launched

    def add(self, start: int, rows: mx.array) -> None:
        """Keep the states of rows from position `start` on, in place of rejected rows there."""
        while self.pending and self.pending[-1][0] >= start:
            self.pending.pop()
        if self.pending:
            first, before = self.pending[-1]
            if first + len(before) > start:
                self.pending[-1] = first, before[: start - first]
        self.pending.append((start, rows))

    def take(self, known: int) -> tuple[list[int], mx.array] | None:
        """Return positions and states of the rows whose next token is known; forget all rows."""
        positions: list[int] = []
        states: list[mx.array] = []
        for start, rows in self.pending:
            count = min(len(rows), known - 1 - start)
            if count > 0:
                positions += range(start, start + count)
                states.append(rows[:count])
        self.pending = []
        if not states:
            return None
        return positions, states[0] if len(states) == 1 else mx.concatenate(states)


class EagleProposer:
    """Proposes the `num_tokens` tokens that `head` drafts, for up to `max_sequences` sequences.

    Sequences have up to `max_tokens`. `embed` are the model's embeddings, for heads without their
    own. A proposal ends before the first token whose probability is below `min_probability`. Steps
    have up to `most_proposed` proposed tokens of a sequence. With `ahead`, drafts may be launched
    behind steps.
    """

    def __init__(
        self,
        head: EagleHead | MtpHead,
        embed: Callable[[mx.array], mx.array],
        *,
        num_tokens: int,
        max_sequences: int,
        max_tokens: int,
        min_probability: float = 0.0,
        most_proposed: int = 0,
        ahead: bool = False,
    ) -> None:
        self._runner = HeadRunner(
            head,
            embed,
            num_tokens=num_tokens,
            max_tokens=max_tokens + _CHUNKS[-1],
            probabilities=min_probability > 0,
        )
        self._max_sequences = max_sequences
        #: The rows that the first part of a draft has: those after a proposal that is accepted.
        self._rows = num_tokens + 1
        self._least = min_probability
        self._ahead, self._outbox = ahead, Outbox()
        # The rows of a sequence that a draft reads at first; few, as each has graphs of its own.
        self._sizes = sorted({1, num_tokens + 1, max(num_tokens, most_proposed) + 1})
        self._next: tuple[dict[int, Rows], mx.array] | None = None
        self._drafts: dict[int, _Followed] = {}  # by seq_id
        self._regions = list(range(max_sequences))  # that are free, as a heap
        self._by_mlx = _STEPS_TO_GRAPH + 1  # decoding steps since the last graph that read rows

    def warm_up(self) -> None:
        """Compile the drafts of one sequence; those of several are compiled when they come."""
        self._runner.warm_up(_CHUNKS, self._sizes)

    def expects(self, sequences: Iterable[Sequence]) -> bool:
        """Return whether the head has read any of these sequences."""
        return any(sequence.seq_id in self._drafts for sequence in sequences)

    def record(self, output: SchedulerOutput, batch: StepBatch, hidden: HiddenRows) -> None:
        """Keep the hidden states of a step's rows; proposals may be rejected later."""
        self._next = None  # left by a step that was not launched
        if output.decoding:
            self._by_mlx += 1
        parts = recorded_rows(output, batch)
        if len(output.decoding) > self._max_sequences:
            parts = parts[len(output.decoding) :]
        for sequence, row, count in parts:
            draft = self._follow(sequence)
            if draft is not None:
                draft.settle(batch.positions[row])
                draft.add(batch.positions[row], hidden.cut(row, count))

    def _follow(self, sequence: Sequence) -> _Followed | None:
        """Return the head's state for a sequence; None if there are too many others."""
        draft = self._drafts.get(sequence.seq_id)
        if draft is None and len(self._drafts) < self._max_sequences:
            draft = self._drafts[sequence.seq_id] = _Followed(heapq.heappop(self._regions))
        return draft

    def draft_behind(self, output: SchedulerOutput, sampled: mx.array) -> None:
        """Draft from the rows of a step that is recorded and not launched, if all can be.

        `sampled` int32 are the tokens of its sampled rows, without those of prompts. `launch` is to
        be called once the step is launched.
        """
        if not self._ahead:
            return
        proposed = {each.sequence: each.token_ids for each in output.proposals}
        rows = {}
        for sequence in output.decoding:
            token_ids = proposed.get(sequence, ())
            draft, count = self._drafts.get(sequence.seq_id), 1 + len(token_ids)
            if draft is None or [len(states) for _, states in draft.pending] != [count]:
                return  # the head does not follow this sequence, or has to catch up first
            [(start, states)] = draft.pending
            positions = list(range(start, start + count))
            rows[sequence.seq_id] = Rows(draft.region, draft.length, positions, states, token_ids)
        if rows and max(len(each.positions) for each in rows.values()) <= self._sizes[-1]:
            self._next = rows, sampled

    def draft_within(
        self, output: SchedulerOutput, batch: StepBatch, *, drafts: bool
    ) -> DraftWithin | None:
        """Return a draft in the graph of a step that is not built yet, if there can be one.

        The head must have read all rows before the step. Without `drafts`, it only reads its rows.
        A prompt must be alone in the step, with its last row.
        """
        is_prompt = not output.decoding and len(output.prefill) == 1 == len(output.sampled)
        if not self._ahead or (output.prefill and not is_prompt):
            return None
        proposed = {each.sequence: each.token_ids for each in output.proposals}
        rows, firsts = [], []
        for sequence, row, count in recorded_rows(output, batch):
            draft = self._follow(sequence) if is_prompt else self._drafts.get(sequence.seq_id)
            if draft is None:
                return None
            start = batch.positions[row]
            draft.settle(start)
            if draft.pending:
                return None
            positions = list(range(start, start + count))
            token_ids = proposed.get(sequence, ())
            if is_prompt:
                token_ids = tuple(sequence.token_ids(start + 1, start + count))
            rows.append(Rows(draft.region, draft.length, positions, None, token_ids))
            firsts.append(row)
        if not rows:
            return None
        return self._runner.within(rows, firsts, batch.num_rows, drafts=drafts, prompt=is_prompt)

    def drafts(self, output: SchedulerOutput, within: DraftWithin, tokens: ReplayedTokens) -> None:
        """Note that the draft of `draft_within` runs in the graph of these tokens."""
        self._by_mlx = 0
        launched = _Replayed(tokens, 1 + within.num_drafted) if within.num_drafted else None
        for index, (sequence, rows) in enumerate(zip(output.sampled, within.rows, strict=True)):
            first, count = rows.positions[0], len(rows.positions)
            self._drafts[sequence.seq_id].ahead = first, index, launched, count

    def next_drafts(self, sequences: Iterable[Sequence]) -> list[list[int]] | None:
        """Return the next proposal of each sequence, drafted in the graph of its last step.

        None if the graph drafted none for one of them.
        """
        found = []
        for sequence in sequences:
            draft = self._drafts.get(sequence.seq_id)
            if draft is None or draft.ahead is None:
                return None
            _, index, launched, _ = draft.ahead
            if not isinstance(launched, _Replayed):
                return None
            found.append(launched.read(index)[1].token_ids)
        return found

    def launch(self) -> None:
        """Launch the draft of `draft_behind`, behind the step that was launched."""
        if self._next is None:
            return
        (rows, sampled), self._next = self._next, None
        counts = [len(each.positions) for each in rows.values()]
        size = next(size for size in self._sizes if size >= max(counts))
        if set(counts) == {size}:
            ids = sampled[: size * len(rows)]
        else:
            firsts = itertools.accumulate(counts, initial=0)
            at = [
                padded(list(range(first, first + count)), size)
                for first, count in zip(firsts, counts, strict=False)
            ]
            ids = take(sampled, mx.array(at, mx.int32).reshape(-1))
        ids = ids.reshape(len(rows), size)
        launched: _Launched | _Replayed
        launched = _Launched(self._runner.draft(list(rows.values()), ids, self._outbox))
        for index, (seq_id, each) in enumerate(rows.items()):
            draft = self._drafts[seq_id]
            draft.pending, draft.ahead = (
                [],
                (each.positions[0], index, launched, len(each.positions)),
            )

    def propose(self, lengths: Mapping[Sequence, int]) -> Mapping[Sequence, list[int]]:
        """Return the tokens that the head drafts after each sequence."""
        found: dict[Sequence, _Drafted] = {}
        going: dict[Sequence, Rows] = {}
        for sequence in lengths:
            draft = self._drafts.get(sequence.seq_id)
            if draft is None:
                continue
            settled = draft.settle(sequence.num_known_tokens - 1)
            if settled is not None:
                count, index, launched = settled
                if launched is None:
                    continue
                read, drafted = launched.read(index)
                if read == count:  # not after logits that are NaN
                    found[sequence] = drafted
            elif self._next_step_drafts:
                self._read(sequence, draft)
            elif (taken := draft.take(sequence.num_known_tokens)) is not None:
                going[sequence] = self._catch_up(sequence, draft, *taken)
        if going:
            after = [padded(_next_tokens(s, r.positions), self._rows) for s, r in going.items()]
            launched = _Launched(
                self._runner.draft(list(going.values()), mx.array(after, mx.int32))
            )
            for index, (sequence, rows) in enumerate(going.items()):
                self._drafts[sequence.seq_id].length += len(rows.positions)
                found[sequence] = launched.read(index)[1]
        proposals = {}
        for sequence, (token_ids, probabilities) in found.items():
            count = lengths[sequence]
            unsure = (p < self._least for p in probabilities)
            count = min(count, next((n for n, below in enumerate(unsure) if below), count))
            if count:
                proposals[sequence] = token_ids[:count]
        return proposals

    def is_behind(self, sequences: Iterable[Sequence]) -> bool:
        """Return whether steps could be graphs if the head had read all rows: `read` does that."""
        if self._by_mlx > _STEPS_TO_GRAPH:
            return False
        found = (self._drafts.get(sequence.seq_id) for sequence in sequences)
        return any(draft is not None and draft.pending for draft in found)

    def read(self, sequences: Iterable[Sequence]) -> None:
        """Read the rows of these sequences, which do not draft now, if steps could be graphs."""
        if self._by_mlx > _STEPS_TO_GRAPH:
            return
        for sequence in sequences:
            draft = self._drafts.get(sequence.seq_id)
            if draft is not None and draft.pending:
                self._read(sequence, draft)

    def _read(self, sequence: Sequence, draft: _Followed) -> None:
        taken = draft.take(sequence.num_known_tokens)
        if taken is not None:
            rows = self._catch_up(sequence, draft, *taken)
            self._runner.read(rows, _next_tokens(sequence, rows.positions), self._rows)
            draft.length += len(rows.positions)

    @property
    def _next_step_drafts(self) -> bool:
        """Whether the graph of the next step will draft, before a draft by MLX would be there."""
        return self._by_mlx == 0

    def release(self, seq_ids: Iterable[int]) -> None:
        """Drop the state of sequences that ended or were preempted."""
        for seq_id in seq_ids:
            draft = self._drafts.pop(seq_id, None)
            if draft is not None:
                heapq.heappush(self._regions, draft.region)
                if not self._drafts:
                    self._runner.clear()

    def _catch_up(
        self, sequence: Sequence, draft: _Followed, positions: list[int], states: mx.array
    ) -> Rows:
        """Let the head read all rows but the last few, and return these."""
        self._runner.reserve(draft.region + 1, draft.length + len(positions))
        while len(positions) > self._rows:
            count = min(len(positions) - self._rows, _CHUNKS[-1])
            ids = _next_tokens(sequence, positions[:count])
            rows = Rows(draft.region, draft.length, positions[:count], states[:count])
            self._runner.read(rows, ids, round_up(count, _CHUNKS))
            draft.length += count
            positions, states = positions[count:], states[count:]
        proposed = tuple(_next_tokens(sequence, positions)[:-1])
        return Rows(draft.region, draft.length, positions, states, proposed)


def _next_tokens(sequence: Sequence, positions: list[int]) -> list[int]:
    """Return the token after each position; positions ascend."""
    first = positions[0] + 1
    tokens = sequence.token_ids(first, positions[-1] + 2)
    return [tokens[position + 1 - first] for position in positions]
