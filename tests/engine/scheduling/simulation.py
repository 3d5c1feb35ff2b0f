"""Scheduler, blocks and a fake device together, with all invariants checked at every step."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Literal

import pytest

from modelpack_engine.core.batch import StepBatch, build_batch
from modelpack_engine.core.block_manager import BlockManager, PrefixSnapshots
from modelpack_engine.core.block_pool import NULL_BLOCK, BlockPool
from modelpack_engine.core.buckets import EXACT, Buckets
from modelpack_engine.core.scheduler import Scheduler, SchedulerConfig, SchedulerOutput
from modelpack_engine.core.sequence import Sequence, SequenceStatus
from modelpack_engine.errors import QueueFullError
from modelpack_engine.outputs import FinishReason
from modelpack_engine.request import SamplingParams
from tests.engine.scheduling.device import EOS, FakeDevice, alone

#: When the host reads the tokens of a step: at once, after the next step is built, or after the
#: next step is submitted.
Mode = Literal["sync", "build-ahead", "one-ahead"]
MODES: tuple[Mode, ...] = ("sync", "build-ahead", "one-ahead")


def sequence(
    prompt: list[int],
    max_tokens: int = 4,
    *,
    request_id: str = "r",
    salt: bytes = b"",
    owner: bytes = b"",
    eos: bool = False,
    background: bool = False,
    **params: object,
) -> Sequence:
    """Return a waiting sequence."""
    return Sequence(
        request_id,
        prompt,
        SamplingParams(max_tokens=max_tokens, **params),  # type: ignore[arg-type]
        eos_token_ids=frozenset({EOS}) if eos else frozenset(),
        cache_salt=salt,
        owner=owner,
        background=background,
    )


def audit(blocks: BlockManager, sequences: list[Sequence]) -> None:
    """Check the block manager's counts against the tables of all sequences."""
    restores = [seq.restore for seq in sequences if seq.restore is not None]
    for index, pool in enumerate(blocks.window_pools):
        others = [seq.window_tables[index] for seq in sequences if seq.window_tables]
        others += [restore.blocks[index + 1] for restore in restores]
        audit_pool(pool, Counter(block for table in others for block in table if block))
        for seq in sequences:
            for table in seq.window_tables:
                assert len(table) == len(seq.block_table), "tables are of different lengths"
    tables = [seq.block_table[seq.num_unseen_blocks :] for seq in sequences]
    held = [restore.blocks[0] for restore in restores]
    refs = Counter(block for table in (*tables, *held) for block in table if block != NULL_BLOCK)
    for seq in sequences:
        unseen = seq.block_table[: seq.num_unseen_blocks]
        assert set(unseen) <= {NULL_BLOCK}, "a block is kept that no token will see"
        assert NULL_BLOCK not in seq.block_table[seq.num_unseen_blocks :]
    for table in tables:
        assert len(set(table)) == len(table), "a block is twice in a table"
    audit_pool(blocks.pool, refs)


def audit_pool(pool: BlockPool, refs: Counter[int]) -> None:
    """Check the counts of a pool whose blocks have these references."""
    everything = range(len(pool._ref_counts))
    assert [refs[block] for block in everything] == pool._ref_counts, "ref counts are wrong"
    places = [*pool._free, *pool._cached, *refs]
    assert sorted(places) == list(everything)[1:], "a block is lost, or in two places"
    assert NULL_BLOCK not in places
    assert pool._block_of == {hash_: block for block, hash_ in pool._hash_of.items()}
    assert all(block in pool._hash_of for block in pool._cached)
    assert not any(block in pool._hash_of for block in pool._free)
    assert pool.num_used == len(refs)
    assert pool.num_total == pool.num_available + pool.num_used


@dataclass(slots=True)
class Step:
    """A submitted step that the host has not read."""

    output: SchedulerOutput
    batch: StepBatch
    token_ids: list[int]


