"""HeadWithLookup: propose by prompt lookup or by a drafting head, whichever pays in a sequence.

What was accepted is measured in each sequence, and what a step with drafts costs in each size of
batch: a head that saves less time than it takes pauses.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from collections.abc import Sequence as Tokens
from dataclasses import dataclass, field
from statistics import median
from typing import Protocol

import mlx.core as mx

from modelpack_engine.core.batch import StepBatch
from modelpack_engine.core.scheduler import SchedulerOutput
from modelpack_engine.core.sequence import Sequence
from modelpack_engine.runner.hidden_states import HiddenRows
from modelpack_engine.runner.replay import ReplayedTokens
from modelpack_engine.runner.step import count_equal
from modelpack_engine.speculation.eagle import EagleProposer
from modelpack_engine.speculation.head_runner import DraftWithin
from modelpack_engine.speculation.ngram import NgramProposer

# The weight of the newest draft in the average of its sequence and in that of all, and the drafts
# that the average of all stands for in a new sequence. Drafts differ, so few of them say little.
_NEWEST, _NEWEST_OF_ALL, _PRIOR = 1 / 16, 1 / 64, 4
# The share of its tokens that a head is expected to be right about before it is measured.
_FIRST_SHARE = 0.5
# With fewer accepted tokens per draft, a head costs more than it saves. The first number is for
# batches that are not measured yet, the second for noise in the measurements.
_LEAST_ACCEPTED, _LEAST_COST = 0.4, 0.1
# A head pauses for so many steps, after at least so many drafts.
_PAUSE, _FEWEST_DRAFTS = 64, 8
# Times are medians of this many steps, of which some include a compilation; of fewer at first.
_STEPS, _FEWEST_STEPS = 9, 4
# The steps of a size of batch that run without drafts, at first and after so many with drafts.
_PLAIN_STEPS, _PLAIN_EVERY = 5, 512


class StepTimes:
    """How long steps take that only decode, with and without drafts, by the size of the batch.

    Sizes with as many binary digits are measured together.
    """

    def __init__(self) -> None:
        self._seconds: dict[tuple[int, bool], deque[float]] = {}
        self._plain_left: dict[int, int] = {}  # by size: steps to run without drafts
        self._drafting: dict[int, int] = {}  # by size: steps with drafts since

    def observe(self, num_sequences: int, seconds: float | None, *, drafts: bool) -> None:
        """Count a step of `num_sequences` sequences; None for one that also computed prompts."""
        size = num_sequences.bit_length()
        if seconds is not None:
            self._seconds.setdefault((size, drafts), deque(maxlen=_STEPS)).append(seconds)
        if not drafts:
            self._plain_left[size] = max(0, self._plain_left.get(size, _PLAIN_STEPS) - 1)
            return
        self._drafting[size] = self._drafting.get(size, 0) + 1
        if self._drafting[size] >= _PLAIN_EVERY:
            self._drafting[size], self._plain_left[size] = 0, _PLAIN_STEPS

    def needs_plain_step(self, num_sequences: int) -> bool:
        """Return whether a batch of this size should run without drafts, to be measured."""
        return self._plain_left.get(num_sequences.bit_length(), _PLAIN_STEPS) > 0

    def least_accepted(self, num_sequences: int) -> float:
        """Return how many tokens per draft and sequence make up for the time of drafting."""
        size = num_sequences.bit_length()
        plain, drafting = (self._seconds.get((size, drafts), ()) for drafts in (False, True))
        if not plain or len(drafting) < _FEWEST_STEPS:
            return _LEAST_ACCEPTED
        return max(median(drafting) / median(plain) - 1, _LEAST_COST)


@dataclass(slots=True)
class _Score:
    """How many tokens of drafts were right in one sequence, on average."""

    head: float
    drafts: int = 0  # measured since the head last paused
    pause: int = 0
    start: int = 0  # the position of the last draft's first token
    drafted: list[int] = field(default_factory=list)

    def settle(self, sequence: Sequence) -> int | None:
        """Compare the last draft with the tokens that came; return how many were right."""
        known = sequence.token_ids(self.start, sequence.num_known_tokens)
        right = self._right(known)
        if right is not None:
            self.head = self._after(right)
            self.drafts += 1
        self.drafted = []
        self.start = sequence.num_known_tokens
        return right

    def expected_after(self, token_ids: list[int]) -> float:
        """Return what `head` will be once these tokens are known."""
        right = self._right(token_ids)
        return self.head if right is None else self._after(right)

    def _right(self, token_ids: list[int]) -> int | None:
        """Return how many tokens of the last draft were right; None without a draft or tokens."""
        return count_equal(self.drafted, token_ids) if self.drafted and token_ids else None

    def _after(self, right: int) -> float:
        """Return the average with one more draft, of which so many tokens were right."""
        weight = max(_NEWEST, 1 / (self.drafts + 1 + _PRIOR))
        return self.head + weight * (right - self.head)


class HeadProposer(Protocol):
    """A `Proposer` that drafts from the model's hidden states."""

    def expects(self, sequences: Iterable[Sequence]) -> bool:
        """Return whether it has hidden states of any of these sequences."""

    def record(self, output: SchedulerOutput, batch: StepBatch, hidden: HiddenRows) -> None:
        """Keep the hidden states of a step's rows; proposals may be rejected later."""

    def draft_behind(self, output: SchedulerOutput, sampled: mx.array) -> None:
        """Prepare to draft behind a step that is recorded, from its `sampled` tokens int32."""

    def launch(self) -> None:
        """Launch the draft behind the step, if one was prepared; the step is launched."""

    def propose(self, lengths: Mapping[Sequence, int]) -> Mapping[Sequence, list[int]]:
        """Return up to `lengths[sequence]` tokens for each sequence."""

    def release(self, seq_ids: Iterable[int]) -> None:
        """Drop the state of sequences that ended or were preempted."""


