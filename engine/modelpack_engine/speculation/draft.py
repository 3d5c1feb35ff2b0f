"""DraftProposer: propose the tokens of a smaller model, for all sequences in one batch.

The draft model samples with the parameters and the random noise of the large model: the noise
depends only on the request's seed and the token's position. So both models choose the same token
wherever their distributions are similar, at any temperature (a Gumbel coupling: arXiv:2408.07978).
With independent noise, far fewer proposed tokens would be accepted.

The keys and values of accepted guesses are used. A recurrent draft model goes back to its state
before the guesses instead, and computes the accepted tokens again in the step for the newest one.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import Any

import mlx.core as mx

from modelpack_engine.core.batch import StepBatch, build_batch
from modelpack_engine.core.block_manager import BlockManager
from modelpack_engine.core.scheduler import PrefillChunk, Proposal, SchedulerOutput
from modelpack_engine.core.sequence import Sequence
from modelpack_engine.request import SamplingParams
from modelpack_engine.runner.model_runner import ModelRunner
from modelpack_engine.runner.paged import PagedRunner
from modelpack_engine.runner.step import count_equal, row_token_ids
from modelpack_engine.sampling.sampler import NO_TOKEN, Sampled, Sampler, SampleRow, gather_logprobs

# Up to this many tokens that the draft model has not computed are rows of a proposal, not a chunk.
_FEW_TOKENS = 8


def num_state_rows(num_tokens: int) -> int:
    """Return the states that a sequence has at most, with so many guesses at a time.

    They are those before its guesses and after each row of the step that computes what was missing.
    """
    return 1 + max(2, min(num_tokens + 1, _FEW_TOKENS))


@dataclass(slots=True, eq=False)
class _Draft:
    """The state of the draft model for `original`.

    `sequence` shares the original's tokens, and has its own blocks in the draft model's pool. The
    pool has the keys and values of its computed tokens, followed by those of `guessed`, except the
    last guess.
    """

    original: Sequence
    sequence: Sequence
    guessed: list[int] = field(default_factory=list)

    @property
    def num_missing(self) -> int:
        """The known tokens that the draft model has not computed."""
        return self.sequence.num_known_tokens - self.sequence.num_computed_tokens

    def settle(self) -> None:
        """Count the accepted guesses as computed tokens, which end before the newest token."""
        sequence = self.sequence
        start = sequence.num_computed_tokens
        known = sequence.token_ids(start, sequence.num_known_tokens)
        right = count_equal(self.guessed[:-1], known)
        self.guessed = []
        # The newest token is computed again in any case, for its logits.
        sequence.num_computed_tokens = min(start + right, sequence.num_known_tokens - 1)


class DraftProposer:
    """Proposes the tokens that `runner`'s draft model samples with the large model's `sampler`.

    `vocab_size` is the number of the large model's logits. `blocks` manages the runner's blocks. A
    step has at most `max_rows` rows. Sequences longer than `context_length` get no proposals. A
    proposal ends before the first token whose probability is below `min_probability`.
    """

    def __init__(
        self,
        runner: ModelRunner,
        sampler: Sampler,
        blocks: BlockManager,
        *,
        vocab_size: int,
        draft_vocab_size: int,
        context_length: int,
        max_rows: int,
        min_probability: float = 0.0,
    ) -> None:
        self._runner, self._sampler, self._blocks = runner, sampler, blocks
        self._vocab_size, self._draft_vocab_size = vocab_size, draft_vocab_size
        self._context_length, self._max_rows = context_length, max_rows
        self._least = math.log(min_probability) if min_probability > 0 else None
        #: The layers of a recurrent draft model, which have states; None for other models.
        self._recurrent = None
        if isinstance(runner, PagedRunner) and runner.adapted.states:
            self._recurrent = runner.adapted
        self._drafts: dict[int, _Draft] = {}  # by the original's seq_id, in order of use

    def expects(self, sequences: Iterable[Sequence]) -> bool:
        """Return True: the draft model can always propose."""
        return True

    def propose(self, lengths: Mapping[Sequence, int]) -> Mapping[Sequence, list[int]]:
        """Return the tokens that the draft model generates after each sequence.

        A prompt that the draft model has not computed takes it one or more steps; until then, the
        sequence gets no proposals.
        """
        opened = [self._open(sequence, length) for sequence, length in lengths.items()]
        drafts = [d for d in opened if d is not None and d.original.seq_id in self._drafts]
        try:
            return self._write(drafts, lengths) if drafts else {}
        except BaseException:
            self.release(list(self._drafts))
            if self._recurrent is not None:
                self._recurrent.reset()  # or the next step would compute the states of this one
            raise

    def close(self) -> None:
        """Restore the draft model's layers."""
        self._runner.undo()

    def release(self, seq_ids: Iterable[int]) -> None:
        """Free the blocks of sequences that ended or were preempted."""
        for seq_id in seq_ids:
            draft = self._drafts.pop(seq_id, None)
            if draft is not None:
                self._blocks.free(draft.sequence)
                self._runner.release([draft.sequence.seq_id])

    def _open(self, original: Sequence, length: int) -> _Draft | None:
        """Return a sequence's draft with blocks for `length` more tokens, or None."""
        if original.num_known_tokens + length > self._context_length:
            return None
        draft = self._drafts.pop(original.seq_id, None)
        if draft is not None and not self._settle(draft):
            self._drafts[original.seq_id] = draft
            self.release([original.seq_id])
            draft = None
        if draft is None:
            draft = _Draft(original, _shadow(original))
            self._blocks.share_prefix(draft.sequence)
        self._drafts[original.seq_id] = draft
        while not self._blocks.grow(draft.sequence, original.num_known_tokens + length):
            oldest = next(iter(self._drafts))
            self.release([oldest])
            if oldest == original.seq_id:
                return None
        return draft

    def _settle(self, draft: _Draft) -> bool:
        """Count accepted guesses, or go back before them; return whether the draft can go on."""
        if self._recurrent is None or not draft.guessed:
            draft.settle()
            return True
        self._recurrent.rows.go_back(draft.sequence.seq_id)
        draft.guessed = []
        return draft.num_missing > 0  # the state is that after all tokens, whose logits are gone

    # Steps of the draft model

    def _write(
        self, drafts: list[_Draft], lengths: Mapping[Sequence, int]
    ) -> Mapping[Sequence, list[int]]:
        output = self._catching_up(drafts)
        batch = build_batch(
            output,
            None,
            self._runner.buckets,
            self._blocks.block_size,
            proposals_as_rows=self._recurrent is not None,
        )
        logits = self._forward(batch, None)
        by_sequence = {draft.sequence: draft for draft in drafts}
        going = [by_sequence[sequence] for sequence in output.sampled]
        if not going:
            self._compute([])
            self._computed(output)
            return {}
        drawn = self._draw(logits[mx.array(_last_rows(output), mx.int32)], going, 0)
        steps = [(going, drawn)]
        self._computed(output)
        if self._recurrent is not None:
            for sequence in output.sampled:
                self._recurrent.rows.hold(sequence.seq_id)
        for sequence in output.sampled:
            sequence.num_inflight = 1
        try:
            for count in range(1, max(lengths[draft.original] for draft in going)):
                batch = replace(batch, sample_seqs=tuple(draft.sequence for draft in going))
                going = [draft for draft in going if lengths[draft.original] > count]
                batch, drawn = self._next(going, batch, drawn, count)
                steps.append((going, drawn))
        finally:
            for sequence in output.sampled:
                sequence.num_inflight = 0
                sequence.num_computed_tokens = sequence.num_known_tokens
        return self._read(steps)

    def _catching_up(self, drafts: list[_Draft]) -> SchedulerOutput:
        """Return the step that computes the tokens which the draft model has not computed."""
        decode, proposals, prefill = list[Sequence](), list[Proposal](), list[PrefillChunk]()
        rows, buckets = self._max_rows, self._runner.buckets
        for draft in sorted(drafts, key=lambda draft: draft.num_missing):
            sequence, missing = draft.sequence, draft.num_missing
            start, stop = sequence.num_computed_tokens, sequence.num_known_tokens
            has_no_state = self._recurrent is not None and start == 0
            if missing > _FEW_TOKENS or has_no_state:
                if length := buckets.fit_chunk(missing, rows):
                    prefill.append(PrefillChunk(sequence, start, length, length == missing))
                    rows -= buckets.pad_chunk(length)
            elif missing > 1 and missing <= rows:
                proposals.append(Proposal(sequence, tuple(sequence.token_ids(start + 1, stop))))
                rows -= missing
            elif missing == 1 and rows:
                decode.append(sequence)
                rows -= 1
        return SchedulerOutput(tuple(decode), tuple(prefill), tuple(proposals))

    def _computed(self, output: SchedulerOutput) -> None:
        """Count the tokens of the catching-up step as computed."""
        for proposal in output.proposals:  # its tokens are known
            self._runner.verified(proposal.sequence.seq_id, 1 + len(proposal.token_ids))
        ends = [(sequence, sequence.num_known_tokens) for sequence in output.decoding]
        ends += [(chunk.sequence, chunk.start + chunk.length) for chunk in output.prefill]
        for sequence, end in ends:
            sequence.num_computed_tokens = end
            self._blocks.publish_prefix(sequence)

    def _next(
        self, going: list[_Draft], batch: StepBatch, drawn: _Drawn, count: int
    ) -> tuple[StepBatch, _Drawn]:
        """Run a step on the tokens drawn last, and draw token number `count` of each proposal."""
        decode = tuple(draft.sequence for draft in going)
        batch = build_batch(
            SchedulerOutput(decode), batch, self._runner.buckets, self._blocks.block_size
        )
        logits = self._forward(batch, drawn.sampled)
        for sequence in decode:
            sequence.num_computed_tokens += 1
        return batch, self._draw(logits, going, count)

    def _forward(self, batch: StepBatch, previous: Sampled | None) -> mx.array:
        """Return the logits of the sampled rows, padded or cut to the large model's vocabulary."""
        token_ids = row_token_ids(batch, previous, self._runner.staging)
        # The large model may have more tokens than the draft model.
        token_ids = mx.where(token_ids < self._draft_vocab_size, token_ids, 0)
        logits = self._runner.forward(batch, token_ids)
        missing = self._vocab_size - logits.shape[-1]
        if missing > 0:
            logits = mx.pad(logits, [(0, 0), (0, missing)], constant_values=-math.inf)
        return logits[:, : self._vocab_size]

    def _draw(self, logits: mx.array, drafts: list[_Draft], count: int) -> _Drawn:
        """Draw tokens as the large model would at the same positions, and launch the step."""
        rows = []
        for draft in drafts:
            position = draft.original.num_known_tokens + count
            num_output = position - len(draft.original.prompt_token_ids)
            rows.append(SampleRow(draft.original.seq_id, position, num_output, assumed=()))
        sampled = self._sampler.sample(logits, rows)
        logprobs = None
        if self._least is not None:
            logprobs = gather_logprobs(logits, sampled.next_ids, 0).chosen
        drawn = _Drawn(sampled, logprobs)
        self._compute(drawn.arrays())
        return drawn

    def _compute(self, arrays: list[mx.array]) -> None:
        # Without in-place writes, launching before the step ends would copy the pools.
        evaluate = mx.async_eval if self._runner.writes_in_place else mx.eval
        evaluate(arrays, self._runner.pools())

    def _read(self, steps: list[tuple[list[_Draft], _Drawn]]) -> Mapping[Sequence, list[int]]:
        """Wait for the tokens; return the proposals, each cut at the first improbable token."""
        found: dict[Sequence, list[int]] = {}
        cut: set[Sequence] = set()
        for drafts, drawn in steps:
            token_ids: Any = drawn.sampled.token_ids.tolist()
            logprobs: Any = drawn.logprobs.tolist() if drawn.logprobs is not None else None
            for row, draft in enumerate(drafts):
                token_id = token_ids[row]
                draft.guessed.append(token_id)
                if token_id == NO_TOKEN and draft.original.seq_id in self._drafts:
                    # Its logits are NaN: zero its blocks before other sequences get them.
                    for blocks in self._blocks.withdraw(draft.sequence):
                        self._runner.scrub(blocks)
                    self.release([draft.original.seq_id])
                unsure = logprobs is not None and logprobs[row] < self._least
                if token_id == NO_TOKEN or unsure or draft.original in cut:
                    cut.add(draft.original)
                else:
                    found.setdefault(draft.original, []).append(token_id)
        return found


@dataclass(frozen=True, slots=True)
class _Drawn:
    """The tokens that a step drew, and their log-probabilities if `min_probability` needs them."""

    sampled: Sampled
    logprobs: mx.array | None

    def arrays(self) -> list[mx.array]:
        return [*self.sampled.arrays(), *([] if self.logprobs is None else [self.logprobs])]


def _shadow(original: Sequence) -> Sequence:
    """Return a sequence that shares the token lists of `original` and has blocks of its own."""
    sequence = Sequence(
        original.request_id,
        original.prompt_token_ids,
        SamplingParams(),
        cache_salt=original.cache_salt,
    )
    sequence.output_token_ids = original.output_token_ids
    sequence.num_prefill_tokens = original.num_known_tokens
    return sequence


def _last_rows(output: SchedulerOutput) -> list[int]:
    """Return the index of each sampled sequence's last sampled row."""
    lengths = [1] * len(output.decode)
    lengths += [1 + len(proposal.token_ids) for proposal in output.proposals]
    lengths += [1 for chunk in output.prefill if chunk.is_last]
    return [end - 1 for end in accumulate(lengths)]
