"""The phases of a step (ScheduledStep, LaunchedStep, StepResult), and the functions between them.

A step that verifies proposals has a row for each proposed token. The sampler draws a token from the
logits, the request's seed and the token's position. In the rows of a proposal it therefore draws
the tokens that it would draw one step at a time, as long as the proposed tokens equal the drawn
ones. A proposed token is accepted if it equals the drawn token: speculation never changes an
output. Methods that only keep the distribution of the output do not guarantee that.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Tokens
from dataclasses import dataclass, replace
from itertools import chain, takewhile
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from modelpack_engine.core.batch import StepBatch, same_rows
from modelpack_engine.core.scheduler import Proposal, SchedulerOutput
from modelpack_engine.core.sequence import Sequence
from modelpack_engine.errors import EngineError
from modelpack_engine.layers.kernels import take
from modelpack_engine.outputs import TokenLogprob
from modelpack_engine.platform.device import Staging
from modelpack_engine.request import CopyableMask, LogitsMask
from modelpack_engine.runner.replay import ReplayedTokens
from modelpack_engine.sampling.sampler import (
    NO_TOKEN,
    Logprobs,
    Sampled,
    SampleRow,
    gather_logprobs,
)


@dataclass(frozen=True, slots=True)
class Verdict:
    """The result for one proposal: its first `num_tokens` drawn tokens are output.

    The last of these was not proposed. `broken` is the first row whose logits were NaN, if any: the
    keys and values of that row and those after it may be NaN too, and must be zeroed.
    """

    num_tokens: int
    broken: int | None = None


def verify(proposed: Tokens[int], drawn: Tokens[int], *, no_token: int) -> Verdict:
    """Return how many of the tokens `drawn` in the rows of a proposal are output.

    There is a row for the sequence's newest token and for each proposed token. A row in which no
    token could be drawn is left to the next step, where it comes first. If that happens in the
    first row, a proposed token may be the cause: masked values are multiplied by zero, and zero
    times NaN is NaN.
    """
    assert len(drawn) == len(proposed) + 1, "one row for the newest and for each proposed token"
    if drawn[0] == no_token:
        return Verdict(0, 0)
    count = 1
    for guess, token_id in zip(proposed, drawn, strict=False):
        if guess != token_id or drawn[count] == no_token:
            break
        count += 1
    broken = next((row for row in range(1, len(drawn)) if drawn[row] == no_token), None)
    return Verdict(count, broken)


def count_equal(guessed: Tokens[int], known: Tokens[int]) -> int:
    """Return how many tokens at the start of both are equal."""
    pairs = zip(guessed, known, strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


@dataclass(frozen=True, slots=True)
class ScheduledStep:
    """A scheduled step whose graph is built and not yet launched.

    `sampled` is None if no row is sampled, or if masks need the tokens of the previous step:
    `masked_logits` are then sampled after the launch. `staging_step` is the step's number in
    `Staging`.
    """

    output: SchedulerOutput
    batch: StepBatch
    sampled: Sampled | ReplayedTokens | None
    masked_logits: mx.array | None
    prompt_logprobs: Logprobs | None
    staging_step: int

    def arrays(self) -> list[mx.array]:
        """Return the arrays to evaluate together with the pools that the step writes."""
        parts = (self.sampled, self.prompt_logprobs)
        arrays = [array for part in parts if part is not None for array in part.arrays()]
        return arrays if self.masked_logits is None else [*arrays, self.masked_logits]


@dataclass(frozen=True, slots=True)
class LaunchedStep:
    """A step that the device is computing; `sampled` is None if no row is sampled."""

    output: SchedulerOutput
    batch: StepBatch
    sampled: Sampled | ReplayedTokens | None
    prompt_logprobs: Logprobs | None
    staging_step: int = 0


class NextToken(NamedTuple):
    """A token that the host has read, with its log-probability if requested."""

    token_id: int
    logprob: TokenLogprob | None


@dataclass(frozen=True, slots=True)
class StepResult:
    """The output tokens of each sampled sequence of a step.

    A sequence has no tokens if its proposal made the logits NaN. `broken_slots` hold the keys and
    values of rejected rows, which may be NaN, for each group of layers. `prompt_logprobs` has the
    next entries of each prompt whose log-probabilities were requested.
    """

    output: SchedulerOutput
    tokens: list[list[NextToken]]
    broken_slots: list[list[int]]
    prompt_logprobs: list[tuple[Sequence, TokenLogprob | None]]

    def verified(self) -> list[tuple[Proposal, list[NextToken]]]:
        """Return each proposal of the step with the output tokens of its sequence."""
        first, proposals = len(self.output.decode), self.output.proposals
        tokens = self.tokens[first : first + len(proposals)]
        return list(zip(proposals, tokens, strict=True))


def sample_rows(output: SchedulerOutput) -> list[SampleRow]:
    """Return the rows that sample a step's tokens, in the order of its batch."""
    rows = []
    for sequence in output.decode:  # without calls: they are most rows of most steps
        num_output = len(sequence.output_token_ids) + sequence.num_inflight
        position = len(sequence.prompt_token_ids) + num_output
        rows.append(SampleRow(sequence.seq_id, position, num_output))
    for proposal in output.proposals:
        rows += [
            _sample_row(proposal.sequence, proposal.token_ids[:count])
            for count in range(len(proposal.token_ids) + 1)
        ]
    return rows + [_sample_row(chunk.sequence) for chunk in output.prefill if chunk.is_last]


