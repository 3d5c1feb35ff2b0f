"""If all layers have windows, blocks before the window are released, and nothing else changes.

`test_simulation.py` also runs random traffic with windows; the fake device asserts that every
visible token is present.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

from modelpack_engine.core.block_manager import BlockManager, window_blocks
from modelpack_engine.core.block_pool import NULL_BLOCK, BlockPool
from modelpack_engine.core.scheduler import Scheduler
from tests.engine.scheduling.driving import drive
from tests.engine.scheduling.simulation import Simulation, sequence
from tests.engine.scheduling.test_mutations import apply

WINDOWS = (2, 5, 8, 13)
SEEDS = range(24)


def drive_all() -> Counter[str]:
    seen: Counter[str] = Counter()
    for seed in SEEDS:
        sim = drive(seed, window=WINDOWS[seed % len(WINDOWS)])
        stats = sim.scheduler.stats()
        seen["preemptions"] += stats.num_preemptions
        seen["cached"] += stats.cached_tokens
        seen["finished"] += stats.num_finished
        seen["wasted"] += sim.wasted_rows
    return seen


@pytest.mark.long
def test_any_traffic_over_windows() -> None:
    seen = drive_all()
    assert all(count > 10 for count in seen.values()), seen


# Method, source, replacement.
MUTATIONS: list[tuple[Callable[..., Any], str, str]] = [
    (BlockPool.num_unseen, "- self.window", "- self.window + 2 * block_size"),
    (BlockPool.num_unseen, "- self.window", "- self.window - block_size"),
    (BlockPool.release_unseen, "self.release_all(table[first:num_unseen])", "pass"),
    (BlockPool.release_unseen, "table[first:num_unseen] = ", "_ = "),
    (BlockManager.free, "sequence.num_unseen_blocks = 0", "pass"),
    (BlockPool.release_all, "if block != NULL_BLOCK", "if True"),
    (BlockManager._match_window, "run >= seen", "run >= 1"),
    (BlockManager._match_window, "- window) //", "- window // 2) //"),
    (Scheduler.submitted, "self._blocks.release_unseen(sequence)", "pass"),
]


@pytest.mark.parametrize(("method", "old", "new"), MUTATIONS, ids=[row[1] for row in MUTATIONS])
def test_mistakes_are_noticed(
    monkeypatch: pytest.MonkeyPatch, method: Callable[..., Any], old: str, new: str
) -> None:
    apply(monkeypatch, method, old, new)
    with pytest.raises(Exception):  # noqa: B017, PT011 (however it shows)
        drive_all()


def test_a_request_may_be_longer_than_the_cache() -> None:
    """Seven blocks of 4 tokens, a window of 9, steps of 8 tokens: 100 tokens and 60 more."""
    sim = Simulation(num_blocks=8, max_num_batched_tokens=16, max_prefill_chunk=8, window=9)
    prompt = [i % 7 for i in range(100)]
    (seq,) = sim.add(sequence(prompt, 60))
    most = 0
    while not seq.is_finished:
        sim.step()
        most = max(most, sim.blocks.num_used)
    sim.drain()
    assert len(seq.output_token_ids) == 60
    assert seq.num_preemptions == 0
    assert most <= window_blocks(9, 8, 4) == 5


def test_several_long_requests_share_a_small_cache() -> None:
    sim = Simulation(num_blocks=17, max_num_batched_tokens=16, max_prefill_chunk=4, window=6)
    for index in range(6):
        sim.add(sequence([(i * i + index) % 7 for i in range(90)], 30, request_id=str(index)))
    sim.drain()
    stats = sim.scheduler.stats()
    assert (stats.num_finished, stats.num_preemptions) == (6, 0)


def test_a_prefix_is_found_although_its_beginning_is_gone() -> None:
    sim = Simulation(num_blocks=12, max_num_batched_tokens=16, max_prefill_chunk=8, window=6)
    prompt = [i % 5 for i in range(61)]
    sim.add(sequence(prompt, 1, request_id="first"))
    sim.drain()
    first_block = sim.sequences[0].block_hashes[0]
    assert first_block not in sim.blocks.pool._block_of, "the cache is too large for this test"
    (again,) = sim.add(sequence(prompt, 5, request_id="again"))
    sim.drain()
    assert again.num_cached_tokens == 60


@pytest.mark.parametrize(
    ("window", "chunk", "expected"),
    [(None, 1, None), (4, 1, 2), (5, 1, 3), (4, 8, 4), (9, 8, 5), (9, 20, None)],
)
def test_most_blocks_of_a_sequence(window: int | None, chunk: int, expected: int | None) -> None:
    """There is no limit if it depends on the length, or if it exceeds all blocks."""
    assert BlockManager(7, 4, window=window).most_held(chunk) == expected


def test_the_null_block_is_never_published_or_handed_out() -> None:
    sim = Simulation(num_blocks=10, window=3)
    (seq,) = sim.add(sequence([1, 2, 3] * 6, 20))
    while not seq.is_finished:
        sim.step()
        assert NULL_BLOCK not in sim.blocks.pool._hash_of
        assert sim.blocks.pool._ref_counts[NULL_BLOCK] == 0
    sim.drain()
