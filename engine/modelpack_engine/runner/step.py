"""The phases of a step (ScheduledStep, LaunchedStep, StepResult), and the functions between them.

A step that verifies proposals has a row for each proposed token. The sampler draws a token from the
logits, the request's seed and the token's position. In the rows of a proposal it therefore draws
the same tokens as step by step, for as long as the proposed tokens are the drawn ones. A proposed
token is accepted if it equals the drawn token, so speculation changes no output; keeping only its
distribution would be weaker.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Tokens
from dataclasses import dataclass, replace
from itertools import chain
from typing import NamedTuple, cast

import mlx.core as mx
import numpy as np

from modelpack_engine.core.batch import StepBatch
from modelpack_engine.core.scheduler import Proposal, SchedulerOutput
from modelpack_engine.core.sequence import Sequence
from modelpack_engine.errors import EngineError
from modelpack_engine.outputs import TokenLogprob
from modelpack_engine.platform.device import Staging
from modelpack_engine.request import CopyableMask, LogitsMask
from modelpack_engine.sampling.sampler import (
    NO_TOKEN,
    Logprobs,
    Sampled,
    SampleRow,
    gather_logprobs,
)


@dataclass(frozen=True, slots=True)
class Verdict:
    """`num_tokens` of the drawn tokens count, the last of which was not proposed; or none do.

    What the rows from `broken` on hold (None: of none) is not to stay: their logits were no
    numbers, so their keys and values may not be, either.
    """

    num_tokens: int
    broken: int | None = None


def verify(proposed: Tokens[int], drawn: Tokens[int], *, no_token: int) -> Verdict:
    """Return what counts of the tokens `drawn` in the rows of a proposal, one more than it has.

    A row in which no token could be drawn is left to the next step, where it comes first. In the
    first row that may be the doing of a proposed token: masked values still meet a product with
    zero, and zero times NaN is NaN.
    """
    assert len(drawn) == len(proposed) + 1, "a row for the newest token and for each proposed one"
    if drawn[0] == no_token:
        return Verdict(0, 0)
    count = 1
    for guess, token_id in zip(proposed, drawn, strict=False):
        if guess != token_id or drawn[count] == no_token:
            break
        count += 1
    broken = next((row for row in range(1, len(drawn)) if drawn[row] == no_token), None)
    return Verdict(count, broken)


@dataclass(frozen=True, slots=True)
class ScheduledStep:
    """A scheduled step whose graph is built and not yet launched.

    `sampled` is None if no row is sampled, or if masks have to see the tokens of the step before:
    then `masked_logits` are the logits that are sampled after the launch. `staging_step` is the
    number of the step in `Staging`.
    """

    output: SchedulerOutput
    batch: StepBatch
    sampled: Sampled | None
    masked_logits: mx.array | None
    prompt_logprobs: Logprobs | None
    staging_step: int

    def arrays(self) -> list[mx.array]:
        """Return what has to be evaluated, besides the pools that the step writes."""
        parts = (self.sampled, self.prompt_logprobs)
        arrays = [array for part in parts if part is not None for array in part.arrays()]
        return arrays if self.masked_logits is None else [*arrays, self.masked_logits]

    def launched(self, sampled: Sampled | None) -> LaunchedStep:
        """Return the step as the device computes it, with the tokens that it samples."""
        return LaunchedStep(
            self.output, self.batch, sampled, self.prompt_logprobs, self.staging_step
        )


@dataclass(frozen=True, slots=True)
class LaunchedStep:
    """A step that the device computes; `sampled` is None if no row is sampled."""

    output: SchedulerOutput
    batch: StepBatch
    sampled: Sampled | None
    prompt_logprobs: Logprobs | None
    staging_step: int = 0


class NextToken(NamedTuple):
    """A token of a sequence, as the host reads it."""

    token_id: int
    logprob: TokenLogprob | None


@dataclass(frozen=True, slots=True)
class StepResult:
    """The tokens of a step: for each of its sampled sequences, those that count.

    A sequence has none if its proposal spoilt the step. `broken_slots` hold the keys and values of
    rejected rows, which may be NaN. `prompt_logprobs` has the next entries of each prompt whose
    log-probabilities were requested.
    """

    output: SchedulerOutput
    tokens: list[list[NextToken]]
    broken_slots: list[int]
    prompt_logprobs: list[tuple[Sequence, TokenLogprob | None]]

    def verified(self) -> list[tuple[Proposal, list[NextToken]]]:
        """Return the step's proposals with the tokens that their sequences continue with."""
        first, proposals = len(self.output.decode), self.output.proposals
        tokens = self.tokens[first : first + len(proposals)]
        return list(zip(proposals, tokens, strict=True))


def sample_rows(output: SchedulerOutput) -> list[SampleRow]:
    """Return the rows that sample a step's tokens, in the order of its batch."""
    rows = [_sample_row(sequence) for sequence in output.decode]
    for proposal in output.proposals:
        rows += [
            _sample_row(proposal.sequence, proposal.token_ids[:count])
            for count in range(len(proposal.token_ids) + 1)
        ]
    return rows + [_sample_row(chunk.sequence) for chunk in output.prefill if chunk.is_last]


def _sample_row(sequence: Sequence, assumed: tuple[int, ...] | None = None) -> SampleRow:
    """Return the row that samples the token after a sequence's newest, or after what it assumes."""
    num_output = sequence.num_output_tokens + len(assumed or ())
    position = len(sequence.prompt_token_ids) + num_output
    return SampleRow(sequence.seq_id, position, num_output, None, assumed)