def _sample_row(sequence: Sequence, assumed: tuple[int, ...] | None = None) -> SampleRow:
    """Return the row that samples the token after the newest one, or after the `assumed` tokens."""
    num_output = sequence.num_output_tokens + len(assumed or ())
    position = len(sequence.prompt_token_ids) + num_output
    return SampleRow(sequence.seq_id, position, num_output, None, assumed)


def row_token_ids(
    batch: StepBatch, previous: Sampled | ReplayedTokens | None, staging: Staging
) -> mx.array:
    """Return the token ids of the rows, int32 [rows]; those from `previous` stay on the device."""
    if not batch.from_previous:
        return staging.put(np.array(batch.token_ids, np.int32))[: batch.num_rows]
    assert previous is not None
    # A row whose sampling failed continues with an arbitrary id until the host reads the failure.
    sampled = previous.next_ids
    count, num_known = batch.num_rows, len(batch.from_previous)
    if batch.from_previous is same_rows(num_known) and not batch.chunks and count <= sampled.size:
        return sampled[:count]  # rows after them are padding: any id is right
    numbers = np.fromiter(chain.from_iterable(batch.from_previous), np.int32, 2 * num_known)
    rows, indices = numbers[::2], numbers[1::2]
    if num_known == count <= sampled.size and np.array_equal(rows, indices):
        return sampled[:count]
    places = np.arange(count, dtype=np.int32)
    places[rows] = count + indices
    known = staging.put(np.concatenate([np.array(batch.token_ids, np.int32), places]))
    return take(mx.concatenate([known[:count], sampled]), known[count : 2 * count])


def with_prompt_rows(batch: StepBatch) -> StepBatch:
    """Return the batch with its prompt log-probability rows added to the sampled rows."""
    if not batch.prompt_logprob_rows:
        return batch
    return replace(batch, sample_rows=batch.sample_rows + batch.prompt_logprob_rows)


def next_prompt_tokens(batch: StepBatch) -> list[int]:
    """Return the prompt token that follows each prompt log-probability row."""
    return [
        sequence.prompt_token_ids[batch.positions[row] + 1]
        for row, sequence in zip(batch.prompt_logprob_rows, batch.prompt_logprob_seqs, strict=True)
    ]


def split_logits(batch: StepBatch, logits: mx.array) -> tuple[mx.array, Logprobs | None]:
    """Return the logits of the sampled rows, and the log-probabilities of the prompt rows."""
    if not batch.prompt_logprob_rows:
        return logits, None
    count = len(batch.sample_rows)
    wanted = logits[count : count + len(batch.prompt_logprob_rows)]
    num_top = max(sequence.params.prompt_logprobs or 0 for sequence in batch.prompt_logprob_seqs)
    token_ids = mx.array(next_prompt_tokens(batch), mx.int32)
    return logits[:count], gather_logprobs(wanted, token_ids, num_top)


