"""Step: one step of the engine, from its graph to the tokens that the host reads."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple, cast

import mlx.core as mx

from modelpack_engine.batch import StepBatch
from modelpack_engine.logprobs import Logprobs, gather_logprobs
from modelpack_engine.outputs import TokenLogprob
from modelpack_engine.sampler import Sampled, SampleRow
from modelpack_engine.schedule import SchedulerOutput
from modelpack_engine.sequence import Sequence


@dataclass(frozen=True, slots=True)
class Step:
    """A step whose graph is built: what was scheduled, and what it samples, if anything.

    `logits` are of rows that are still to be sampled, which waits for masks; else None.
    """

    output: SchedulerOutput
    batch: StepBatch
    logits: mx.array | None
    sampled: Sampled | None
    prompt_logprobs: Logprobs | None

    def arrays(self) -> list[mx.array]:
        """Return what has to be evaluated, besides the pools that the step writes."""
        parts = (self.sampled, self.prompt_logprobs)
        arrays = [array for part in parts if part is not None for array in part.arrays()]
        return arrays if self.logits is None else [*arrays, self.logits]


class StepTokens(NamedTuple):
    """What a step sampled, as the host reads it: an entry a row."""

    step: Step
    token_ids: list[int]
    logprobs: list[TokenLogprob | None]


def sample_row(sequence: Sequence) -> SampleRow:
    """Return the row that samples a sequence's next token."""
    position = sequence.num_tokens
    return SampleRow(sequence.seq_id, position, position - len(sequence.prompt_token_ids))


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


def gather_prompt_logprobs(batch: StepBatch, logits: mx.array) -> Logprobs:
    num_top = max(sequence.params.prompt_logprobs or 0 for sequence in batch.prompt_logprob_seqs)
    return gather_logprobs(logits, mx.array(next_prompt_tokens(batch), mx.int32), num_top)


def read_tokens(step: Step) -> StepTokens:
    """Wait for a step; return its tokens, and their log-probabilities where they are wanted."""
    if step.sampled is None:
        return StepTokens(step, [], [])
    sequences = step.batch.sample_seqs
    token_ids = cast("list[int]", step.sampled.token_ids.tolist())[: len(sequences)]
    if step.sampled.logprobs is None:
        return StepTokens(step, token_ids, [None] * len(token_ids))
    wanted = [sequence.params.logprobs for sequence in sequences]
    return StepTokens(step, token_ids, step.sampled.logprobs.read(token_ids, wanted))
