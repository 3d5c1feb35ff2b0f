"""Random simulations from a seed."""

from __future__ import annotations

import random

from modelpack_engine.core.buckets import EXACT, Buckets
from tests.engine.scheduling.device import VOCAB_SIZE
from tests.engine.scheduling.simulation import MODES, Simulation, sequence

SMALL_BUCKETS = Buckets(rows=(1, 2, 4), chunk=(4, 8), table_width=(1, 2, 4, 8))
ODD_BUCKETS = Buckets(rows=(3,), chunk=(2, 3), table_width=(5,))


def some_simulation(
    seed: int, window: int | None = None, windows: tuple[int, ...] = ()
) -> Simulation:
    """Return a simulation with random limits, most of them tight.

    It has a pool for each of `windows`.
    """
    rng = random.Random(seed)
    return Simulation(
        window_pools=tuple((smaller, 8 + (seed + 3 * smaller) % 9) for smaller in windows),
        num_blocks=rng.choice([8, 10, 12, 30]),
        max_num_batched_tokens=rng.choice([8, 16, 24]),
        max_prefill_chunk=rng.choice([None, 4, 16]),
        whole_steps=seed % 5 == 3,
        max_waiting=rng.choice([6, 1000]),
        buckets=rng.choice([EXACT, SMALL_BUCKETS, ODD_BUCKETS]),
        prefix_caching=rng.random() < 0.8,
        recurrent=rng.random() < 0.3,
        snapshot_interval=(0, 4, 8)[seed % 3],
        window=window,
        overtaking=(0, 1, 3)[seed % 3],
        mode=rng.choice(MODES),
    )


def drive(
    seed: int,
    num_actions: int = 60,
    window: int | None = None,
    windows: tuple[int, ...] = (),
) -> Simulation:
    """Add, abort, stop and fail requests at random, then run until all have ended."""
    sim = some_simulation(seed, window, windows)
    rng = random.Random(seed)
    texts = [[rng.randrange(VOCAB_SIZE) for _ in range(24)] for _ in range(2)]
    num_requests = 0
    for _ in range(num_actions):
        action = rng.random()
        if action < 0.35:
            num_requests += 1
            own = [rng.randrange(VOCAB_SIZE) for _ in range(rng.randrange(3))]
            prompt = rng.choice(texts)[: rng.randrange(1, 24)] + own
            max_tokens, salt = rng.randrange(1, 14), rng.choice([b"", b"", b"x"])
            first = sequence(
                prompt,
                max_tokens,
                request_id=str(num_requests),
                salt=salt,
                owner=salt,
                eos=rng.random() < 0.5,
                min_tokens=rng.choice([0, 0, 1]),
                prompt_logprobs=rng.choice([None, None, None, 0]),
            )
            sim.add(first, rng.choice([1, 1, 1, 3]))
        elif action < 0.4:
            sim.abort(str(rng.randint(1, num_requests + 1)))
        elif action < 0.5:
            request_id = str(rng.randint(1, num_requests + 1))
            sim.step(between=rng.choice([sim.aborting(request_id), sim.stopping(request_id)]))
        elif action < 0.51:
            sim.fail()
        else:
            sim.step()
    sim.drain()
    return sim
