"""Thirty-two clients of one engine, many of which disconnect at random: no resources leak."""

from __future__ import annotations

import asyncio
import itertools
import random

import pytest

from modelpack_engine.async_engine import AsyncEngine
from modelpack_engine.request import EngineRequest, SamplingParams
from tests.engine.serving.tiny import reference_tokens, tiny_engine

CLIENTS = 32
ROUNDS = 3


@pytest.mark.long
@pytest.mark.parametrize("seed", [1, 2])
def test_random_aborts_leave_all_blocks_free(seed: int) -> None:
    """A cache that is too small, so that aborts affect waiting, running and preempted requests."""
    generator = random.Random(seed)
    per_token = 2 * 2 * 2 * 16 * 4
    engine = AsyncEngine(lambda: tiny_engine(kv_cache_bytes=40 * 16 * per_token))
    engine.wait_until_ready(60)
    plans = [
        [
            (
                [generator.randrange(256) for _ in range(generator.choice([3, 17, 60]))],
                generator.choice([0, 1, 2, 5, None]),
                generator.choice([1, 1, 2]),
            )
            for _ in range(ROUNDS)
        ]
        for _ in range(CLIENTS)
    ]
    try:
        aborted, whole = asyncio.run(converse(engine, plans))
        assert aborted > CLIENTS // 2
        assert len(whole) > CLIENTS // 4
        for prompt, tokens in whole[:6]:
            assert tokens == reference_tokens(prompt, 24)
        # The engine works normally. It has processed all aborts, which preceded this request.
        [(_, again)] = asyncio.run(converse(engine, [[([1, 2, 3], None, 1)]]))[1]
        assert again == reference_tokens([1, 2, 3], 24)
        assert engine._model is not None
        assert not engine._model._outputs._outputs
    finally:
        engine.close()
    stats = engine.stats()
    assert (stats.blocks_used, stats.num_running, stats.num_waiting) == (0, 0, 0)
    assert not engine._streams
    assert not engine._running_choices


async def converse(
    engine: AsyncEngine, plans: list[list[tuple[list[int], int | None, int]]]
) -> tuple[int, list[tuple[list[int], list[int]]]]:
    """Run all clients; return the number of aborted requests, and the replies of the others."""
    aborted = 0
    whole: list[tuple[list[int], list[int]]] = []

    async def client(plan: list[tuple[list[int], int | None, int]]) -> None:
        nonlocal aborted
        for prompt, stop_after, n in plan:
            params = SamplingParams(max_tokens=24, temperature=0, ignore_eos=True)
            tokens: list[int] = []
            async with await engine.submit(EngineRequest(prompt, params, n=n)) as stream:
                events = aiter(stream)
                for _ in itertools.count() if stop_after is None else range(stop_after):
                    event = await anext(events, None)
                    if event is None:
                        break
                    if event.index == 0:
                        tokens += event.token_ids
            if stop_after is None:
                whole.append((prompt, tokens))
            else:
                aborted += 1

    await asyncio.gather(*map(client, plans))
    return aborted, whole