@dataclass(slots=True)
class Simulation:
    """An engine without a model; `step` is one iteration of its loop."""

    num_blocks: int = 12
    block_size: int = 4
    max_num_seqs: int = 4
    max_num_batched_tokens: int = 16
    max_prefill_chunk: int | None = None
    whole_steps: bool = False
    max_model_len: int = 1000
    max_waiting: int = 1000
    buckets: Buckets = EXACT
    prefix_caching: bool = True
    recurrent: bool = False
    num_snapshots: int = 5
    snapshot_interval: int = 0
    snapshots_within_chunks: bool = False
    window: int | None = None
    #: Pairs (window, number of blocks) of layers that see less.
    window_pools: tuple[tuple[int, int], ...] = ()
    overtaking: int = 0
    mode: Mode = "build-ahead"

    blocks: BlockManager = field(init=False)
    scheduler: Scheduler = field(init=False)
    device: FakeDevice = field(init=False)
    others: list[FakeDevice] = field(init=False)  # the layers of window pools
    pending: Step | None = field(default=None, init=False)
    sequences: list[Sequence] = field(default_factory=list, init=False)
    #: Sequences in the order of their first admission, and where the others wait.
    admitted: list[Sequence] = field(default_factory=list, init=False)
    places: dict[int, tuple[int, int]] = field(default_factory=dict, init=False)
    served: set[bytes] = field(default_factory=set, init=False)  # owners with a turn in this round
    num_computed: int = field(default=0, init=False)
    content: dict[bytes, tuple[object, ...]] = field(default_factory=dict, init=False)
    outputs: list[SchedulerOutput] = field(default_factory=list, init=False)
    wasted_rows: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self.blocks = BlockManager(
            self.num_blocks,
            self.block_size,
            model_id="model",
            enable_prefix_caching=self.prefix_caching,
            snapshots=PrefixSnapshots(
                self.num_snapshots, within_chunks=self.snapshots_within_chunks
            )
            if self.recurrent
            else None,
            snapshot_interval=self.snapshot_interval,
            window=self.window,
            window_pools=self.window_pools,
        )
        config = SchedulerConfig(
            max_num_seqs=self.max_num_seqs,
            max_num_batched_tokens=self.max_num_batched_tokens,
            max_model_len=self.max_model_len,
            max_prefill_chunk=self.max_prefill_chunk,
            whole_steps=self.whole_steps,
            max_waiting=self.max_waiting,
            overtaking=self.overtaking,
            buckets=self.buckets,
        )
        self.scheduler = Scheduler(config, self.blocks)
        self.device = FakeDevice(
            self.num_blocks, self.block_size, self.recurrent, self.blocks.snapshots, self.window
        )
        self.others = [
            FakeDevice(count, self.block_size, window=window, sequences=self.device.sequences)
            for window, count in self.window_pools
        ]

    # Events

    def add(self, first: Sequence, n: int = 1) -> list[Sequence]:
        """Add a request of `n` choices, unless the queue is full."""
        choices = [first, *(first.fork(index) for index in range(1, n))]
        if self.scheduler.stats().num_waiting + n > self.max_waiting:
            with pytest.raises(QueueFullError) as caught:
                self.scheduler.add(*choices)
            assert caught.value.retry_after > 0
            return []
        cached = len(self.blocks.match_prefix(first)) * self.block_size
        place = self.num_computed + self.overtaking * (len(first.prompt_token_ids) - cached)
        self.scheduler.add(*choices)
        self.places |= {seq.seq_id: (place, seq.seq_id) for seq in choices}
        self.sequences += choices
        self.device.sequences |= {choice.seq_id: choice for choice in choices}
        return choices

    def abort(self, request_id: str) -> None:
        used = self.blocks.num_used
        for seq in self.scheduler.abort(request_id):
            assert seq.finish_reason is FinishReason.ABORT
            assert not seq.block_table
        assert self.blocks.num_used <= used
        self.check()

    def fail(self) -> None:
        """Fail the step in flight, and clear the device."""
        if self.pending is None:
            return
        step, self.pending = self.pending, None
        members = [*step.output.decode, *(chunk.sequence for chunk in step.output.prefill)]
        live = [seq for seq in members if not seq.is_finished]
        assert self.scheduler.fail(step.output) == live
        assert {seq.finish_reason for seq in live} <= {FinishReason.ERROR}
        for device in (self.device, *self.others):
            device.memory = [None] * len(device.memory)
        self.check()

    def aborting(self, request_id: str) -> Callable[[], None]:
        """Return an event that aborts a request, as when its client disconnects."""
        return lambda: self.abort(request_id)

    def stopping(self, request_id: str) -> Callable[[], None]:
        """Return an event that ends a request's sequences, as for a stop string."""

        def stop() -> None:
            for seq in self.sequences:
                if seq.request_id == request_id and seq.output_token_ids:
                    self.scheduler.finish(seq, FinishReason.STOP, "stop string")
            self.check()

        return stop

    def step(self, between: Callable[[], None] | None = None) -> bool:
        """Run a step; return False if there is none. Call `between` while its graph is built."""
        output = self._schedule()
        while output is None and (self.pending is not None or self.await_blocks()):
            self.collect()
            output = self._schedule()
        if output is None:
            assert not self.scheduler.has_work, "there is work, and none is scheduled"
            return False
        previous = self.pending
        batch = build_batch(
            output,
            previous.batch if previous else None,
            self.buckets,
            self.block_size,
            self.blocks.snapshot_interval,
        )
        self._check_batch(output, batch)
        if between is not None:
            between()
        if self.mode != "one-ahead":
            self.collect()
        known = previous.token_ids if previous else []
        token_ids = self.device.run(batch, known)
        for group, device in enumerate(self.others, 1):
            device.run(replace(batch.of_group(group), decode_snapshots=()), known)
            assert device.window is not None
            for row, entries in self.device.read.items():
                assert device.read[row] == entries[-device.window :], "another prefix is read"
        self.scheduler.submitted(output)
        if self.mode == "one-ahead":
            self.collect()
        self.pending = Step(output, batch, token_ids)
        self.outputs.append(output)
        self.num_computed += output.num_tokens
        if self.mode == "sync":
            self.collect()
        for seq in self.running:
            needed = self.blocks.blocks_for(seq.num_computed_tokens)
            assert len(seq.block_table) == needed, "more than a partial block is wasted"
        self.check()
        return True

    def await_blocks(self) -> bool:
        """Complete something that sequences wait for; return whether there was anything."""
        return False

    def drain(self) -> None:
        """Run until all requests have ended, within a limit on the number of steps."""
        live = [seq for seq in self.sequences if not seq.is_finished]
        work = sum(seq.max_num_tokens for seq in live)
        for _ in range(work * (len(live) + 1) + 4):
            if not self.step():
                break
        assert not self.scheduler.has_work, "somebody starves"
        assert all(seq.is_finished for seq in self.sequences)
        for pool in (self.blocks.pool, *self.blocks.window_pools):
            assert pool.num_used == 0, "blocks leak"
        assert not self.scheduler._requests
        for seq_id in self.scheduler.take_released():
            self.device.states.pop(seq_id, None)
        assert not self.device.states, "the device keeps state of sequences that are gone"

    @property
    def running(self) -> list[Sequence]:
        """Return the running sequences, the oldest first; a preempted one keeps its age."""
        return [seq for seq in self.admitted if seq.status is SequenceStatus.RUNNING]

    @property
    def waiting(self) -> list[Sequence]:
        """Return the waiting sequences in the order of admission."""
        preempted = [seq for seq in self.admitted if seq.status is SequenceStatus.WAITING]
        fresh = [seq for seq in self.sequences if seq not in self.admitted and not seq.is_finished]
        return preempted + self._in_turns(sorted(fresh, key=lambda seq: self.places[seq.seq_id]))

    def _in_turns(self, left: list[Sequence]) -> list[Sequence]:
        """Return sequences in the order of their owners' turns."""
        order, served = list[Sequence](), set(self.served)
        while left:
            due = [seq for seq in left if seq.owner not in served]
            if not due:
                due, served = left, set()
            order.append(due[0])
            served.add(due[0].owner)
            left = [seq for seq in left if seq is not due[0]]
        return order

    def _count_turn(self, seq: Sequence) -> None:
        if seq.owner in self.served:
            self.served.clear()
        self.served.add(seq.owner)

    # Invariants

    def check(self) -> None:
        """Check all invariants."""
        scheduler = self.scheduler
        audit(self.blocks, self.sequences)
        assert scheduler._running == self.running
        assert len(scheduler._running) <= self.max_num_seqs
        assert len(scheduler._waiting) == len(self.waiting)
        if self.waiting:
            assert scheduler._waiting.first is self.waiting[0]
        else:
            self.served.clear()
        inflight = Counter(self.pending.output.sampled if self.pending else ())
        for seq in self.sequences:
            assert seq.num_inflight == inflight[seq], "a token in flight is lost"
            assert seq.block_table == [] or seq in self.running
            self._check_tokens(seq)
            if seq in self.running and self.blocks.enable_prefix_caching:
                full = min(seq.num_computed_tokens, seq.num_known_tokens) // self.block_size
                assert seq.num_published_blocks == full, "a full block is not to be found"
        self._check_published()

    def _check_tokens(self, seq: Sequence) -> None:
        """Check that a sequence has the tokens that it would have alone."""
        outputs = seq.output_token_ids
        limit = seq.max_num_tokens - len(seq.prompt_token_ids)
        assert len(outputs) <= limit
        assert outputs == alone(
            seq.prompt_token_ids, seq.cache_salt, seq.index, len(outputs), self.window
        )
        self._check_window(seq)
        ends = seq.eos_token_ids if not seq.params.ignore_eos else frozenset()
        ends = {*ends, *seq.params.stop_token_ids}
        assert not ends & set(outputs[seq.params.min_tokens : -1]), "it went on after its end"
        if seq.finish_reason is FinishReason.LENGTH:
            assert len(outputs) == limit
        if seq.finish_reason is FinishReason.STOP and not isinstance(seq.stop_reason, str):
            assert outputs[-1] in ends
        if not seq.is_finished:
            assert len(outputs) < limit

    def _check_window(self, seq: Sequence) -> None:
        """Check that visible tokens have blocks, and tokens before the window have none."""
        for pool, table in zip(self.blocks.window_pools, seq.window_tables, strict=False):
            assert pool.window is not None
            unseen = max(0, seq.num_computed_tokens - pool.window) // self.block_size
            free = [block == NULL_BLOCK for block in table]
            assert free == [True] * unseen + [False] * (len(table) - unseen) or not table
            most = self.blocks.most_held(self.scheduler.config.chunk_rows, pool)
            assert most is None or free.count(False) <= most
        if self.window is None:
            assert seq.num_unseen_blocks == 0
            return
        if seq not in self.running:
            return
        unseen = max(0, seq.num_computed_tokens - self.window) // self.block_size
        assert seq.num_unseen_blocks <= unseen, "a block is given up that may be seen"
        assert seq.num_unseen_blocks == unseen, "a block is kept that no token will see"
        most = self.blocks.most_held(self.scheduler.config.chunk_rows)
        if most is not None:
            assert self.blocks.num_held(seq) <= most

    def _check_published(self) -> None:
        """Check that equal hashes mean equal, completely computed contents."""
        size = self.block_size
        for pool, device in zip(self.blocks.window_pools, self.others, strict=True):
            for hash_, block in pool._block_of.items():
                entries = tuple(device.memory[block * size : (block + 1) * size])
                assert None not in entries, "a block is published before it is computed"
                assert self.content.setdefault(hash_, entries) == entries, "a hit on other content"
        for hash_, block in self.blocks.pool._block_of.items():
            entries = tuple(self.device.memory[block * size : (block + 1) * size])
            assert None not in entries, "a block is published before it is computed"
            assert self.content.setdefault(hash_, entries) == entries, "a hit on other content"
        assert len(set(self.content.values())) == len(self.content)

    def _schedule(self) -> SchedulerOutput | None:
        before, queue = self.running, self.waiting
        decoding = [seq for seq in before if not seq.is_prefill and not seq.is_full]
        output = self.scheduler.schedule()
        admitted = [seq for seq in queue if seq.status is SequenceStatus.RUNNING]
        assert admitted == queue[: len(admitted)], "somebody was admitted out of turn"
        for seq in admitted:
            if seq not in self.admitted:
                self.admitted.append(seq)
                self._count_turn(seq)
        if output is None:
            fewer = self.running == before or set(self.running) < set(before)
            assert fewer or self.blocks.is_awaited
            return None
        assert output.decode or output.prefill
        assert {*output.decode, *output.preempted} >= set(decoding), "a stream is held up"
        assert {*output.decode} <= set(decoding), "a row for a token that nobody needs"
        if output.preempted:
            assert self.pending is None, "preempted before tokens in flight were collected"
            assert not admitted
            assert before == [*self.running, *reversed(output.preempted)], "an old one gave way"
        audit(self.blocks, self.sequences)
        return output

    def _check_batch(self, output: SchedulerOutput, batch: StepBatch) -> None:
        chunk_rows = self.scheduler.config.chunk_rows
        if self.whole_steps and (output.decode or len(output.prefill) > 1):
            least, half = self.buckets.pad_chunk(1), self.max_num_batched_tokens // 2
            rows = sum(chunk.padded_length for chunk in batch.chunks)
            assert not output.decode or rows <= max(half, least)
            chunk_rows = min(chunk_rows, max(half // (2 if output.decode else 1), least))
        assert batch.num_rows <= self.max_num_batched_tokens
        members = [*output.decode, *(chunk.sequence for chunk in output.prefill)]
        assert len(set(members)) == len(members)
        for part, chunk in zip(output.prefill, batch.chunks, strict=True):
            assert 0 < part.length <= chunk.padded_length <= chunk_rows
            assert part.is_last == (part.start + part.length == part.sequence.num_prefill_tokens)
            assert part.start < part.sequence.num_prefill_tokens, "the last token is computed"
        assert batch.sample_seqs == output.sampled

    def collect(self) -> None:
        """Read the tokens of the step in flight, if there is one."""
        if self.pending is None:
            return
        step, self.pending = self.pending, None
        live = [(i, seq) for i, seq in enumerate(step.output.sampled) if not seq.is_finished]
        taken = self.scheduler.collect(step.output, step.token_ids)
        assert taken == live
        self.wasted_rows += len(step.output.sampled) - len(taken)
        for index, seq in taken:
            assert seq.output_token_ids[-1] == step.token_ids[index]
