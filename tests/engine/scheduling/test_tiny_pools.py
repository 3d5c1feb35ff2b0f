"""Random requests, proposals and cancellations over pools that hold little more than one request.

Every request ends, every block comes back, and no step writes to a block that another reads.
"""

from __future__ import annotations

from random import Random

import pytest
from hypothesis import example, given
from hypothesis import settings as examples
from hypothesis import strategies as st

from modelpack_engine.core.block_manager import BlockManager
from modelpack_engine.core.block_pool import NULL_BLOCK
from modelpack_engine.core.scheduler import Scheduler, SchedulerConfig, SchedulerOutput
from modelpack_engine.core.sequence import Sequence
from modelpack_engine.errors import RequestError
from modelpack_engine.outputs import FinishReason
from tests.engine.scheduling.simulation import Simulation, audit, sequence

NUM_ACTIONS = 80
MOST_STEPS = 4000


class Traffic:
    """A scheduler with random limits, and requests at random."""

    def __init__(self, rng: Random) -> None:
        self.rng = rng
        num_pools = rng.choice([0, 1, 1, 2])
        pools = [(rng.choice([1, 2, 3, 5, 8, 13]), rng.randint(3, 12)) for _ in range(num_pools)]
        self.blocks = BlockManager(
            rng.randint(3, 14),
            rng.choice([2, 4]),
            window=rng.choice([None, None, 20]),
            window_pools=pools,
            enable_prefix_caching=rng.random() < 0.8,
        )
        config = SchedulerConfig(
            max_num_seqs=rng.choice([1, 2, 4]),
            max_num_batched_tokens=rng.choice([8, 12, 16, 24]),
            max_model_len=rng.choice([40, 1000]),
            max_prefill_chunk=rng.choice([None, 2, 4, 8]),
        )
        self.scheduler = Scheduler(config, self.blocks)
        self.in_flight: SchedulerOutput | None = None
        self.sequences: list[Sequence] = []
        self.texts = [[rng.randrange(5) for _ in range(40)] for _ in range(2)]
        self.num_requests = 0

    def add(self) -> None:
        rng = self.rng
        self.num_requests += 1
        first = sequence(
            rng.choice(self.texts)[: rng.randint(1, 40)],
            rng.randint(1, 14),
            request_id=str(self.num_requests),
            background=rng.random() < 0.15,
        )
        choices = [first, *(first.fork(index) for index in range(1, rng.choice([1, 1, 3])))]
        try:
            self.scheduler.add(*choices)
        except RequestError:
            return  # it is too long
        self.sequences += choices

    def abort(self) -> None:
        self.scheduler.abort(str(self.rng.randint(1, self.num_requests + 1)))

    def collect(self) -> None:
        if self.in_flight is None:
            return
        output, self.in_flight = self.in_flight, None
        accepted = [
            (each, self.rng.randint(0, len(each.token_ids)))
            for each in output.proposals
            if not each.sequence.is_finished
        ]
        self.scheduler.collect(output, [self.rng.randrange(5) for _ in output.sampled])
        for proposal, count in accepted:
            self.scheduler.verified(proposal, count)
            for token_id in proposal.token_ids[:count]:
                self.scheduler.take(proposal.sequence, token_id)
        for one in output.sampled:
            if self.rng.random() < 0.05:
                self.scheduler.finish(one, FinishReason.STOP)

    def step(self, *, may_abort: bool) -> None:
        rng, proposed = self.rng, {}
        if rng.random() < 0.5:
            self.collect()
            decoding = self.scheduler.decoding()
            proposed = {one: [1] * rng.randint(1, 5) for one in decoding}
        output = self.scheduler.schedule(proposed)
        if output is None:
            assert self.in_flight is not None or not self.scheduler.has_work, "a request starves"
            return self.collect()
        self.check_writes(output)
        if may_abort and rng.random() < 0.15:
            self.abort()
        launched_early = rng.random() < 0.5
        if not launched_early:
            self.collect()
        self.scheduler.submitted(output)
        if launched_early:
            self.collect()
        self.in_flight = output
        if may_abort and rng.random() < 0.02:
            self.scheduler.fail(output)
            self.in_flight = None
        if rng.random() < 0.4:
            self.collect()
        audit(self.blocks, self.sequences)
        return None

    def check_writes(self, output: SchedulerOutput) -> None:
        """Check that written blocks have one owner, and that visible tokens have blocks."""
        size = self.blocks.block_size
        lengths = dict.fromkeys(output.decode, 1)
        lengths |= {each.sequence: 1 + len(each.token_ids) for each in output.proposals}
        lengths |= {chunk.sequence: chunk.length for chunk in output.prefill}
        for index, pool in enumerate((self.blocks.pool, *self.blocks.window_pools)):
            for one, length in lengths.items():
                table = [one.block_table, *one.window_tables][index]
                start = one.num_computed_tokens
                first = 0 if pool.window is None else max(0, start - pool.window + 1)
                seen = {table[position // size] for position in range(first, start + length)}
                written = {table[at // size] for at in range(start, start + length)}
                assert NULL_BLOCK not in seen
                assert all(pool._ref_counts[block] == 1 for block in written), "it has two owners"


@pytest.mark.long
@examples(max_examples=60, deadline=None)
@given(st.integers(0, 2**32))
@example(50)  # accepted proposals pass the window before the next step releases its blocks
@example(388)
@example(854)  # prompts share the blocks of a window, and need more when they pass it
def test_every_request_ends_and_no_block_leaks(seed: int) -> None:
    traffic = Traffic(Random(seed))
    for _ in range(NUM_ACTIONS):
        if traffic.rng.random() < 0.4:
            traffic.add()
        if traffic.rng.random() < 0.1:
            traffic.abort()
        traffic.step(may_abort=True)
    steps = 0
    while traffic.scheduler.has_work:
        traffic.step(may_abort=False)
        steps += 1
        assert steps < MOST_STEPS, "requests make no progress"
    assert all(one.is_finished for one in traffic.sequences)
    for pool in (traffic.blocks.pool, *traffic.blocks.window_pools):
        assert pool.num_used == 0, "a block leaks"


def test_prompts_that_share_a_window_do_not_block_each_other() -> None:
    """Both were admitted to share 5 blocks of the window, and then need 7 each of 9."""
    sim = Simulation(
        num_blocks=10, max_num_batched_tokens=8, max_prefill_chunk=2, window=20, mode="sync"
    )
    text = [(i * i + i // 3) % 5 for i in range(60)]
    for request_id, length in (("a", 37), ("b", 33)):
        sim.add(sequence(text[:length], 2, request_id=request_id))
    sim.drain()
    stats = sim.scheduler.stats()
    assert (stats.num_finished, stats.num_preemptions) == (2, 1)
