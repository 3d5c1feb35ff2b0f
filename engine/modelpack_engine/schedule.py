"""What the scheduler is given and what it gives: limits, and the steps that keep to them."""

from __future__ import annotations

from dataclasses import dataclass

from modelpack_engine.buckets import EXACT, Buckets, round_down
from modelpack_engine.errors import EngineError
from modelpack_engine.sequence import Sequence


@dataclass(frozen=True, slots=True)
class SchedulerConfig:
    """Limits of the scheduler.

    A step has at most `max_num_batched_tokens` rows, padding included. Of one prompt it takes at
    most `max_prefill_chunk` tokens (rounded up to a bucket; default: half of a step).

    Prompts that wait may be overtaken as `WaitingQueue` says.
    """

    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    max_prefill_chunk: int | None = None
    max_waiting: int = 1024
    prefill_context: int | None = None
    overtaking: int = 0
    buckets: Buckets = EXACT

    def __post_init__(self) -> None:
        decode = self.buckets.pad_rows(self.max_num_seqs)
        needed = max(decode, self.buckets.pad_chunk(1))
        if self.max_num_seqs < 1 or self.max_num_batched_tokens < needed:
            raise EngineError(
                f"max_num_batched_tokens is {self.max_num_batched_tokens}, expected {needed} or "
                f"more, for {self.max_num_seqs} sequences",
                hint="raise max_num_batched_tokens or lower max_num_seqs (at least 1)",
            )

    @property
    def chunk_rows(self) -> int:
        """The most rows that one prompt's chunk may take."""
        chunk = self.max_prefill_chunk or max(self.max_num_batched_tokens // 2, 1)
        largest = round_down(self.max_num_batched_tokens, self.buckets.chunk)
        return min(self.buckets.pad_chunk(chunk), largest)

    def chunk_rows_at(self, start: int, *, alone: bool) -> int:
        """Return the most rows of a chunk from position `start` on.

        Rows take the longer the more they see: where others wait for their next token (not
        `alone`), `prefill_context` tokens before a chunk halve it, and so on.
        """
        if self.prefill_context is None or alone:
            return self.chunk_rows
        rows = self.chunk_rows * self.prefill_context // (self.prefill_context + start)
        return max(round_down(rows, self.buckets.chunk), self.buckets.pad_chunk(1))


@dataclass(frozen=True, slots=True)
class PrefillChunk:
    """`length` tokens of a sequence from position `start`; the last chunk's last row is sampled."""

    sequence: Sequence
    start: int
    length: int
    is_last: bool


@dataclass(frozen=True, slots=True)
class Proposal:
    """Tokens that a sequence may go on with: a step finds out how many of them it does.

    They come after its newest token, which is known, and are rows of the step as that one is.
    """

    sequence: Sequence
    token_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class SchedulerOutput:
    """One step: a token of each sequence in `decode`, several of each in `proposals`, and the
    chunks in `prefill`.

    `released` are ids of sequences whose state on the device is void before this step runs, because
    they finished or were preempted; of those, a preempted one may come back later.
    """

    decode: tuple[Sequence, ...] = ()
    prefill: tuple[PrefillChunk, ...] = ()
    proposals: tuple[Proposal, ...] = ()
    preempted: tuple[Sequence, ...] = ()
    released: tuple[int, ...] = ()

    @property
    def decoding(self) -> tuple[Sequence, ...]:
        """The sequences that have their prompts behind them, in the order of the step's rows."""
        return self.decode + tuple(proposal.sequence for proposal in self.proposals)

    @property
    def members(self) -> tuple[Sequence, ...]:
        """The sequences that the step computes anything for."""
        return self.decoding + tuple(chunk.sequence for chunk in self.prefill)

    @property
    def sampled(self) -> tuple[Sequence, ...]:
        """The sequences that the step samples tokens for, in the order of its rows."""
        return self.decoding + tuple(chunk.sequence for chunk in self.prefill if chunk.is_last)

    @property
    def num_tokens(self) -> int:
        """Rows without padding."""
        proposed = sum(len(proposal.token_ids) for proposal in self.proposals)
        return len(self.decoding) + proposed + sum(chunk.length for chunk in self.prefill)
