"""Negative controls: the other tests of this directory detect each of these mistakes.

Each row replaces a part of a method's source, which must be present.
"""

from __future__ import annotations

import inspect
import sys
import textwrap
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
from hypothesis import Phase, settings
from hypothesis.stateful import run_state_machine_as_test

from modelpack_engine.core import batch
from modelpack_engine.core.block_manager import BlockManager
from modelpack_engine.core.block_pool import BlockPool
from modelpack_engine.core.buckets import Buckets
from modelpack_engine.core.scheduler import Scheduler, SchedulerConfig, WaitingQueue
from modelpack_engine.core.sequence import Sequence
from tests.engine.scheduling import test_ends, test_order, test_sharing
from tests.engine.scheduling.driving import drive
from tests.engine.scheduling.test_block_manager import Blocks

SEEDS = range(80)

# Method, source, replacement.
MUTATIONS: list[tuple[Callable[..., Any], str, str]] = [
    # Blocks are leaked, freed twice, or allocated while they are used or cached.
    (BlockPool.release, "self._ref_counts[block] -= 1", "pass"),
    (BlockPool.release, "if block in self._hash_of", "if False"),
    (BlockPool.release, "self._free.append(block)", "pass"),
    (BlockPool.share, "counts[block] += 1", "counts[block] = 1"),
    (BlockPool.share, "del cached[block]", "pass"),
    (BlockPool.allocate, "del self._block_of[hash_]", "pass"),
    (BlockPool.__init__, "range(NULL_BLOCK + 1, num_blocks)", "range(num_blocks)"),
    (BlockManager.free, "reversed(table)", "table[1:]"),
    (BlockManager.free, "table.clear()", "pass"),
    (BlockManager.free, "sequence.num_published_blocks = 0", "pass"),
    (BlockManager.grow, "if not self.can_allocate(missing)", "if False"),
    (BlockManager.grow, "range(missing)", "range(missing and missing + 1)"),
    # Prefixes match that are not equal, not computed, or not shareable.
    (BlockManager._hash, "hashes[-1] if hashes else", ""),
    (BlockManager._hash, "sequence.cache_salt", "b''"),
    (BlockManager._hash, "token_ids(start, stop)", "token_ids(start, stop - 1)"),
    (BlockPool.publish, "hash_ not in self._block_of and", ""),
    (BlockManager.publish_prefix, "sequence.num_computed_tokens, ", "10**9, "),
    (BlockManager.publish_prefix, ", sequence.num_known_tokens", ", sequence.num_tokens"),
    (BlockManager._shareable, "sequence.num_prefill_tokens - 1", "sequence.num_prefill_tokens"),
    (BlockManager._may_share, "and between", ""),
    (BlockManager.share_prefix, "self.pool.share(blocks)", "pass"),
    (BlockManager._extend, "sequence.num_computed_tokens += count", "count"),
    (BlockManager._extend, "sequence.num_published_blocks += count", "pass"),
    # Sequences lose or gain tokens.
    (Sequence.restart, "self.num_prefill_tokens = self.num_tokens", "pass"),
    (Sequence.restart, "self.num_computed_tokens = 0", "pass"),
    (Sequence.ending, "> params.min_tokens", "> params.min_tokens + 1"),
    (Sequence.ending, "num_output >= self", "num_output > self"),
    (Sequence.token_ids, "if stop <= cut", "if start < cut"),
    # The scheduler breaks a limit, an order or a promise.
    (Scheduler.schedule, "self.take_released()", "()"),
    (SchedulerConfig.prompt_rows, "- self.buckets.pad_rows(num_decode)", ""),
    (SchedulerConfig.prompt_rows, "self._part(2)", "rows"),
    (SchedulerConfig.chunk_rows_at, "2 if alone else 4", "1"),
    (SchedulerConfig.chunk_rows_at, "(alone and only)", "alone"),
    (Scheduler.schedule, "admit=not preempted", "admit=True"),
    (Scheduler._schedule_decode, "if self._num_inflight:", "if False:"),
    (Scheduler._schedule_decode, "or sequence.is_full", ""),
    (Scheduler._schedule_decode, "computed < len", "computed <= len"),
    (Scheduler._schedule_prefill, "rows -= ", "rows -= 0 * "),
    (Scheduler._prompts, "len(self._running) < self.config.max_num_seqs", "True"),
    (Scheduler.add, " - num_cached", ""),
    (Scheduler.add, "self._num_computed", "0"),
    (Scheduler._chunk, "min(max_rows, most)", "max_rows"),
    (Scheduler._chunk, "length > (room := blocks.room_for(sequence))", "False"),
    (Scheduler._preempt_youngest, "self._running.pop()", "self._running.pop(0)"),
    (Scheduler._preempt_youngest, "self._blocks.free(sequence)", "sequence.block_table.clear()"),
    (Scheduler._preempt_youngest, "self._released.append(sequence.seq_id)", "pass"),
    (Scheduler.submitted, "if sequence.status is _FINISHED", "if False"),
    (Scheduler.submitted, "if chunk.sequence.is_finished", "if False"),
    (Scheduler.take, "self._blocks.publish_prefix(sequence)", "pass"),
    (Scheduler.submitted, "sequence.num_inflight += 1", "pass"),
    (Scheduler.take, "if sequence.status is _FINISHED", "if False"),
    (Scheduler.take, "if ending := sequence.ending()", "if ending := None"),
    (Scheduler.finish, "self._blocks.free(sequence)", "pass"),
    (Scheduler.finish, "self._running.remove(sequence)", "pass"),
    (Scheduler.finish, "self._released.append(sequence.seq_id)", "pass"),
    (Scheduler.fail, "self._blocks.forget_content()", "pass"),
    (Scheduler.fail, "sequence.num_inflight -= 1", "pass"),
    (WaitingQueue.add, "sequence.priority = now +", "sequence.priority ="),
    (WaitingQueue.add, "self._overtaking", "0"),
    (WaitingQueue.put_back, "insert(0, sequence)", "append(sequence)"),
    (WaitingQueue.put_back, "sequence.priority = _PREEMPTED", "pass"),
    (Scheduler._first_waiting, "self._waiting.first,", "self._waiting._next()[-1],"),
    (WaitingQueue.pop, "self._served.add(sequence.owner)", "pass"),
    (WaitingQueue.pop, "self._served.clear()", "pass"),
    (WaitingQueue._next, "key=_of_first", "key=len"),
    # The batch has a wrong row, table or size.
    (batch._Rows._add_newest, "places[sequence]", "0"),
    (batch._Rows._add_newest, "before[row] is sequence", "True"),
    (batch._Rows.add_decode, "self.positions += positions", "self.positions += ends"),
    (batch._Rows.add_decode, "position % size", "0"),
    (batch._Rows.add_decode, "max(ends)", "ends[0]"),
    (batch._Rows.add_decode, "table[: end + 1]", "table[:end]"),
    (batch._Rows.add_decode, "[position + 1 for", "[position for"),
    (batch._Rows.add_decode, "self._pad(padding)", "pass"),
    (batch._Rows._add_chunk, "max(start - index * size, 0)", "0"),
    (batch._Rows._add_chunk, "stop + padded_length - length", "stop"),
    (batch._Rows._pad, "[0] * count", "[1] * count"),
    (batch.build_batch, "chunk.row + chunk.length - 1", "chunk.row + chunk.padded_length - 1"),
    (Buckets.fit_chunk, "<= max_rows", "<= max_rows + 3"),
]