def read_step(step: LaunchedStep) -> StepResult:
    """Wait for a step; return its tokens, with the log-probabilities that were requested."""
    tokens, broken_slots = _read_tokens(step)
    prompt_logprobs: list[tuple[Sequence, TokenLogprob | None]] = []
    if step.prompt_logprobs is not None:
        sequences = step.batch.prompt_logprob_seqs
        wanted = [sequence.params.prompt_logprobs for sequence in sequences]
        entries = step.prompt_logprobs.read(next_prompt_tokens(step.batch), wanted)
        prompt_logprobs = list(zip(sequences, entries, strict=True))
    return StepResult(step.output, tokens, broken_slots, prompt_logprobs)


def _read_tokens(step: LaunchedStep) -> tuple[list[list[NextToken]], list[list[int]]]:
    """Return the output tokens of each sampled sequence, and the slots of rows with NaN logits."""
    if step.sampled is None:
        return [], []
    sequences = step.batch.sample_seqs
    token_ids = step.sampled.read()[: len(sequences)]
    logprobs: list[TokenLogprob | None] = [None] * len(token_ids)
    if step.sampled.logprobs is not None:
        wanted = [sequence.params.logprobs for sequence in sequences]
        logprobs = step.sampled.logprobs.read(token_ids, wanted)
    rows = list(map(NextToken, token_ids, logprobs))
    first = len(step.output.decode)
    tokens, broken = [[row] for row in rows[:first]], list[int]()
    for proposal in step.output.proposals:
        stop = first + len(proposal.token_ids) + 1
        verdict = verify(proposal.token_ids, token_ids[first:stop], no_token=NO_TOKEN)
        tokens.append(rows[first : first + verdict.num_tokens])
        if verdict.broken is not None:
            bad = step.batch.sample_rows[first + verdict.broken : stop]
            broken += bad
        first = stop
    slots = [step.batch.slots, *(window.slots for window in step.batch.windows)]
    broken_slots = [[of_group[row] for row in broken] for of_group in slots] if broken else []
    return tokens + [[row] for row in rows[first:]], broken_slots


#: A function that returns the mask of a sequence, or None if it has no mask.
MaskOf = Callable[[Sequence], LogitsMask | None]


def can_look_ahead(mask: LogitsMask | None) -> bool:
    """Return whether a sequence with this mask can have proposals: the mask must be copyable."""
    return mask is None or isinstance(mask, CopyableMask)


def allowed_tokens(mask: LogitsMask, proposed: Tokens[int]) -> list[bytes | None]:
    """Return the tokens that a mask allows now, and after each of the proposed tokens.

    If the mask fails after a proposed token, no token is allowed there, so none is drawn; the next
    step then meets the failure without a proposal. Raises `EngineError` if the mask fails now.
    """
    found = [mask.allowed()]
    if not proposed:
        return found
    assert isinstance(mask, CopyableMask), "only copyable masks get proposals"
    copy = mask.copy()
    for token_id in proposed:
        if not _allows(found[-1], token_id):
            break  # the token cannot be drawn, so the rows after it are not used
        try:
            copy.accept(token_id)
            found.append(copy.allowed())
        except EngineError:
            found.append(b"")  # allows nothing
            break
    return found + [None] * (len(proposed) + 1 - len(found))


def _allows(allowed: bytes | None, token_id: int) -> bool:
    if allowed is None:
        return True
    return token_id // 8 < len(allowed) and bool(allowed[token_id // 8] >> token_id % 8 & 1)


def masked_rows(
    output: SchedulerOutput, mask_of: MaskOf
) -> tuple[list[SampleRow], list[tuple[Sequence, EngineError]]]:
    """Return the rows that sample a step's tokens, with their masks, and the masks that failed.

    The masks must have accepted all tokens before the step.
    """
    rows, failures, first = sample_rows(output), [], 0
    proposed = {proposal.sequence: proposal.token_ids for proposal in output.proposals}
    for sequence in output.sampled:
        token_ids = proposed.get(sequence, ())
        mask = mask_of(sequence)
        if mask is not None:
            try:
                for row, allowed in enumerate(allowed_tokens(mask, token_ids), first):
                    rows[row] = rows[row]._replace(allowed=allowed)
            except EngineError as error:
                failures.append((sequence, error))
        first += 1 + len(token_ids)
    return rows, failures