def row_token_ids(batch: StepBatch, previous: Sampled | None, staging: Staging) -> mx.array:
    """Return the rows' ids, int32 [rows]; those that `previous` sampled stay on the device."""
    if not batch.from_previous:
        return staging.put(np.array(batch.token_ids, np.int32))[: batch.num_rows]
    assert previous is not None
    sampled = previous.next_ids  # a row that failed runs on with any until its end is seen
    count, num_known = batch.num_rows, len(batch.from_previous)
    numbers = np.fromiter(chain.from_iterable(batch.from_previous), np.int32, 2 * num_known)
    rows, indices = numbers[::2], numbers[1::2]
    if num_known == count <= sampled.size and np.array_equal(rows, indices):
        return sampled[:count]
    places = np.arange(count, dtype=np.int32)
    places[rows] = count + indices
    known = staging.put(np.concatenate([np.array(batch.token_ids, np.int32), places]))
    return mx.concatenate([known[:count], sampled])[known[count : 2 * count]]


def with_prompt_rows(batch: StepBatch) -> StepBatch:
    """Return the batch with the rows of prompts whose log-probabilities are wanted sampled too."""
    if not batch.prompt_logprob_rows:
        return batch
    return replace(batch, sample_rows=batch.sample_rows + batch.prompt_logprob_rows)


def next_prompt_tokens(batch: StepBatch) -> list[int]:
    """Return, for each row of a prompt that is wanted, the prompt's token after it."""
    return [
        sequence.prompt_token_ids[batch.positions[row] + 1]
        for row, sequence in zip(batch.prompt_logprob_rows, batch.prompt_logprob_seqs, strict=True)
    ]


def part_logits(batch: StepBatch, logits: mx.array) -> tuple[mx.array, Logprobs | None]:
    """Part the logits of sampled rows, and what is wanted of those of prompts."""
    if not batch.prompt_logprob_rows:
        return logits, None
    count = len(batch.sample_rows)
    wanted = logits[count : count + len(batch.prompt_logprob_rows)]
    return logits[:count], _gather_prompt_logprobs(batch, wanted)


def _gather_prompt_logprobs(batch: StepBatch, logits: mx.array) -> Logprobs:
    num_top = max(sequence.params.prompt_logprobs or 0 for sequence in batch.prompt_logprob_seqs)
    return gather_logprobs(logits, mx.array(next_prompt_tokens(batch), mx.int32), num_top)


def read_step(step: LaunchedStep) -> StepResult:
    """Wait for a step; return its tokens, with log-probabilities where they were requested."""
    tokens, broken_slots = _read_tokens(step)
    return StepResult(step.output, tokens, broken_slots, _read_prompt_logprobs(step))


def _read_prompt_logprobs(step: LaunchedStep) -> list[tuple[Sequence, TokenLogprob | None]]:
    if step.prompt_logprobs is None:
        return []
    sequences = step.batch.prompt_logprob_seqs
    wanted = [sequence.params.prompt_logprobs for sequence in sequences]
    entries = step.prompt_logprobs.read(next_prompt_tokens(step.batch), wanted)
    return list(zip(sequences, entries, strict=True))


def _read_tokens(step: LaunchedStep) -> tuple[list[list[NextToken]], list[int]]:
    """Return the tokens of each sampled sequence, and the slots of broken rows."""
    if step.sampled is None:
        return [], []
    sequences = step.batch.sample_seqs
    token_ids = cast("list[int]", step.sampled.token_ids.tolist())[: len(sequences)]
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
            broken += [step.batch.slots[row] for row in bad]
        first = stop
    return tokens + [[row] for row in rows[first:]], broken


_NOTHING = b""

#: Returns the mask of a sequence, None if it has none.
MaskOf = Callable[[Sequence], LogitsMask | None]


def can_look_ahead(mask: LogitsMask | None) -> bool:
    """Return whether a sequence with this mask can have proposals."""
    return mask is None or isinstance(mask, CopyableMask)


def allowed_along(mask: LogitsMask, proposed: Tokens[int]) -> list[bytes | None]:
    """Return what a mask allows now, and after each of the tokens proposed.

    Nothing is allowed where the mask fails after a proposed token: no token is drawn then, and the
    next step, for which that token is not proposed any more, meets the failure. Raises
    `EngineError` if it fails now.
    """
    found = [mask.allowed()]
    if not proposed:
        return found
    assert isinstance(mask, CopyableMask), "others get no proposals"
    copy = mask.copy()
    for token_id in proposed:
        if not _allows(found[-1], token_id):
            break  # it cannot be drawn, so the rows after it mean nothing
        try:
            copy.accept(token_id)
            found.append(copy.allowed())
        except EngineError:
            found.append(_NOTHING)
            break
    return found + [None] * (len(proposed) + 1 - len(found))


def _allows(allowed: bytes | None, token_id: int) -> bool:
    if allowed is None:
        return True
    byte = token_id // 8
    return byte < len(allowed) and bool(allowed[byte] >> token_id % 8 & 1)


def masked_rows(
    output: SchedulerOutput,
    mask_of: MaskOf,
) -> tuple[list[SampleRow], list[tuple[Sequence, EngineError]]]:
    """Return the rows that sample a step's tokens, with what masks allow, and whose masks failed.

    All tokens before the step have been taken.
    """
    failures = []
    rows = sample_rows(output)
    proposed = {proposal.sequence: proposal.token_ids for proposal in output.proposals}
    first = 0
    for sequence in output.sampled:
        token_ids = proposed.get(sequence, ())
        mask = mask_of(sequence)
        if mask is not None:
            try:
                for row, allowed in enumerate(allowed_along(mask, token_ids), first):
                    rows[row] = rows[row]._replace(allowed=allowed)
            except EngineError as error:
                failures.append((sequence, error))
        first += 1 + len(token_ids)
    return rows, failures
