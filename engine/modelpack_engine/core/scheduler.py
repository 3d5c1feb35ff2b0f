"""Scheduler: continuous batching, from waiting requests to the token rows of each step.

Pure Python without MLX: `Engine` gets a `SchedulerOutput` from `Scheduler.schedule`, runs it, and
passes the sampled tokens to `Scheduler.collect`. `SchedulerConfig` has the limits, `WaitingQueue`
the order of admission, and `BlockManager` the blocks.
"""

from __future__ import annotations

from bisect import insort
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from collections.abc import Sequence as Tokens
from dataclasses import dataclass
from heapq import merge
from itertools import chain, islice
from operator import add, attrgetter
from typing import Protocol

from modelpack_engine.config import DEFAULT_MAX_WAITING
from modelpack_engine.core.block_manager import BlockManager
from modelpack_engine.core.buckets import EXACT, Buckets, round_down
from modelpack_engine.core.sequence import Sequence, SequenceStatus
from modelpack_engine.errors import (
    RETRY_AFTER,
    ContextLengthError,
    EngineError,
    QueueFullError,
    RequestError,
)
from modelpack_engine.outputs import EngineStats, FinishReason
from modelpack_engine.request import Media


@dataclass(frozen=True, slots=True)
class SchedulerConfig:
    """The limits of the scheduler.

    A step has at most `max_num_batched_tokens` rows, padding included, and at most
    `max_prefill_chunk` tokens of one prompt (rounded up to a bucket; default: half of the rows).
    With `whole_steps`, the default for one prompt is the whole step. Then a prompt has at most half
    of a step's rows while other prompts run or wait, and a quarter beside sequences that decode;
    all prompts of such a step have at most half.

    `overtaking` is described in `WaitingQueue`, `prefill_context` in `chunk_rows_at`.
    """

    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    max_prefill_chunk: int | None = None
    max_waiting: int = DEFAULT_MAX_WAITING
    whole_steps: bool = False
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
        most = self.max_num_batched_tokens // (1 if self.whole_steps else 2)
        chunk = self.max_prefill_chunk or max(most, 1)
        largest = round_down(self.max_num_batched_tokens, self.buckets.chunk)
        return min(self.buckets.pad_chunk(chunk), largest)

    def prompt_rows(self, num_decode: int) -> int:
        """Return the most rows of prompts in a step with `num_decode` rows that decode."""
        rows = self.max_num_batched_tokens - self.buckets.pad_rows(num_decode)
        if num_decode and self.whole_steps:
            rows = min(rows, self._part(2))
        return rows

    def chunk_rows_at(self, start: int, *, alone: bool, only: bool = False) -> int:
        """Return the most rows of a chunk that starts at position `start`.

        `alone` says that no sequence decodes in the step, `only` that no other prompt runs or waits
        (for `whole_steps`).

        A row takes longer the more tokens it attends to. So unless the chunk is `alone`,
        `prefill_context` tokens before it halve its rows; twice as many leave a third.
        """
        rows = self.chunk_rows
        if self.whole_steps and not (alone and only):
            rows = min(rows, self._part(2 if alone else 4))
        if self.prefill_context is None or alone:
            return rows
        rows = rows * self.prefill_context // (self.prefill_context + start)
        return max(round_down(rows, self.buckets.chunk), self.buckets.pad_chunk(1))

    def _part(self, count: int) -> int:
        """Return a part of a step's rows, but at least those of the smallest chunk."""
        rows = round_down(self.max_num_batched_tokens // count, self.buckets.chunk)
        return max(rows, self.buckets.pad_chunk(1))


@dataclass(frozen=True, slots=True)
class PrefillChunk:
    """`length` tokens of a sequence from position `start`; the last chunk's last row is sampled.

    If `snapshot_hash` is set, a snapshot of the recurrent state after the first `snapshot_after`
    tokens of the chunk is kept by it.
    """

    sequence: Sequence
    start: int
    length: int
    is_last: bool
    snapshot_after: int = 0
    snapshot_hash: bytes | None = None


@dataclass(frozen=True, slots=True)
class Proposal:
    """Proposed tokens that may follow a sequence's newest token; a step verifies them.

    The newest token is known. It and the proposed tokens are rows of the step.
    """

    sequence: Sequence
    token_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class SchedulerOutput:
    """One step: sequences to decode, proposals to verify, and chunks of prompts to compute.

    `released` are the ids of sequences that finished or were preempted: their state on the device
    is dropped before this step. A preempted sequence may run again later.
    """

    decode: tuple[Sequence, ...] = ()
    prefill: tuple[PrefillChunk, ...] = ()
    proposals: tuple[Proposal, ...] = ()
    preempted: tuple[Sequence, ...] = ()
    released: tuple[int, ...] = ()

    @property
    def decoding(self) -> tuple[Sequence, ...]:
        """The sequences that decode, with and without proposals, in the order of the rows."""
        return self.decode + tuple(proposal.sequence for proposal in self.proposals)

    @property
    def members(self) -> tuple[Sequence, ...]:
        """All sequences of the step."""
        return self.decoding + tuple(chunk.sequence for chunk in self.prefill)

    @property
    def sampled(self) -> tuple[Sequence, ...]:
        """The sequences for which the step samples tokens, in the order of its rows."""
        return self.decoding + tuple(chunk.sequence for chunk in self.prefill if chunk.is_last)

    @property
    def num_tokens(self) -> int:
        """The rows of the step, without padding."""
        proposed = sum(len(proposal.token_ids) for proposal in self.proposals)
        return len(self.decoding) + proposed + sum(chunk.length for chunk in self.prefill)


#: Proposed tokens by sequence.
Proposed = Mapping[Sequence, Tokens[int]]


def fit_proposals(
    decode: list[Sequence],
    proposed: Proposed | None,
    config: SchedulerConfig,
    blocks: BlockManager,
) -> tuple[list[Sequence], list[Proposal]]:
    """Split the decoding sequences: return those without a proposal, and the proposals.

    A proposal is cut to the rows of a step, to the tokens that its sequence may still generate, and
    to the available blocks: no sequence is preempted for a proposal.
    """
    if not proposed:
        return decode, []
    alone: list[Sequence] = []
    proposals: list[Proposal] = []
    rows = len(decode)
    for sequence in decode:
        token_ids = tuple(proposed.get(sequence, ()))
        # The step samples one more token than are proposed.
        token_ids = token_ids[: max(0, sequence.max_num_tokens - sequence.num_tokens - 1)]
        while token_ids and (
            config.buckets.pad_rows(rows + len(token_ids)) > config.max_num_batched_tokens
            or not blocks.grow(sequence, sequence.num_computed_tokens + 1 + len(token_ids))
        ):
            token_ids = token_ids[:-1]
        if token_ids:
            assert not sequence.num_inflight, "its newest token is not known"
            rows += len(token_ids)
            proposals.append(Proposal(sequence, token_ids))
        else:
            alone.append(sequence)
    return alone, proposals


#: A waiting prompt is overtaken by prompts that are one token shorter until this many tokens have
#: been computed. A higher value shortens most waits, and lengthens those of the longest prompts.
OVERTAKING = 16

#: The most sequences admitted in one round. Without a limit, a stream of new owners could keep an
#: owner that had its turn waiting forever.
ROUND = 64

#: The most prompts with which a picture is encoded in slices, its own included: all wait for these.
#: Those of the background do not count.
_MOST_FOR_SLICES = 4
#: Read for every token: looking up an enumeration's member takes three times as long.
_FINISHED = SequenceStatus.FINISHED

_PREEMPTED = -1  # before all other priorities
_by_priority = attrgetter("priority")


class WaitingQueue:
    """The order in which waiting sequences are admitted.

    Preempted sequences come first, and background sequences last, in the order of their arrival.
    The other sequences of one owner are in the order of their priority,
    then of arrival. The priority is the number of tokens computed before the arrival, plus
    `overtaking` for each token that the sequence needs. So a shorter prompt overtakes a longer one
    unless it arrives much later; 0 means first come, first served.

    Owners take turns. In a round, each owner has one turn: the next sequence is the one with the
    lowest priority among the owners without a turn. A round ends when there is no such owner, or
    after `ROUND` turns.
    """

    def __init__(self, overtaking: int) -> None:
        self._overtaking = overtaking
        self._preempted: list[Sequence] = []
        self._owners: dict[bytes, list[Sequence]] = {}
        self._served: set[bytes] = set()  # in this round
        self._background: deque[Sequence] = deque()
        self._count = 0

    def __len__(self) -> int:
        return self._count

    @property
    def num_foreground(self) -> int:
        """How many sequences wait that are not background ones."""
        return self._count - len(self._background)

    def __iter__(self) -> Iterator[Sequence]:
        """Yield the sequences about in the order of admission: turns of owners are left out."""
        yield from self._preempted
        yield from merge(*self._owners.values(), key=_by_priority)
        yield from self._background

    @property
    def first(self) -> Sequence:
        """The sequence to admit next; the queue must not be empty."""
        return self._background[0] if self.is_idle else self._next()[0]

    @property
    def is_idle(self) -> bool:
        """Whether only background sequences wait, if any."""
        return self._count == len(self._background)

    def add(self, sequence: Sequence, num_uncached: int, now: int) -> None:
        """Add a sequence that needs `num_uncached` tokens; `now` counts all computed tokens."""
        self._count += 1
        if sequence.background:
            self._background.append(sequence)
            return
        sequence.priority = now + self._overtaking * num_uncached
        insort(self._owners.setdefault(sequence.owner, []), sequence, key=_by_priority)

    def put_back(self, sequence: Sequence) -> None:
        """Add a sequence that was preempted."""
        self._count += 1
        if sequence.background:
            self._background.appendleft(sequence)
            return
        sequence.priority = _PREEMPTED
        self._preempted.insert(0, sequence)

    def first_of(self, is_ready: Callable[[Sequence], bool]) -> Sequence | None:
        """Return the sequence to admit next of those that are ready, or None."""
        turns = [queue for owner, queue in self._owners.items() if owner not in self._served]
        for queues in ([self._preempted], turns, list(self._owners.values()), [self._background]):
            found = (next((each for each in queue if is_ready(each)), None) for queue in queues)
            ready = [each for each in found if each is not None]
            if ready:
                return min(ready, key=lambda each: (each.priority, each.seq_id))
        return None

    def pop(self, chosen: Sequence | None = None) -> Sequence:
        """Remove and return the first sequence, or the one that is `chosen`."""
        sequence = self.first if chosen is None else chosen
        if not sequence.background and sequence.priority != _PREEMPTED:
            if sequence.owner in self._served or len(self._served) == ROUND:
                self._served.clear()
            self._served.add(sequence.owner)
        self.remove(sequence)
        return sequence

    def remove(self, sequence: Sequence) -> None:
        """Remove a sequence that has ended."""
        if sequence.background:
            self._background.remove(sequence)
        elif sequence.priority == _PREEMPTED:
            self._preempted.remove(sequence)
        else:
            queue = self._owners[sequence.owner]
            queue.remove(sequence)
            if not queue:
                del self._owners[sequence.owner]
        self._count -= 1
        if not self._count:
            self._served.clear()

    def _next(self) -> list[Sequence]:
        """Return the preempted sequences, or the queue of the next owner."""
        if self._preempted:
            return self._preempted
        if len(self._owners) == 1:
            return next(iter(self._owners.values()))
        served = self._served if len(self._served) < ROUND else ()
        queues = [queue for owner, queue in self._owners.items() if owner not in served]
        return min(queues or self._owners.values(), key=_of_first)


def _of_first(queue: list[Sequence]) -> tuple[int, int]:
    return queue[0].priority, queue[0].seq_id


class PictureEncoder(Protocol):
    """What encodes pictures before the steps that need them; `VisionEncoder` implements this."""

    def prepare(
        self,
        sequence: Sequence,
        media: Media,
        *,
        alone: bool,
        in_slices: bool,
        waiting: Iterable[tuple[bytes, Media]],
    ) -> bool:
        """Return whether a picture can be a part of this step.

        With `in_slices`, several steps may encode it, of which only the last one can. It may be
        encoded together with some of `waiting`, which later steps need, with their owner.
        """


class AdapterSlots(Protocol):
    """What gives adapters their slots in memory; `AdapterSet` implements this."""

    def queue(self, sequence: Sequence) -> None:
        """Keep the sequence's adapter until it has ended."""

    def can_admit(self, sequence: Sequence) -> bool:
        """Return whether the sequence's adapter is in memory, or there is a slot for it."""

    def may_overtake(self, sequence: Sequence) -> bool:
        """Return whether a sequence needs no slot for which the first one waits."""

    def admit(self, sequence: Sequence) -> None:
        """Set the sequence's slot; its adapter stays in memory until it has ended."""

    def release(self, sequence: Sequence) -> None:
        """Forget a sequence that has ended."""


def check_room(num_waiting: int, num_sequences: int, max_waiting: int) -> None:
    """Raise `QueueFullError` if a queue of `num_waiting` has no room for so many sequences."""
    if num_waiting + num_sequences > max_waiting:
        raise QueueFullError(
            f"the queue is full: {num_waiting} sequences wait, the limit is {max_waiting}",
            retry_after=RETRY_AFTER,
            hint="try again later",
        )


class Scheduler:
    """Continuous batching over one pool of blocks.

    Every decoding sequence is in every step. The remaining rows go to prompts, in the order of
    admission. Only the oldest prompt that needs several steps takes rows in this order; other long
    prompts get the rows that short prompts leave over. So long prompts delay neither streams nor
    short prompts, and the oldest long prompt always advances.

    When blocks run out, the youngest sequence (admitted last) is preempted: its blocks are freed,
    and it is computed again as soon as there is room. Before that, tokens in flight are collected,
    since they may end a sequence.

    Background sequences count as younger than all others: they get the rows and blocks that others
    leave over, and are preempted when another sequence waits for their place.

    A chunk ends before a picture that `pictures` cannot encode in this step, and never within one
    whose tokens attend to each other in both directions.

    A sequence waits for a slot of `adapters` while unfinished requests use all with other adapters.
    Until the first one in the queue has a slot, no sequence gets the adapter that was used least
    recently, so that its slot becomes free; sequences with others, or none, overtake.
    """

    def __init__(
        self,
        config: SchedulerConfig,
        blocks: BlockManager,
        pictures: PictureEncoder | None = None,
        adapters: AdapterSlots | None = None,
    ) -> None:
        self.config = config
        self._adapters = adapters
        self._pictures = pictures
        self._awaits_pictures = False  # whether a prompt of this step does
        self._chunk_rows = config.chunk_rows
        self._blocks = blocks
        self._waiting = WaitingQueue(config.overtaking)
        self._running: list[Sequence] = []  # in the order of admission, background ones last
        self._requests: dict[str, list[Sequence]] = {}
        self._released: list[int] = []
        self._num_inflight = 0
        self._num_computed = 0
        self._num_steps = self._num_mixed_steps = self._num_preemptions = self._num_finished = 0
        self._prompt_tokens = self._cached_tokens = self._generated_tokens = 0

    # Requests

    @property
    def has_work(self) -> bool:
        """Whether a sequence is unfinished, or a sampled token is not collected."""
        return bool(self._requests) or self._num_inflight > 0

    def add(self, *sequences: Sequence) -> None:
        """Queue the sequences of one request, all or none of them.

        Raises `RequestError` if the request can never be served, and `QueueFullError` if the queue
        has no room for it now.
        """
        first, config = sequences[0], self.config
        num_tokens = len(first.prompt_token_ids)
        capacity = self._blocks.capacity(self._chunk_rows, config.max_model_len)
        if first.request_id in self._requests:
            raise RequestError(
                f"request {first.request_id!r} is already running", param="request_id"
            )
        if num_tokens == 0:
            raise RequestError("the prompt is empty", param="prompt")
        if num_tokens >= config.max_model_len:
            raise ContextLengthError(
                "the prompt is too long: this model's maximum context length is "
                f"{config.max_model_len} tokens, including the reply, "
                f"but the prompt has {num_tokens}",
                param="prompt",
            )
        if num_tokens > capacity:
            raise ContextLengthError(
                "the prompt is too long: with its KV cache, this model's maximum context length is "
                f"{capacity} tokens, but the prompt has {num_tokens}",
                param="prompt",
                hint="give the engine more memory for its KV cache",
            )
        self._check_spans(first)
        if len(sequences) > config.max_waiting:
            raise RequestError(
                f"n is {len(sequences)}, but the queue holds {config.max_waiting}", param="n"
            )
        # Background sequences leave half of the queue to others.
        is_full = first.background and 2 * len(self._waiting) >= config.max_waiting
        self.check_queue(config.max_waiting + 1 if is_full else len(sequences))
        num_cached = self._blocks.num_cached_tokens(first) if config.overtaking else 0
        for sequence in sequences:
            # The last token needs no slot, as its keys and values are not used: capacity + 1.
            sequence.max_num_tokens = min(
                num_tokens + sequence.params.max_tokens, config.max_model_len, capacity + 1
            )
            self._waiting.add(sequence, num_tokens - num_cached, self._num_computed)
            if self._adapters is not None:
                self._adapters.queue(sequence)
        self._requests[first.request_id] = list(sequences)

    def _check_spans(self, sequence: Sequence) -> None:
        """Raise `RequestError` if a step that decodes all others cannot compute a picture whole."""
        config, buckets = self.config, self.config.buckets
        most = min(self._chunk_rows, config.prompt_rows(config.max_num_seqs - 1))
        for media in sequence.media:
            size = max((stop - first for first, stop in media.bidirectional), default=0)
            if buckets.pad_chunk(size) > most:
                raise RequestError(
                    f"{media.param}: the picture has {size} tokens that are computed together, but"
                    f" a step computes at most {most} of one prompt",
                    param=media.param,
                    hint="raise max_num_batched_tokens and max_prefill_chunk",
                )

    def check_queue(self, num_sequences: int = 1) -> None:
        """Raise `QueueFullError` if the queue has no room for so many sequences now."""
        check_room(len(self._waiting), num_sequences, self.config.max_waiting)

    def abort(self, request_id: str, index: int | None = None) -> list[Sequence]:
        """End a request, or its choice `index`; return the sequences that were unfinished."""
        choices = self._requests.get(request_id, ())
        sequences = [choice for choice in choices if index is None or choice.index == index]
        for sequence in sequences:
            self.finish(sequence, FinishReason.ABORT)
        return sequences

    def finish(
        self, sequence: Sequence, reason: FinishReason, stop_reason: str | int | None = None
    ) -> None:
        """End a sequence and free its blocks; tokens in flight for it are dropped."""
        if sequence.is_finished:
            return
        if sequence.status is SequenceStatus.RUNNING:
            self._running.remove(sequence)
            self._blocks.free(sequence)
            self._released.append(sequence.seq_id)
        else:
            self._waiting.remove(sequence)
        sequence.status = SequenceStatus.FINISHED
        sequence.finish_reason = reason
        sequence.stop_reason = stop_reason
        sequence.media = ()  # the runner keeps its last batch, and pictures are large
        if self._adapters is not None:
            self._adapters.release(sequence)
        self._num_finished += 1
        choices = self._requests[sequence.request_id]
        choices.remove(sequence)
        if not choices:
            del self._requests[sequence.request_id]

    # The schedule of a step

    def decoding(self) -> list[Sequence]:
        """Return the sequences that would decode in the next step, as known now."""
        return [seq for seq in self._running if not seq.is_prefill and not seq.is_full]

    def has_only(self, sequences: Iterable[Sequence]) -> bool:
        """Return whether the sequences run in this order, and no other one runs or waits."""
        return not self._waiting and self._running == list(sequences)

    def schedule(self, proposed: Proposed | None = None) -> SchedulerOutput | None:
        """Return the next step, or None if nothing can be computed before `collect` is called.

        The step verifies the `proposed` tokens that have room; their sequences must have no tokens
        in flight. If the method returns None and no step is in flight, there is no work. If the
        caller does not submit the output, only block tables have changed, and the next call returns
        the same step.
        """
        cleared: list[Sequence] = []
        self._awaits_pictures = False
        while self._is_blocked_by_background():
            if self._num_inflight:
                return None
            cleared.append(self._preempt_youngest())
        preempted: list[Sequence] = []
        decode = self._schedule_decode(preempted)
        if decode is None:
            return None
        decode, proposals = fit_proposals(decode, proposed, self.config, self._blocks)
        decode_rows = len(decode) + sum(1 + len(proposal.token_ids) for proposal in proposals)
        rows = self.config.prompt_rows(decode_rows)
        # A sequence that was just preempted must not get back the blocks that others need.
        prefill = self._schedule_prefill(rows, admit=not preempted, alone=not decode_rows)
        while not decode_rows and not prefill:
            waits = self._num_inflight or not self._running or self._blocks.is_awaited
            if waits or self._awaits_pictures:
                return None
            # Prompts were admitted to share blocks of a window. Each gives up its reference to such
            # a block for one of its own, so together they may need more than there are.
            assert len(self._running) > 1, "a sequence alone does not fit"
            preempted.append(self._preempt_youngest())
            prefill = self._schedule_prefill(rows, admit=False, alone=True)
        return SchedulerOutput(
            tuple(decode), tuple(prefill), tuple(proposals), (*cleared, *preempted),
            self.take_released(),
        )  # fmt: skip

    def _is_blocked_by_background(self) -> bool:
        """Return whether a sequence waits for a place that a background sequence has."""
        if self._waiting.is_idle or not (self._running and self._running[-1].background):
            return False
        first = self._first_waiting()
        if first is None or first.background:
            return False
        if len(self._running) >= self.config.max_num_seqs:
            return True
        prompts = [sequence for sequence in self._running if sequence.is_prefill]
        promised = sum(map(self._num_lacking, prompts))
        windows = self._blocks.lacking_of_windows(prompts, self._chunk_rows)
        return not self._has_blocks(first, promised, windows)

    def _first_waiting(self) -> Sequence | None:
        """Return the sequence to admit next, or None; the first may wait for its adapter."""
        if not self._waiting:
            return None
        first, adapters = self._waiting.first, self._adapters
        if adapters is None or adapters.can_admit(first):
            return first
        return self._waiting.first_of(adapters.may_overtake)

    def _schedule_decode(self, preempted: list[Sequence]) -> list[Sequence] | None:
        """Return the sequences to decode, each with a slot for its token; None: collect first."""
        decode, size = list[Sequence](), self._blocks.block_size
        for sequence in self._running.copy():
            if preempted and sequence.status is not SequenceStatus.RUNNING:
                break  # preempted in this loop, as are all younger sequences
            computed = sequence.num_computed_tokens
            if computed < sequence.num_prefill_tokens or sequence.is_full:
                continue
            if computed < len(sequence.block_table) * size:  # as in most steps
                decode.append(sequence)
                continue
            while not self._blocks.grow(sequence, computed + 1):
                if self._num_inflight:
                    return None
                preempted.append(self._preempt_youngest())
                if preempted[-1] is sequence:
                    break
            else:
                decode.append(sequence)
        return decode

    def _schedule_prefill(self, rows: int, *, admit: bool, alone: bool) -> list[PrefillChunk]:
        """Return chunks of prompts for at most `rows` rows, and admit sequences if `admit`."""
        buckets, chunks = self.config.buckets, list[PrefillChunk]()
        smallest = buckets.pad_chunk(1)
        only = self.config.whole_steps and self._num_prompts() == 1
        largest = self.config.chunk_rows_at(0, alone=alone, only=only)
        computing: set[bytes] = set()
        long_prompts: list[Sequence] = []

        def take(sequence: Sequence) -> None:
            nonlocal rows
            if chunk := self._chunk(sequence, rows, computing, alone=alone, only=only):
                chunks.append(chunk)
                rows -= buckets.rows_of(chunk.length)

        prompts = self._prompts(admit)
        while rows >= smallest and (sequence := next(prompts, None)):
            if buckets.pad_chunk(sequence.num_remaining_tokens) > largest:
                long_prompts.append(sequence)
                if len(long_prompts) > 1:
                    continue
            take(sequence)
        for sequence in long_prompts[1:]:
            if rows >= smallest:
                take(sequence)
        return chunks

    def _num_prompts(self) -> int:
        """Return how many sequences are prompts or wait."""
        return sum(each.is_prefill for each in self._running) + len(self._waiting)

    def _prompts(self, admit: bool) -> Iterator[Sequence]:
        """Yield the running sequences in prefill, then admit and yield waiting ones.

        Each has received its blocks from the prefix cache.
        """
        prompts = [sequence for sequence in self._running if sequence.is_prefill]
        for sequence in prompts:
            self._share_prefix(sequence)
            yield sequence
        promised = sum(map(self._num_lacking, prompts))
        windows = self._blocks.lacking_of_windows(prompts, self._chunk_rows)
        while admit and self._waiting and len(self._running) < self.config.max_num_seqs:
            first = self._first_waiting()
            if first is None or not self._has_blocks(first, promised, windows):
                return  # no other sequence may overtake it
            self._admit(sequence := self._waiting.pop(first))
            yield sequence
            promised += self._num_lacking(sequence)
            more = self._blocks.lacking_of_windows([sequence], self._chunk_rows)
            windows = list(map(add, windows, more))

    def _has_blocks(self, sequence: Sequence, promised: int, windows: list[int]) -> bool:
        """Return whether a waiting sequence can be admitted beside the `promised` blocks.

        `windows` are those that are promised of each window pool.
        """
        blocks = self._blocks
        more = blocks.lacking_of_windows([sequence], self._chunk_rows)
        if not blocks.can_allocate_windows(map(add, windows, more)):
            return False
        matched = blocks.match_prefix(sequence)
        lacking = self._num_lacking(sequence, matched)
        return blocks.can_allocate(promised + lacking + blocks.num_idle(matched))

    def _num_lacking(self, sequence: Sequence, matched: list[int] | None = None) -> int:
        """Return how many blocks a sequence needs for its prompt and one output token.

        Blocks that it holds, and the `matched` ones, are not counted.
        """
        blocks = self._blocks
        needed = blocks.blocks_for(sequence.num_prefill_tokens + 1)
        lacking = needed - len(sequence.block_table) - len(matched or ())
        most = blocks.most_held(self._chunk_rows) or blocks.num_total
        return min(lacking, most - blocks.num_held(sequence, matched))

    def _admit(self, sequence: Sequence) -> None:
        if self._adapters is not None:
            self._adapters.admit(sequence)
        at = len(self._running)
        while not sequence.background and at and self._running[at - 1].background:
            at -= 1
        self._running.insert(at, sequence)
        sequence.status = SequenceStatus.RUNNING
        if sequence.num_preemptions == 0:
            self._prompt_tokens += len(sequence.prompt_token_ids)
        self._share_prefix(sequence)

    def _share_prefix(self, sequence: Sequence) -> None:
        num_tokens = self._blocks.share_prefix(sequence)
        if sequence.num_preemptions == 0:
            sequence.num_cached_tokens += num_tokens
            self._cached_tokens += num_tokens

    def _chunk(
        self, sequence: Sequence, max_rows: int, computing: set[bytes], *, alone: bool, only: bool
    ) -> PrefillChunk | None:
        """Return the chunk of a prompt in a step of `max_rows`, or None if the prompt has to wait.

        It waits for free blocks, for blocks that are being loaded from the offload, for a picture,
        and for another prompt of this step that computes its next block, which it can then share.
        See `chunk_rows_at` for `alone` and `only`. `computing` has the hashes of the blocks that
        this step computes; those of the chunk are added.
        """
        blocks, buckets, block_size = self._blocks, self.config.buckets, self._blocks.block_size
        if blocks.next_hash(sequence) in computing or blocks.awaits_blocks(sequence):
            return None
        start, remaining = sequence.num_computed_tokens, sequence.num_remaining_tokens
        most = self.config.chunk_rows_at(start, alone=alone, only=only)
        length = buckets.fit_chunk(remaining, min(max_rows, most))
        if length > (room := blocks.room_for(sequence)):
            length = round_down(room, buckets.chunk)
        if length < remaining and (start + length) // block_size > start // block_size:
            length -= (start + length) % block_size  # blocks are shared whole
        length = blocks.most_until_snapshot(sequence, length)
        if sequence.media and length > 0:
            rows = round_down(min(max_rows, self._chunk_rows), buckets.chunk)
            stop = _outside_spans(sequence, start, start + length, min(rows, room))
            length = self._encoded_until(sequence, stop, alone) - start if stop > start else 0
        if length <= 0:
            return None
        grown = blocks.grow(sequence, start + length)
        assert grown, "the chunk fits in the available blocks"
        computing.update(blocks.hashes_between(sequence, start, start + length))
        after = blocks.snapshot_of(sequence, length) or (0, None)
        return PrefillChunk(sequence, start, length, length == remaining, *after)

    def _encoded_until(self, sequence: Sequence, stop: int, alone: bool) -> int:
        """Return the position, up to `stop`, to which the sequence's pictures are encoded."""
        assert self._pictures is not None, "only models that read pictures get them"
        # Each slice takes a step, for which all prompts wait: so it has to be worth it. Those of
        # the background may wait.
        prompts = [each for each in self._running if each.is_prefill]
        num_decoding = len(self._running) - len(prompts)
        num_prefill = sum(not each.background for each in prompts) + self._waiting.num_foreground
        in_slices = not alone and num_prefill <= min(num_decoding, _MOST_FOR_SLICES)
        for media in sequence.media:
            end = media.until or media.stop
            if end <= sequence.num_computed_tokens or media.start >= stop:
                continue
            waiting = self._waiting_pictures()
            if not self._pictures.prepare(
                sequence, media, alone=alone, in_slices=in_slices, waiting=waiting
            ):
                self._awaits_pictures = True
                return media.start
        return stop

    def _waiting_pictures(self) -> Iterator[tuple[bytes, Media]]:
        """Yield pictures that prompts have yet to compute, with their owner, the first ones first.

        They are those of running sequences, and of as many waiting ones as may run.
        """
        prompts = [sequence for sequence in self._running if sequence.is_prefill]
        for sequence in chain(prompts, islice(self._waiting, self.config.max_num_seqs)):
            if not sequence.media:
                continue
            computed = sequence.num_computed_tokens
            if sequence.status is SequenceStatus.WAITING:
                computed = self._blocks.num_cached_tokens(sequence)
            for media in sequence.media:
                if media.stop > computed:
                    yield sequence.owner, media

    def _preempt_youngest(self) -> Sequence:
        sequence = self._running.pop()
        self._blocks.free(sequence)
        sequence.restart()
        self._waiting.put_back(sequence)
        self._released.append(sequence.seq_id)
        self._num_preemptions += 1
        return sequence

    def take_released(self) -> tuple[int, ...]:
        """Return the ids of sequences whose state must be dropped, and clear the list."""
        released = tuple(self._released)
        self._released.clear()
        return released

    # The result of a step

    def submitted(self, output: SchedulerOutput) -> None:
        """Record that a step was submitted: its tokens are in flight, its KV written."""
        blocks, size = self._blocks, self._blocks.block_size
        for sequence in output.decoding:
            if sequence.status is _FINISHED:
                continue  # It finished after the step was scheduled, and its blocks are freed.
            sequence.num_computed_tokens = end = sequence.num_computed_tokens + 1
            if end % size == 0:
                blocks.publish_prefix(sequence)
        for chunk in output.prefill:
            if chunk.sequence.is_finished:
                continue
            sequence = chunk.sequence
            end = sequence.num_computed_tokens = chunk.start + chunk.length
            sequence.snapshot = None
            if sequence.wants_prompt_logprobs:
                known = min(end, len(sequence.prompt_token_ids) - 1)
                # A prompt that was preempted may have more from its first run.
                sequence.num_prompt_logprobs = max(sequence.num_prompt_logprobs, known)
            blocks.publish_prefix(sequence)
        if blocks.releases_blocks:
            for sequence in output.members:
                if not sequence.is_finished:
                    self._blocks.release_unseen(sequence)
        sampled = output.sampled
        for sequence in sampled:
            sequence.num_inflight += 1
        self._num_inflight += len(sampled)
        self._num_computed += output.num_tokens
        self._num_steps += 1
        self._num_mixed_steps += bool(output.decoding and output.prefill)

    def collect(
        self, output: SchedulerOutput, token_ids: Iterable[int | None]
    ) -> list[tuple[int, Sequence]]:
        """Append the tokens that a submitted step sampled to its sequences.

        Returns (index into `token_ids`, sequence) for each token that was appended; sequences that
        finished while the step was in flight get none. `is_finished` says which sequences a token
        ended. Finish sequences with NaN logits before calling this. None in `token_ids` means that
        the sequence's newest token is computed again.
        """
        taken, sampled = [], output.sampled
        self._num_inflight -= len(sampled)
        for index, (sequence, token_id) in enumerate(zip(sampled, token_ids, strict=True)):
            sequence.num_inflight -= 1
            if token_id is None:
                sequence.num_computed_tokens -= 1
            elif self.take(sequence, token_id):
                taken.append((index, sequence))
        return taken

    def take(self, sequence: Sequence, token_id: int) -> bool:
        """Append a token to a sequence; return False if it has finished.

        Called after `collect` for the tokens of an accepted proposal. The step has computed the
        keys and values of the token before.
        """
        if sequence.status is _FINISHED:
            return False
        output = sequence.output_token_ids
        num_known = len(sequence.prompt_token_ids) + len(output)
        if sequence.num_computed_tokens < num_known:
            sequence.num_computed_tokens = num_known
            if self._blocks.releases_blocks:
                self._blocks.release_unseen(sequence)
        output.append(token_id)
        self._generated_tokens += 1
        if (num_known + 1) // self._blocks.block_size > sequence.num_published_blocks:
            self._blocks.publish_prefix(sequence)
        if ending := sequence.ending():
            self.finish(sequence, *ending)
        return True

    def verified(self, proposal: Proposal, num_accepted: int) -> None:
        """Count a proposal, and the first token if that is accepted: `collect` appends it next."""
        proposal.sequence.num_proposed_tokens += len(proposal.token_ids)
        proposal.sequence.num_accepted_tokens += min(num_accepted, 1)

    def fail(self, output: SchedulerOutput) -> list[Sequence]:
        """End and return the sequences of a submitted step that failed.

        The contents of all blocks may be wrong now, so the prefix cache is emptied and all other
        sequences are computed again.
        """
        for sequence in output.sampled:
            sequence.num_inflight -= 1
            self._num_inflight -= 1
        self._blocks.forget_content()
        failed = [sequence for sequence in output.members if not sequence.is_finished]
        for sequence in failed:
            self.finish(sequence, FinishReason.ERROR)
        while self._running:
            self._preempt_youngest()
        return failed

    def stats(self) -> EngineStats:
        """Return counters since the start, and current gauges."""
        return EngineStats(
            num_running=len(self._running),
            num_waiting=len(self._waiting),
            num_steps=self._num_steps,
            num_mixed_steps=self._num_mixed_steps,
            num_preemptions=self._num_preemptions,
            num_finished=self._num_finished,
            prompt_tokens=self._prompt_tokens,
            cached_tokens=self._cached_tokens,
            generated_tokens=self._generated_tokens,
            blocks_total=self._blocks.num_total,
            blocks_used=self._blocks.num_used,
            blocks_cached=self._blocks.num_cached,
            live_tokens=sum(sequence.num_computed_tokens for sequence in self._running),
        )


def _outside_spans(sequence: Sequence, start: int, stop: int, most: int) -> int:
    """Return the position near `stop` at which a chunk from `start` may end: not within a span.

    It is before the span, or after one that has begun if that takes at most `most` tokens; `start`
    if the span has to wait.
    """
    for media in sequence.media:
        for first, end in media.spans:
            if first < stop < end:
                if start < first:
                    return first
                return end if end - start <= most else start
    return stop