class HeadWithLookup:
    """Proposes by prompt lookup where it is expected to be right about more tokens than a head.

    What a lookup is worth depends on its match, what a head is worth on its drafts, which have up
    to `num_tokens` tokens.
    """

    def __init__(self, lookup: NgramProposer, head: HeadProposer, num_tokens: int) -> None:
        self._lookup, self.head = lookup, head
        #: The head, if its drafts may run within the graphs of steps.
        self._eagle = head if isinstance(head, EagleProposer) else None
        self._scores: dict[int, _Score] = {}  # by seq_id
        self._usual = _FIRST_SHARE * num_tokens  # how many tokens are right in all sequences
        self._times = StepTimes()
        self._batch = 1  # the sequences of the last step that go on
        self._drafted = False  # whether the last proposals have drafts
        self._mixed: SchedulerOutput | None = None  # a step without proposals whose graph drafts

    def expects(self, sequences: Iterable[Sequence]) -> bool:
        """Return whether any sequence has a match, or the head drafts or reads for it."""
        sequences = tuple(sequences)
        if self._eagle is not None and self._eagle.is_behind(sequences):
            return True
        if self._times.needs_plain_step(len(sequences)):
            return False
        drafting = [seq for seq in sequences if self._score(seq).pause == 0]
        return self._lookup.expects(sequences) or self.head.expects(drafting)

    def propose(self, lengths: Mapping[Sequence, int]) -> Mapping[Sequence, list[int]]:
        """Return the proposals of the method that does better in each sequence."""
        self._drafted = False
        if self._times.needs_plain_step(self._batch):
            self._read(lengths)
            return {}
        least = self._times.least_accepted(self._batch)
        for sequence in lengths:
            right = self._score(sequence).settle(sequence)
            if right is not None:
                self._usual += _NEWEST_OF_ALL * (right - self._usual)
        found = dict(self._lookup.propose(lengths))
        left = {}
        for sequence, most in lengths.items():
            score = self._score(sequence)
            if sequence in found and self._lookup.expected(sequence) >= score.head:
                continue
            if score.head < least and score.drafts >= _FEWEST_DRAFTS:
                score.pause, score.head, score.drafts = _PAUSE, least, 0
            if not score.pause:
                left[sequence] = most
        self._read(sequence for sequence in lengths if sequence not in left)
        drafts = self.head.propose(left) if left else {}
        for sequence, tokens in drafts.items():
            self._score(sequence).drafted = tokens
        self._drafted = bool(drafts)
        return {**found, **drafts}

    def record(
        self,
        output: SchedulerOutput,
        batch: StepBatch,
        hidden: HiddenRows,
        sampled: mx.array | None,
    ) -> None:
        """Keep the hidden states of a step's rows, and prepare to draft behind it if that pays.

        It does not where the last proposal was a lookup: the next one is likely to be, too.
        """
        self.head.record(output, batch, hidden)
        if sampled is not None and self._may_draft_behind(output):
            self.head.draft_behind(output, sampled)

    def draft_within(self, output: SchedulerOutput, batch: StepBatch) -> DraftWithin | None:
        """Return a draft in the graph of a step that is not built yet, if there can be one.

        Such a draft costs little, so there is one behind a lookup as well. While the head pauses,
        it only reads the step's rows.
        """
        if self._eagle is None:
            return None
        pauses = all(self._score(sequence).pause for sequence in output.sampled)
        plain = self._times.needs_plain_step(len(output.sampled))
        return self._eagle.draft_within(output, batch, drafts=not (pauses or plain))

    def drafts(self, output: SchedulerOutput, within: DraftWithin, tokens: ReplayedTokens) -> None:
        """Note that the draft of `draft_within` runs in the graph of these tokens."""
        assert self._eagle is not None
        self._eagle.drafts(output, within, tokens)
        if within.num_drafted and not output.proposals:
            self._mixed = output

    def next_proposals(
        self, sequences: Tokens[Sequence], tokens: Tokens[list[int]]
    ) -> list[list[int]] | None:
        """Return the likely next proposal of each sequence, whose last step's graph has a draft.

        The host has read the `tokens` of that step and not emitted them. None if a step without
        proposals is more likely.
        """
        if self._eagle is None or self._times.needs_plain_step(len(sequences)):
            return None
        if any(self._score(sequence).pause for sequence in sequences):
            return None
        found = self._eagle.next_drafts(sequences)
        if found is None:
            return None
        for index, (sequence, token_ids) in enumerate(zip(sequences, tokens, strict=True)):
            looked_up, expected = self._lookup.after(sequence, token_ids, len(sequences))
            if looked_up and expected >= self._score(sequence).expected_after(token_ids):
                found[index] = looked_up
        return found

    def _may_draft_behind(self, output: SchedulerOutput) -> bool:
        if output.prefill or not output.decoding:
            return False
        looked_up = any(not self._score(each.sequence).drafted for each in output.proposals)
        paused = any(self._score(sequence).pause for sequence in output.decoding)
        return not (looked_up or paused or self._times.needs_plain_step(len(output.decoding)))

    def stepped(self, output: SchedulerOutput, seconds: float) -> None:
        """Measure a step that took `seconds`, if either drafts or nothing were computed in it.

        Lookups are not measured, nor are graphs that draft without a proposal to verify.
        """
        for sequence in output.decoding:
            score = self._scores.get(sequence.seq_id)
            if score is not None and score.pause:
                score.pause -= 1
        self._batch = len(output.sampled) or 1
        if output is self._mixed:
            return
        drafts = bool(output.proposals)
        if output.decoding and drafts == self._drafted:
            measured = None if output.prefill else seconds
            self._times.observe(len(output.decoding), measured, drafts=drafts)

    def release(self, seq_ids: Iterable[int]) -> None:
        """Forget sequences that ended or were preempted."""
        for seq_id in seq_ids:
            self._scores.pop(seq_id, None)
        self._lookup.release(seq_ids)
        self.head.release(seq_ids)

    def _read(self, sequences: Iterable[Sequence]) -> None:
        if self._eagle is not None:
            self._eagle.read(sequences)

    def _score(self, sequence: Sequence) -> _Score:
        score = self._scores.get(sequence.seq_id)
        if score is None:
            score = _Score(self._usual, start=sequence.num_known_tokens)
            self._scores[sequence.seq_id] = score
        return score
