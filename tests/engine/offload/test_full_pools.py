"""A restore that needs more blocks than a pool has: the prompt is computed instead."""

from __future__ import annotations

import pytest

from modelpack_engine.offload.tiers import OffloadTiers
from tests.engine.offload.simulation import OffloadSimulation, SlowTiers
from tests.engine.scheduling.simulation import sequence

WINDOW = 40
TEXT = list(range(1, 200))


@pytest.fixture(autouse=True)
def complete_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Load all blocks at once, from memory."""
    monkeypatch.setattr(SlowTiers, "load", OffloadTiers.load)


def simulation(num_blocks: int, per_step: int, *, one_pool: bool) -> OffloadSimulation:
    """Return a simulation of one sequence at a time, with `num_blocks` for layers of a window."""
    return OffloadSimulation(
        num_blocks=num_blocks if one_pool else 60,
        window=WINDOW if one_pool else None,
        window_pools=() if one_pool else ((WINDOW, num_blocks),),
        per_step=per_step,
        max_num_batched_tokens=8,
        max_num_seqs=1,
        room=10**7,
    )


@pytest.mark.parametrize("one_pool", [False, True], ids=["window pool", "all layers slide"])
@pytest.mark.parametrize("num_blocks", [14, 15])
@pytest.mark.parametrize("per_step", [1, 2, 3])
def test_a_restore_that_lacks_blocks_ends(num_blocks: int, per_step: int, one_pool: bool) -> None:
    """A window pool with blocks for one sequence, which has its window and restores a later one."""
    sim = simulation(num_blocks, per_step, one_pool=one_pool)
    for length in (80, 44, 80, 52, 80):
        sim.add(sequence([*TEXT[:length], length % 7], 2, request_id=f"{len(sim.sequences)}"))
        sim.drain()
    assert [each.num_cached_tokens >= 44 for each in sim.sequences] == [False, *[True] * 4]


def test_it_begins_again_only_after_the_sequence_has_computed() -> None:
    sim = simulation(14, 1, one_pool=False)
    for length in (80, 44):
        sim.add(sequence([*TEXT[:length], length % 7], 2, request_id=f"{length}"))
        sim.drain()
    sim.add(last := sequence(TEXT[:80], 2, request_id="last"))
    while not last.restore_from:
        if sim.scheduler.schedule() is None:
            sim.offload.take()
    assert last.restore_from == last.num_computed_tokens + 1
    num_restored = sim.offload.num_restored
    for _ in range(3):
        assert sim.blocks.share_prefix(last) == 0
        assert last.restore is None
        assert not sim.offload.is_awaited
    assert sim.offload.num_restored == num_restored