# Mistakes that cost only time or memory, and the test that detects them.
COSTLY: list[tuple[Callable[..., Any], str, str, Callable[[], object]]] = [
    (
        Scheduler._schedule_prefill,
        "len(long_prompts) > 1",
        "False",
        partial(test_order.test_a_short_prompt_is_not_held_up_by_long_ones, 3),
    ),
    (
        Scheduler._schedule_prefill,
        "long_prompts[1:]",
        "()",
        test_order.test_long_prompts_share_what_nobody_else_needs,
    ),
    (
        Scheduler._chunk,
        "length -= (start + length) % block_size",
        "pass",
        test_order.test_decode_goes_first_then_prompts_in_order,
    ),
    (
        Scheduler._chunk,
        "if blocks.next_hash(sequence) in computing",
        "if False",
        test_sharing.test_requests_that_arrive_together_share_a_prefix_too,
    ),
    (
        Scheduler._prompts,
        "self._share_prefix(sequence)",
        "pass",
        test_sharing.test_choices_follow_a_prompt_that_takes_several_steps,
    ),
    (
        Scheduler._has_blocks,
        "promised + lacking",
        "lacking",
        test_order.test_nobody_is_admitted_on_room_that_another_prompt_was_promised,
    ),
    (
        Scheduler.fail,
        "self._preempt_youngest()",
        "break",
        test_ends.test_others_start_again_after_a_failure,
    ),
    (
        Sequence.is_full.fget,  # type: ignore[attr-defined]
        "known + self.num_inflight",
        "known",
        test_ends.test_an_end_by_length_wastes_no_row,
    ),
]

