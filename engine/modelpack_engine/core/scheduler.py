"""Scheduler: continuous batching, from waiting requests to the token rows of each step.

Pure Python without MLX: `Engine` asks `Scheduler.schedule` for a `SchedulerOutput`, runs it, and
returns the sampled tokens by `Scheduler.collect`. `SchedulerConfig` holds the limits,
`WaitingQueue` the order of admission, and `BlockManager` the blocks.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterable, Iterator, Mapping
from collections.abc import Sequence as Tokens
from dataclasses import dataclass
from operator import attrgetter

from modelpack_engine.config import DEFAULT_MAX_WAITING
from modelpack_engine.core.block_manager import BlockManager
from modelpack_engine.core.buckets import EXACT, Buckets, round_down
from modelpack_engine.core.sequence import Sequence, SequenceStatus
from modelpack_engine.errors import ContextLengthError, EngineError, QueueFullError, RequestError
from modelpack_engine.outputs import EngineStats, FinishReason

#: Seconds after which a request that found the queue full may be sent again (Retry-After).
RETRY_AFTER = 1.0


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
    max_waiting: int = DEFAULT_MAX_WAITING
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


#: What each sequence may go on with.
Proposed = Mapping[Sequence, Tokens[int]]


def fit_proposals(
    decode: list[Sequence],
    proposed: Proposed | None,
    config: SchedulerConfig,
    blocks: BlockManager,
) -> tuple[list[Sequence], list[Proposal]]:
    """Part the sequences that decode into those that do so alone, and those with a proposal.

    A proposal is cut to the rows of a step, to what its sequence may still generate, and to the
    blocks that are available: the scheduler preempts no sequence for a proposal.
    """
    if not proposed:
        return decode, []
    alone: list[Sequence] = []
    proposals: list[Proposal] = []
    rows = len(decode)
    for sequence in decode:
        token_ids = tuple(proposed.get(sequence, ()))
        # The step samples one token more than are proposed.
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


#: Tokens computed meanwhile that make up for one token of a prompt. More shortens the wait of most,
#: and lengthens that of the longest.
OVERTAKING = 16

#: The most sequences admitted in one round. Without a limit, new owners could keep one that had its
#: turn waiting forever.
ROUND = 64

_PREEMPTED = -1  # before all that have not run
_by_priority = attrgetter("priority")


class WaitingQueue:
    """Sequences of the same owner by priority, the least first; of equal ones, who came first.

    Each is overtaken by those that have fewer tokens to compute and come before `overtaking` tokens
    have been computed for each one that they have fewer; 0: never. Who was preempted precedes all.

    In a round, each owner has one turn: the sequence with the least priority of those whose owners
    have had none. A round ends when there is no other, or after `ROUND` turns.
    """

    def __init__(self, overtaking: int) -> None:
        self._overtaking = overtaking
        self._preempted: list[Sequence] = []
        self._owners: dict[bytes, list[Sequence]] = {}
        self._served: set[bytes] = set()  # in this round
        self._count = 0

    def __len__(self) -> int:
        return self._count

    @property
    def first(self) -> Sequence:
        """Who is to be admitted next; there is one."""
        return self._next()[0]

    def add(self, sequence: Sequence, num_uncached: int, now: int) -> None:
        """Take a sequence that has come, with so many tokens to compute, when `now` were."""
        sequence.priority = now + self._overtaking * num_uncached
        insort(self._owners.setdefault(sequence.cache_salt, []), sequence, key=_by_priority)
        self._count += 1

    def put_back(self, sequence: Sequence) -> None:
        """Take a sequence that was preempted."""
        sequence.priority = _PREEMPTED
        self._preempted.insert(0, sequence)
        self._count += 1

    def pop(self) -> Sequence:
        """Remove and return the first."""
        sequence = self._next()[0]
        if sequence.priority != _PREEMPTED:
            if sequence.cache_salt in self._served or len(self._served) == ROUND:
                self._served.clear()
            self._served.add(sequence.cache_salt)
        self.remove(sequence)
        return sequence

    def remove(self, sequence: Sequence) -> None:
        """Remove a sequence that has ended."""
        if sequence.priority == _PREEMPTED:
            self._preempted.remove(sequence)
        else:
            queue = self._owners[sequence.cache_salt]
            queue.remove(sequence)
            if not queue:
                del self._owners[sequence.cache_salt]
        self._count -= 1
        if not self._count:
            self._served.clear()

    def _next(self) -> list[Sequence]:
        """Return the preempted sequences, or the queue of the next owner if there are none."""
        if self._preempted:
            return self._preempted
        if len(self._owners) == 1:
            return next(iter(self._owners.values()))
        served = self._served if len(self._served) < ROUND else ()
        queues = [queue for owner, queue in self._owners.items() if owner not in served]
        return min(queues or self._owners.values(), key=_of_first)


def _of_first(queue: list[Sequence]) -> tuple[int, int]:
    return queue[0].priority, queue[0].seq_id


class Scheduler:
    """Continuous batching over one pool of blocks.

    Every sequence that decodes is in every step; what is left of the step goes to prompts, in the
    order of admission. Among these, at most one that needs several steps goes first: the others of
    its kind take what shorter prompts leave over. So neither one long prompt nor several hold up
    streams or short prompts, and the oldest long one always moves.

    When blocks run out, the youngest sequence (admitted last) is preempted: it gives up its blocks
    and is computed again as soon as there is room. First, tokens in flight are collected: some may
    end a sequence.
    """

    def __init__(self, config: SchedulerConfig, blocks: BlockManager) -> None:
        self.config = config
        self._chunk_rows = config.chunk_rows
        self._blocks = blocks
        self._waiting = WaitingQueue(config.overtaking)
        self._running: list[Sequence] = []  # in the order of admission
        self._requests: dict[str, list[Sequence]] = {}
        self._released: list[int] = []
        self._num_inflight = 0
        self._num_computed = 0
        self._num_steps = self._num_mixed_steps = self._num_preemptions = self._num_finished = 0
        self._prompt_tokens = self._cached_tokens = self._generated_tokens = 0

    # Requests come and go.

    @property
    def has_work(self) -> bool:
        """Whether a sequence is unfinished or a sampled token unread."""
        return bool(self._requests) or self._num_inflight > 0

    def add(self, *sequences: Sequence) -> None:
        """Queue the choices of one request, all or none of them.

        Raises `RequestError` if the request can never be served, and `QueueFullError` if it cannot
        be taken now.
        """
        first, config = sequences[0], self.config
        num_tokens = len(first.prompt_token_ids)
        capacity = self._blocks.num_total * self._blocks.block_size
        if self._blocks.most_held(self._chunk_rows) is not None:
            capacity = max(capacity, config.max_model_len)
        if first.request_id in self._requests:
            raise RequestError(f"request {first.request_id!r} runs already", param="request_id")
        if num_tokens == 0:
            raise RequestError("the prompt is empty", param="prompt")
        if num_tokens >= config.max_model_len:
            raise ContextLengthError(
                f"the prompt has {num_tokens} tokens; the context is {config.max_model_len} tokens "
                "for prompt and answer",
                param="prompt",
            )
        if num_tokens > capacity:
            raise ContextLengthError(
                f"the prompt has {num_tokens} tokens; the KV cache holds {capacity}",
                param="prompt",
                hint="give the engine more memory for its KV cache",
            )
        if len(sequences) > config.max_waiting:
            raise RequestError(
                f"{len(sequences)} choices; the queue holds {config.max_waiting}", param="n"
            )
        if len(self._waiting) + len(sequences) > config.max_waiting:
            raise QueueFullError(
                f"the queue is full: {len(self._waiting)} sequences wait, the limit is "
                f"{config.max_waiting}",
                retry_after=RETRY_AFTER,
                hint="try again later",
            )
        num_cached = self._blocks.num_cached_tokens(first) if config.overtaking else 0
        for sequence in sequences:
            # The KV of the very last token is never needed: hence the 1 over the capacity.
            sequence.max_num_tokens = min(
                num_tokens + sequence.params.max_tokens, config.max_model_len, capacity + 1
            )
            self._waiting.add(sequence, num_tokens - num_cached, self._num_computed)
        self._requests[first.request_id] = list(sequences)

    def abort(self, request_id: str, index: int | None = None) -> list[Sequence]:
        """End a request's choices, or one of them, at once; return those that were unfinished."""
        choices = self._requests.get(request_id, ())
        sequences = [choice for choice in choices if index is None or choice.index == index]
        for sequence in sequences:
            self.finish(sequence, FinishReason.ABORT)
        return sequences

    def finish(
        self, sequence: Sequence, reason: FinishReason, stop_reason: str | int | None = None
    ) -> None:
        """End a sequence and free its blocks; what a step in flight samples for it is dropped."""
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
        self._num_finished += 1
        choices = self._requests[sequence.request_id]
        choices.remove(sequence)
        if not choices:
            del self._requests[sequence.request_id]

    # A step.

    def decoding(self) -> list[Sequence]:
        """Return the sequences that the next step would have decode, as far as is known now."""
        return [seq for seq in self._running if not seq.is_prefill and not seq.is_full]

    def schedule(self, proposed: Proposed | None = None) -> SchedulerOutput | None:
        """Return the next step, or None if nothing can be computed before `collect` is called.

        It verifies what is `proposed`, as far as there is room, for sequences with nothing in
        flight. None while nothing is in flight means that there is no work. An output that is never
        submitted has changed nothing but block tables: the next call returns the same again.
        """
        preempted: list[Sequence] = []
        decode = self._schedule_decode(preempted)
        if decode is None:
            return None
        decode, proposals = fit_proposals(decode, proposed, self.config, self._blocks)
        decode_rows = len(decode) + sum(1 + len(proposal.token_ids) for proposal in proposals)
        rows = self.config.max_num_batched_tokens - self.config.buckets.pad_rows(decode_rows)
        # Who has just given up blocks shall not have them back before they are used.
        prefill = self._schedule_prefill(rows, admit=not preempted, alone=not decode_rows)
        if not decode_rows and not prefill:
            # Prompts are admitted only if all of them have room once nobody decodes.
            idle = self._num_inflight or not self._running or self._blocks.is_awaited
            assert idle, "prompts block each other"
            return None
        released = self.take_released()
        return SchedulerOutput(
            tuple(decode), tuple(prefill), tuple(proposals), tuple(preempted), released
        )

    def _schedule_decode(self, preempted: list[Sequence]) -> list[Sequence] | None:
        """Return what decodes, each with a place for its token; None: collect first."""
        decode, size = list[Sequence](), self._blocks.block_size
        for sequence in self._running.copy():
            if preempted and sequence.status is not SequenceStatus.RUNNING:
                break  # preempted in this loop, as are all younger ones
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
        """Return chunks of prompts for at most `rows` rows; admit sequences if rows are left."""
        buckets, chunks = self.config.buckets, list[PrefillChunk]()
        smallest = buckets.pad_chunk(1)
        computing: set[bytes] = set()
        long_prompts: list[Sequence] = []

        def take(sequence: Sequence) -> None:
            nonlocal rows
            most = self.config.chunk_rows_at(sequence.num_computed_tokens, alone=alone)
            if chunk := self._chunk(sequence, min(rows, most), computing):
                chunks.append(chunk)
                rows -= buckets.pad_chunk(chunk.length)

        prompts = self._prompts(admit)
        while rows >= smallest and (sequence := next(prompts, None)):
            if buckets.pad_chunk(sequence.num_remaining_tokens) > self._chunk_rows:
                long_prompts.append(sequence)
                if len(long_prompts) > 1:
                    continue
            take(sequence)
        for sequence in long_prompts[1:]:
            if rows >= smallest:
                take(sequence)
        return chunks

    def _prompts(self, admit: bool) -> Iterator[Sequence]:
        """Yield the running sequences in prefill, then those that can be admitted, one by one.

        Each has been given what the prefix cache has for it by now.
        """
        prompts = [sequence for sequence in self._running if sequence.is_prefill]
        for sequence in prompts:
            self._share_prefix(sequence)
            yield sequence
        promised = sum(map(self._num_lacking, prompts))
        while admit and self._waiting and len(self._running) < self.config.max_num_seqs:
            sequence = self._waiting.first
            matched = self._blocks.match_prefix(sequence)
            lacking = self._num_lacking(sequence, matched)
            if not self._blocks.can_allocate(promised + lacking + self._blocks.num_idle(matched)):
                return  # nobody overtakes the first
            self._admit(self._waiting.pop())
            yield sequence
            promised += self._num_lacking(sequence)

    def _num_lacking(self, sequence: Sequence, matched: list[int] | None = None) -> int:
        """Return the blocks that a sequence still needs to sample a token and compute that.

        Those that match are not among them.
        """
        blocks = self._blocks
        needed = blocks.blocks_for(sequence.num_prefill_tokens + 1)
        lacking = needed - len(sequence.block_table) - len(matched or ())
        most = blocks.most_held(self._chunk_rows) or blocks.num_total
        return min(lacking, most - blocks.num_held(sequence, matched))

    def _admit(self, sequence: Sequence) -> None:
        self._running.append(sequence)
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
        self, sequence: Sequence, max_rows: int, computing: set[bytes]
    ) -> PrefillChunk | None:
        """Return what a prompt computes in this step, None if it has to wait.

        It waits for blocks, for those on their way from the offload, and for another prompt of this
        step to compute what it needs next (in `computing`, to which its own are added): in the next
        step it can share that.
        """
        blocks, buckets, block_size = self._blocks, self.config.buckets, self._blocks.block_size
        if blocks.next_hash(sequence) in computing or blocks.awaits_blocks(sequence):
            return None
        start, remaining = sequence.num_computed_tokens, sequence.num_remaining_tokens
        length = buckets.fit_chunk(remaining, max_rows)
        if length > (room := blocks.room_for(sequence)):
            length = round_down(room, buckets.chunk)
        if length < remaining and (start + length) // block_size > start // block_size:
            length -= (start + length) % block_size  # sharing goes on at a block's end only
        if (end := blocks.next_snapshot(sequence)) is not None:
            length = min(length, end - start)
        if length <= 0:
            return None
        grown = blocks.grow(sequence, start + length)
        assert grown, "the chunk was made to fit"
        computing.update(blocks.hashes_between(sequence, start, start + length))
        return PrefillChunk(sequence, start, length, is_last=length == remaining)

    def _preempt_youngest(self) -> Sequence:
        sequence = self._running.pop()
        self._blocks.free(sequence)
        sequence.restart()
        self._waiting.put_back(sequence)
        self._released.append(sequence.seq_id)
        self._num_preemptions += 1
        return sequence

    def take_released(self) -> tuple[int, ...]:
        """Return the sequences whose state on the device is void, once; an idle engine asks."""
        released = tuple(self._released)
        self._released.clear()
        return released

    # What became of a step.

    def submitted(self, output: SchedulerOutput) -> None:
        """Take note that the device has a step: its KV counts as written, its tokens as sampled."""
        blocks, size = self._blocks, self._blocks.block_size
        for sequence in output.decoding:
            if sequence.is_finished:
                continue  # since the step was scheduled: its blocks are no longer its own
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
                # Of a prompt that was preempted, some are known from the first time.
                sequence.num_prompt_logprobs = max(sequence.num_prompt_logprobs, known)
            blocks.publish_prefix(sequence)
        if blocks.window is not None:
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
        """Give the sequences of a submitted step the tokens that it sampled.

        Returns (index into `token_ids`, sequence) of each token that counts: a sequence that had
        finished before (end of sequence is seen one step late) does not. `is_finished` tells which
        sequences this ended. Whose token is no token (NaN logits) is to be finished before; one
        that has None has its newest token computed again.
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
        """Give a sequence its next token; False, and nothing done, if it has finished.

        After `collect`, for what a step sampled after tokens that were proposed: of the token
        before it, that step has computed the KV.
        """
        if sequence.is_finished:
            return False
        sequence.num_computed_tokens = max(sequence.num_computed_tokens, sequence.num_known_tokens)
        sequence.output_token_ids.append(token_id)
        self._generated_tokens += 1
        self._blocks.publish_prefix(sequence)
        if ending := sequence.ending():
            self.finish(sequence, *ending)
        return True

    def verified(self, proposal: Proposal, num_accepted: int) -> None:
        """Take note of how many tokens of a proposal were right, before these are taken."""
        proposal.sequence.num_proposed_tokens += len(proposal.token_ids)
        proposal.sequence.num_accepted_tokens += num_accepted

    def fail(self, output: SchedulerOutput) -> list[Sequence]:
        """Take note that a submitted step failed and its tokens will never come.

        Its sequences end with an error, and are returned. As nothing on the device is to be trusted
        any more, the prefix cache is emptied and all other sequences start again.
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
        """Return counters since the start and gauges of this moment."""
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
