"""Layers with smaller windows have blocks of their own, and release those before the window.

Each group of layers has a fake device, which asserts that every visible token is present.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

from modelpack_engine.core.batch import StepBatch, _Rows
from modelpack_engine.core.block_manager import BlockManager, window_blocks
from modelpack_engine.core.block_pool import BlockPool
from modelpack_engine.core.scheduler import Scheduler
from tests.engine.scheduling.driving import drive
from tests.engine.scheduling.simulation import Simulation, sequence
from tests.engine.scheduling.test_mutations import apply

WINDOWS = ((5,), (2,), (8, 2), (13,), (3,))
SEEDS = range(40)


def drive_all(seeds: range = SEEDS) -> Counter[str]:
    seen: Counter[str] = Counter()
    for seed in seeds:
        windows = WINDOWS[seed % len(WINDOWS)]
        sim = drive(seed, window=None if seed % 4 else 20, windows=windows)
        stats = sim.scheduler.stats()
        seen["preemptions"] += stats.num_preemptions
        seen["cached"] += stats.cached_tokens
        seen["finished"] += stats.num_finished
        seen["wasted"] += sim.wasted_rows
    return seen


@pytest.mark.long
def test_any_traffic_over_window_pools() -> None:
    """Requests come, end, fail and are aborted; all blocks of all pools are free at the end."""
    seen = drive_all(range(10))
    assert all(seen.values()), seen


@pytest.mark.long
def test_more_traffic_over_window_pools() -> None:
    seen = drive_all(range(10, 60))
    assert all(count > 10 for count in seen.values()), seen


# Method, source, replacement.
MUTATIONS: list[tuple[Callable[..., Any], str, str]] = [
    (BlockPool.num_unseen, "- self.window", "- self.window + 2 * block_size"),
    (BlockPool.num_unseen, "- self.window", "- self.window - block_size"),
    (BlockPool.release_unseen, "self.release_all(table[first:num_unseen])", "pass"),
    (BlockManager.grow, "if not self.can_allocate_windows", "if False and not self.can"),
    (BlockManager.free, "self._tables(sequence)", "[(self.pool, sequence.block_table)]"),
    (BlockManager._covered, "return index - first", "return count"),
    (BlockManager._shared, "pool.share(blocks)", "pass"),
    (BlockManager._shared, "sequence.block_hashes[seen_from:stop]", "[]"),
    (BlockManager._extend, "pool.release_unseen(", "len("),
    (BlockManager.forget_content, "in self._pools", "in [self.pool]"),
    (BlockManager.room_for, "in self._pools", "in [self.pool]"),
    (Scheduler.submitted, "if blocks.releases_blocks", "if blocks.window is not None"),
    (_Rows._add_decode_windows, "sequence.window_tables[index]", "sequence.block_table"),
    (StepBatch.of_group, "group - 1", "0"),
]


@pytest.mark.long
@pytest.mark.parametrize(("method", "old", "new"), MUTATIONS, ids=[row[1] for row in MUTATIONS])
def test_mistakes_are_noticed(
    monkeypatch: pytest.MonkeyPatch, method: Callable[..., Any], old: str, new: str
) -> None:
    apply(monkeypatch, method, old, new)
    with pytest.raises(Exception):  # noqa: B017, PT011 (however it shows)
        drive_all()


#: Full and sliding layers, and the window. In Gemma 3 every sixth layer is full (26, 34 and 62
#: layers), in gpt-oss every second. Keys and values of a token take equal bytes in all layers.
SHAPES = {
    "gemma-3-1b": (4, 22, 512),
    "gemma-3-4b": (5, 29, 1024),
    "gemma-3-27b": (10, 52, 1024),
    "gpt-oss-20b": (12, 12, 128),
    "gpt-oss-120b": (18, 18, 128),
}


def held(sim: Simulation, full: int, sliding: int) -> int:
    """Return the layer-tokens of the blocks in use, which are proportional to bytes."""
    (pool,) = sim.blocks.window_pools
    return (full * sim.blocks.num_used + sliding * pool.num_used) * sim.block_size


@pytest.mark.parametrize("name", SHAPES)
def test_bytes_at_32k_are_near_the_minimum(name: str) -> None:
    """Blocks of 16 tokens, chunks of 512: at 32768 tokens, and at most while the prompt runs."""
    full, sliding, window = SHAPES[name]
    sim = Simulation(
        num_blocks=2100, block_size=16, max_num_batched_tokens=1024, max_prefill_chunk=512,
        max_model_len=40000, window_pools=((window, 200),), mode="sync",
    )  # fmt: skip
    prompt = [i % 7 for i in range(32768 - 2)]
    seq = sequence(prompt, 2)
    sim.scheduler.add(seq)
    scheduler = sim.scheduler
    while not seq.is_finished:
        output = scheduler.schedule()
        assert output is not None
        held_before_release = held(sim, full, sliding)
        scheduler.submitted(output)
        tokens = seq.num_computed_tokens
        if tokens >= 32000:
            minimum = full * tokens + sliding * min(tokens, window)
            assert held(sim, full, sliding) <= 1.1 * minimum
            one_group = (full + sliding) * tokens
            assert held_before_release < one_group
        scheduler.collect(output, [1] * len(output.sampled))
    assert sim.blocks.num_used == sim.blocks.window_pools[0].num_used == 0


def test_a_request_may_be_longer_than_a_window_pool() -> None:
    sim = Simulation(
        num_blocks=60, max_num_batched_tokens=16, max_prefill_chunk=8, window_pools=((9, 8),)
    )
    (seq,) = sim.add(sequence([i % 7 for i in range(100)], 60))
    most = 0
    while not seq.is_finished:
        sim.step()
        most = max(most, sim.blocks.window_pools[0].num_used)
    sim.drain()
    assert len(seq.output_token_ids) == 60
    assert seq.num_preemptions == 0
    assert most <= window_blocks(9, 8, 4) == 5


def first_prompts(num_blocks: int) -> int:
    """Return how many of three prompts run first; each holds up to 5 blocks of a window pool."""
    sim = Simulation(
        num_blocks=200,
        max_num_batched_tokens=32,
        max_prefill_chunk=8,
        window_pools=((9, num_blocks),),
    )
    for index in range(3):
        sim.add(sequence([(i * i + index) % 7 for i in range(60)], 2, request_id=str(index)))
    sim.step()
    count = len(sim.running)
    sim.drain()
    stats = sim.scheduler.stats()
    assert (stats.num_finished, stats.num_preemptions) == (3, 0)
    return count


def test_prompts_wait_for_blocks_of_a_window_pool() -> None:
    assert [first_prompts(count) for count in (6, 9, 11, 16)] == [1, 1, 2, 3]


def test_a_prefix_is_not_found_without_the_blocks_that_the_window_sees() -> None:
    """The first prompt's blocks are evicted from the window pool, but not from the other."""
    sim = Simulation(num_blocks=60, max_num_batched_tokens=64, window_pools=((6, 18),))
    first, other = [i % 5 for i in range(41)], [(i * i) % 7 for i in range(61)]
    sim.add(sequence(first, 1, request_id="first"))
    sim.drain()
    (again,) = sim.add(sequence(first, 1, request_id="again"))
    sim.drain()
    assert again.num_cached_tokens == 40
    for text in (other, other[::-1]):
        sim.add(sequence(text, 1, request_id=str(text[:9])))
        sim.drain()
    (late,) = sim.add(sequence(first, 1, request_id="late"))
    sim.drain()
    assert late.num_cached_tokens < 40
    assert late.output_token_ids == again.output_token_ids