# The model of the block manager also detects a wrong order.
OF_BLOCKS = [
    *(
        mutation
        for mutation in MUTATIONS
        if mutation[0] in (*vars(BlockManager).values(), *vars(BlockPool).values())
    ),
    (BlockPool.allocate, "popitem(last=False)", "popitem()"),
    (BlockManager.free, "reversed(table)", "table"),
    (BlockPool.allocate, "if self._free:", "if self._free and not self._cached:"),
]
# It has no generated tokens and no preempted sequences, and seldom a sequence within a block whose
# next block is cached; publishing twice is harmless.
NOT_OF_BLOCKS = {
    ", sequence.num_known_tokens",
    "sequence.num_published_blocks = 0",
    "sequence.num_published_blocks += count",
    "and between",
}


def mutated(method: Callable[..., Any], old: str, new: str) -> Callable[..., Any]:
    """Return a method as its source would make it with `old` replaced by `new`."""
    source = textwrap.dedent(inspect.getsource(method)).removeprefix("@property\n")
    assert source.count(old) == 1, f"{old!r} is in {method.__qualname__} {source.count(old)} times"
    namespace: dict[str, Any] = {}
    exec(source.replace(old, new), sys.modules[method.__module__].__dict__, namespace)
    return namespace[method.__name__]


def owner(method: Callable[..., Any]) -> object:
    """Return the class or module that a method is looked up in."""
    found: object = sys.modules[method.__module__]
    for name in method.__qualname__.split(".")[:-1]:
        found = getattr(found, name)
    return found


@pytest.mark.long
@pytest.mark.parametrize(
    ("method", "old", "new"),
    MUTATIONS,
    ids=[f"{method.__qualname__}: {old}" for method, old, _ in MUTATIONS],
)
def test_mistakes_are_noticed(
    monkeypatch: pytest.MonkeyPatch, method: Callable[..., Any], old: str, new: str
) -> None:
    if method is batch.build_batch:
        replacement = mutated(method, old, new)
        monkeypatch.setattr("tests.engine.scheduling.simulation.build_batch", replacement)
    apply(monkeypatch, method, old, new)
    with pytest.raises(Exception):  # noqa: B017, PT011 (however it shows)
        drive_all()


def apply(monkeypatch: pytest.MonkeyPatch, method: Callable[..., Any], old: str, new: str) -> None:
    replacement: object = mutated(method, old, new)
    if isinstance(getattr(owner(method), method.__name__), property):
        replacement = property(replacement)  # type: ignore[arg-type]
    monkeypatch.setattr(owner(method), method.__name__, replacement)


@pytest.mark.parametrize(
    ("method", "old", "new", "test"),
    COSTLY,
    ids=[f"{method.__qualname__}: {old}" for method, old, _, _ in COSTLY],
)
def test_costly_mistakes_are_noticed(
    monkeypatch: pytest.MonkeyPatch,
    method: Callable[..., Any],
    old: str,
    new: str,
    test: Callable[[], object],
) -> None:
    test()
    apply(monkeypatch, method, old, new)
    with pytest.raises(AssertionError):
        test()


@pytest.mark.long
@pytest.mark.parametrize(
    ("method", "old", "new"),
    [mutation for mutation in OF_BLOCKS if mutation[1] not in NOT_OF_BLOCKS],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_the_model_of_blocks_notices(
    monkeypatch: pytest.MonkeyPatch, method: Callable[..., Any], old: str, new: str
) -> None:
    apply(monkeypatch, method, old, new)
    quick = settings(
        max_examples=300, derandomize=True, database=None, deadline=None, phases=[Phase.generate]
    )
    with pytest.raises(Exception):  # noqa: B017, PT011 (however it shows)
        run_state_machine_as_test(Blocks, settings=quick)


def drive_all() -> None:
    for seed in SEEDS:
        drive(seed)


@pytest.mark.long
def test_without_mistakes_nothing_is_noticed() -> None:
    drive_all()
