"""Any traffic over a small pool, whose evicted blocks are restored late or never."""

from __future__ import annotations

from collections import Counter

import hypothesis.strategies as st
import pytest
from hypothesis import settings
from hypothesis.stateful import initialize

from modelpack_engine.core.buckets import EXACT, FEW
from tests.engine.offload.simulation import OffloadSimulation
from tests.engine.scheduling.simulation import MODES, sequence
from tests.engine.scheduling.test_simulation import Traffic, token_ids

pytestmark = pytest.mark.long


class OffloadTraffic(Traffic):
    """All invariants of the simulation hold with an offload as well."""

    @initialize(
        num_blocks=st.sampled_from([8, 11, 14]),
        max_num_seqs=st.integers(1, 5),
        max_num_batched_tokens=st.integers(8, 20),
        max_prefill_chunk=st.sampled_from([None, 5]),
        room=st.sampled_from([400, 4000, 40000]),
        per_step=st.integers(1, 3),
        seed=st.integers(0, 99),
        recurrent=st.booleans(),
        num_snapshots=st.sampled_from([0, 1, 5]),
        window=st.sampled_from([None, None, 9]),
        window_pools=st.sampled_from([(), (), ((5, 9),), ((6, 12), (2, 6))]),
        mode=st.sampled_from(MODES),
        texts=st.lists(st.lists(token_ids, min_size=24, max_size=24), min_size=1, max_size=3),
    )
    def start(self, texts: list[list[int]], **limits: object) -> None:
        self.sim = OffloadSimulation(**limits)  # type: ignore[arg-type]
        self.texts = texts
        self.num_requests = 0


TestOffloadTraffic = OffloadTraffic.TestCase
TestOffloadTraffic.settings = settings(max_examples=50, stateful_step_count=30, deadline=None)


def test_prefixes_come_back_and_others_go_on() -> None:
    """Seeded traffic in which every kind of event occurs."""
    seen: Counter[str] = Counter()
    for seed in range(22):
        sim = OffloadSimulation(
            num_blocks=14, seed=seed, per_step=1 + seed % 3, buckets=(EXACT, FEW)[seed % 7 == 6],
            max_num_batched_tokens=(16, 256)[seed % 7 == 6], recurrent=seed % 2 == 1,
            window=(None, None, 9)[seed % 3], num_snapshots=2,
            window_pools=((5, 10 + seed % 3),) if seed >= 12 else (),
        )  # fmt: skip
        for turn in range(8):
            for text in range(3):
                prompt = [text + 1] * (8 + 4 * turn) + [turn % 3]
                sim.add(sequence(prompt, 6, request_id=f"{turn} {text}"))
            sim.step()
            sim.step()
            seen["decoded while a load was awaited"] += sim.offload.is_awaited and any(
                output.decode for output in sim.outputs[-2:]
            )
            if sim.offload.is_awaited and turn % 2:
                sim.abort(f"{turn} {seed % 3}")
            held = [seq for seq in sim.running if seq.restore and any(map(any, seq.restore.blocks))]
            seen["held blocks to use later"] += len(held)
            if held and seed % 4 == 3:
                sim.abort(held[0].request_id)
            for hash_, _ in sim.blocks.snapshots.items() if sim.blocks.snapshots else ():
                assert hash_ in sim.blocks.pool._block_of, "a snapshot is kept without its block"
        sim.drain()
        seen["restored"] += sim.offload.num_restored_blocks
        seen["restored of window pools"] += (
            sim.offload.num_restored
            - sim.offload.num_restored_states
            - sim.offload.num_restored_blocks
        )
        seen["restored states"] += sim.offload.num_restored_states
        seen["restores"] += sim.offload.num_restores
        seen["preempted"] += sim.scheduler.stats().num_preemptions
    assert all(count > 5 for count in seen.values()), seen


def test_a_salt_keeps_prefixes_apart() -> None:
    sim = OffloadSimulation(num_blocks=8, per_step=8)
    text = [1, 2, 3, 4] * 4
    for salt in (b"", b"x", b"", b"x"):
        sim.add(sequence(text, 2, request_id=f"{len(sim.sequences)}", salt=salt))
        sim.drain()
        sim.add(sequence([5] * 24, 2, request_id=f"{len(sim.sequences)}"))  # evicts
        sim.drain()
    first, salted, again, salted_again = sim.sequences[::2]
    assert (first.num_cached_tokens, salted.num_cached_tokens) == (0, 0)
    assert again.num_cached_tokens > 0
    assert salted_again.num_cached_tokens > 0
