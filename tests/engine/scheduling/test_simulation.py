"""Any traffic: no sequence starves, no block leaks, and tokens equal those of lone sequences."""

from __future__ import annotations

import random
from collections import Counter

import hypothesis.strategies as st
import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from modelpack_engine.core.buckets import EXACT, FEW
from tests.engine.scheduling.device import VOCAB_SIZE
from tests.engine.scheduling.driving import ODD_BUCKETS, SMALL_BUCKETS, drive
from tests.engine.scheduling.simulation import MODES, Simulation, sequence

pytestmark = pytest.mark.long

token_ids = st.integers(0, VOCAB_SIZE - 1)


class Traffic(RuleBasedStateMachine):
    """Requests arrive, share prefixes, are aborted and stopped, in any order, between steps."""

    @initialize(
        num_blocks=st.sampled_from([8, 11, 40]),
        max_num_seqs=st.integers(1, 5),
        max_num_batched_tokens=st.integers(8, 20),
        max_prefill_chunk=st.sampled_from([None, 1, 5, 64]),
        whole_steps=st.booleans(),
        max_waiting=st.sampled_from([3, 100]),
        buckets=st.sampled_from([EXACT, SMALL_BUCKETS, ODD_BUCKETS]),
        prefix_caching=st.sampled_from([True, True, False]),
        recurrent=st.sampled_from([False, False, True]),
        window=st.sampled_from([None, None, 2, 5, 8, 13]),
        overtaking=st.sampled_from([0, 1, 3]),
        mode=st.sampled_from(MODES),
        texts=st.lists(st.lists(token_ids, min_size=24, max_size=24), min_size=1, max_size=2),
    )
    def start(self, texts: list[list[int]], **limits: object) -> None:
        self.sim = Simulation(**limits)  # type: ignore[arg-type]
        self.texts = texts
        self.num_requests = 0

    @rule(
        data=st.data(),
        length=st.integers(1, 24),
        own=st.lists(token_ids, max_size=3),
        max_tokens=st.integers(1, 14),
        n=st.sampled_from([1, 1, 2, 3]),
        salt=st.sampled_from([b"", b"x"]),
        owner=st.sampled_from([b"", b"y"]),
        eos=st.booleans(),
        stop_token_ids=st.sampled_from([(), (), (3,)]),
        prompt_logprobs=st.sampled_from([None, None, 0]),
    )
    def arrive(
        self,
        data: st.DataObject,
        length: int,
        own: list[int],
        max_tokens: int,
        n: int,
        salt: bytes,
        owner: bytes,
        eos: bool,
        **params: object,
    ) -> None:
        self.num_requests += 1
        prompt = data.draw(st.sampled_from(self.texts))[:length] + own
        request_id = str(self.num_requests)
        self.sim.add(
            sequence(
                prompt,
                max_tokens,
                request_id=request_id,
                salt=salt,
                owner=owner,
                eos=eos,
                **params,
            ),
            n,
        )

    @rule(count=st.integers(1, 4))
    def step(self, count: int) -> None:
        for _ in range(count):
            self.sim.step()

    @precondition(lambda self: self.num_requests)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        self.sim.abort(self._one(data))

    @precondition(lambda self: self.num_requests)
    @rule(data=st.data(), stop=st.booleans())
    def end_while_a_step_is_built(self, data: st.DataObject, stop: bool) -> None:
        request_id = self._one(data)
        event = self.sim.stopping(request_id) if stop else self.sim.aborting(request_id)
        self.sim.step(between=event)

    @rule(seldom=st.integers(0, 4))
    def fail(self, seldom: int) -> None:
        if not seldom:
            self.sim.fail()

    @rule()
    def preempt_everybody(self) -> None:
        """Any sequence may be preempted while no step is in flight."""
        self.sim.collect()
        while self.sim.scheduler._running:
            self.sim.scheduler._preempt_youngest()
        self.sim.check()

    def _one(self, data: st.DataObject) -> str:
        return str(data.draw(st.integers(1, self.num_requests)))

    def teardown(self) -> None:
        if hasattr(self, "sim"):
            self.sim.drain()


TestTraffic = Traffic.TestCase
TestTraffic.settings = settings(max_examples=150, stateful_step_count=30, deadline=None)


def test_random_traffic_reaches_every_part() -> None:
    """The same invariants for seeded traffic, in which every kind of event occurs often."""
    seen: Counter[str] = Counter()
    for seed in range(40):
        sim = drive(seed)
        stats = sim.scheduler.stats()
        seen["preemptions"] += stats.num_preemptions
        seen["cached"] += stats.cached_tokens
        seen["mixed"] += stats.num_mixed_steps
        seen["wasted"] += sim.wasted_rows
        seen["finished"] += stats.num_finished
        for output in sim.outputs:
            seen["chunked"] += sum(not chunk.is_last for chunk in output.prefill)
            seen["several chunks"] += len(output.prefill) > 1
        for seq in sim.sequences:
            seen[f"ended by {seq.finish_reason}"] += 1
            seen["admitted again"] += seq.num_preemptions > 0 and bool(seq.output_token_ids)
    assert all(count > 20 for count in seen.values()), seen


def test_large_buckets_of_a_gpu() -> None:
    rng = random.Random(1)
    sim = Simulation(
        num_blocks=200, block_size=16, max_num_seqs=70, max_num_batched_tokens=512, buckets=FEW
    )
    for index in range(90):
        prompt = [rng.randrange(VOCAB_SIZE) for _ in range(1 + index * 3 % 200)]
        sim.add(sequence(prompt, 1 + index, request_id=str(index)))
    sim.drain()
    stats = sim.scheduler.stats()
    assert stats.num_finished == 90
    assert stats.num_preemptions > 0
