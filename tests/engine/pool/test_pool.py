"""The pool, step by step, with fake engines."""

from __future__ import annotations

import asyncio
import math
import threading
from collections.abc import Callable, Coroutine
from contextlib import AsyncExitStack
from typing import Any

import pytest

from modelpack.errors import NotFoundError, UsageError
from modelpack_engine.async_engine import EngineState
from modelpack_engine.errors import BusyError, LoadingError, ModelLoadError, OutOfMemoryError
from modelpack_server.pool.entry import ModelState
from modelpack_server.pool.pool import ModelPool
from modelpack_server.pool.settings import ModelSettings
from tests.engine.pool.shelf import Clock, Shelf, pool_over


def loop(test: Callable[[], Coroutine[Any, Any, None]]) -> Callable[[], None]:
    """Run a test on an event loop."""

    def run() -> None:
        asyncio.run(asyncio.wait_for(test(), 20))

    run.__name__ = test.__name__
    run.__doc__ = test.__doc__
    return run


def loaded(pool: ModelPool) -> list[str]:
    return sorted(model.name for model in pool.running())


async def settle(pool: ModelPool) -> None:
    """Wait for the pool's background tasks."""
    while pool._tasks:
        await asyncio.gather(*pool._tasks)


@loop
async def test_many_who_want_a_model_share_one_load() -> None:
    shelf = Shelf(a=1)
    pool = pool_over(shelf)
    shelf.gate.clear()

    async def use() -> object:
        async with pool.lease("a") as model:
            return model

    users = [asyncio.create_task(use()) for _ in range(5)]
    await asyncio.sleep(0)
    shelf.gate.set()
    models = await asyncio.gather(*users)
    assert shelf.loads == ["a"]
    assert len(set(map(id, models))) == 1
    [running] = pool.running()
    assert (running.users, running.state) == (0, ModelState.READY)


@loop
async def test_names_are_found_and_others_are_not() -> None:
    shelf = Shelf(a=1)
    pool = pool_over(shelf)
    pool.alias("gpt-4", "a")
    for name in ("a", "ai/a", "gpt-4"):
        async with pool.lease(name) as model:
            assert model.name == "a"
    assert shelf.loads == ["a"]
    with pytest.raises(NotFoundError):
        await pool.preload("b")
    shelf.sizes["b"] = 1
    shelf.index += 1
    await pool.preload("b")


@loop
async def test_idle_models_go_after_their_time() -> None:
    clock = Clock()
    pool = pool_over(Shelf(a=1, b=1), clock)
    await pool.preload("a")
    clock.now += 60
    await pool.preload("b")
    assert await pool.reap() == 40
    clock.now += 40
    assert await pool.reap() == 60
    assert loaded(pool) == ["b"]
    clock.now += 1000
    await pool.reap()
    assert loaded(pool) == []
    assert await pool.reap() == math.inf


@loop
async def test_a_model_in_use_does_not_go() -> None:
    clock = Clock()
    pool = pool_over(Shelf(a=1), clock)
    async with pool.lease("a"):
        clock.now += 1000
        await pool.reap()
        assert loaded(pool) == ["a"]
        assert pool.running()[0].last_used is None
    assert await pool.reap() == 100


@loop
async def test_requests_say_how_long_it_stays() -> None:
    clock = Clock()
    pool = pool_over(Shelf(a=1, b=1, c=1), clock)
    await pool.preload("a", keep_alive=math.inf)
    await pool.preload("b", keep_alive=10)
    await pool.preload("c", keep_alive=0)
    await settle(pool)
    assert loaded(pool) == ["a", "b"]
    clock.now += 11
    await pool.reap()
    assert loaded(pool) == ["a"]
    clock.now += 10**6
    await pool.reap()
    assert loaded(pool) == ["a"]


@loop
async def test_memory_pressure_takes_the_least_recently_used() -> None:
    clock = Clock()
    shelf = Shelf(a=40, b=40, c=40, d=90)
    pool = pool_over(shelf, clock, memory=100)
    await pool.preload("a")
    clock.now += 1
    await pool.preload("b")
    clock.now += 1
    await pool.preload("a")
    clock.now += 1
    await pool.preload("c")
    assert loaded(pool) == ["a", "c"]
    await pool.preload("d")
    assert loaded(pool) == ["d"]
    assert sum(engine.memory_bytes for engine in shelf.alive) == 90


@loop
async def test_what_cannot_fit_says_what_it_needs_and_who_has_it() -> None:
    shelf = Shelf(a=60 * 2**20, b=50 * 2**20, c=200 * 2**20)
    pool = pool_over(shelf, memory=100 * 2**20)
    async with pool.lease("a"):
        with pytest.raises(OutOfMemoryError, match=r"50\.0 MiB.*40\.0 MiB.*a 60\.0 MiB \(in use"):
            await pool.preload("b")
        assert loaded(pool) == ["a"]
    await pool.preload("b")
    with pytest.raises(OutOfMemoryError, match=r"200\.0 MiB.*100\.0 MiB"):
        await pool.preload("c")


@loop
async def test_a_failed_load_is_told_and_tried_again() -> None:
    shelf = Shelf(a=1)
    shelf.fails.add("a")
    pool = pool_over(shelf, memory=10)
    for _ in range(2):
        with pytest.raises(ModelLoadError, match="damaged"):
            await pool.preload("a")
    shelf.fails.clear()
    await pool.preload("a")
    assert shelf.loads == ["a"] * 3


@loop
async def test_an_engine_that_died_is_replaced() -> None:
    shelf = Shelf(a=1)
    pool = pool_over(shelf)
    await pool.preload("a")
    shelf.alive[0].state = EngineState.FAILED
    async with pool.lease("a") as model:
        assert model.engine is shelf.alive[0]
    assert shelf.loads == ["a", "a"]
    assert len(shelf.alive) == 1


@loop
async def test_loading_ahead_is_no_use_that_other_settings_wait_for() -> None:
    shelf = Shelf(a=1)
    pool = pool_over(shelf)

    async def configure() -> None:
        await pool.preload("a")
        await pool.configure("a", ModelSettings(context_size=50))

    await asyncio.gather(configure(), pool.preload("a"), pool.preload("a"))
    async with pool.lease("a") as model:
        assert model.engine.max_model_len == 50
        assert pool.context_size(await pool.find("a")) == 50
    assert shelf.loads == ["a", "a"]


@loop
async def test_an_engine_that_dies_at_once_is_not_loaded_for_ever() -> None:
    shelf = Shelf(a=1)
    shelf.dies.add("a")
    pool = pool_over(shelf)
    for count in (1, 2):
        with pytest.raises(ModelLoadError, match="the engine of a died as soon as it was loaded"):
            await pool.preload("a")
        assert len(shelf.loads) == count
    assert shelf.alive == []
    shelf.dies.clear()
    await pool.preload("a")


@loop
async def test_pinned_models_stay_and_make_the_pool_ready() -> None:
    clock = Clock()
    shelf = Shelf(a=60, b=60)
    pool = pool_over(shelf, clock, memory=100)
    pool.pin("a")
    shelf.gate.clear()
    await pool.start()
    assert pool.readiness() == (False, "the model a is being loaded")
    shelf.gate.set()
    await pool.preload("a")
    assert pool.readiness() == (True, "")
    clock.now += 10**6
    await pool.reap()
    with pytest.raises(OutOfMemoryError, match="pinned"):
        await pool.preload("b")
    assert loaded(pool) == ["a"]
    await pool.close()
    assert loaded(pool) == []
    assert not pool.readiness()[0]


@loop
async def test_a_pinned_model_whose_engine_has_failed_is_loaded_again() -> None:
    shelf = Shelf(a=60)
    pool = pool_over(shelf, memory=100)
    pool.pin("a")
    await pool.start()
    await pool.preload("a")
    [engine] = shelf.alive
    engine.state, engine.failure = EngineState.FAILED, "the device is lost"
    reason = "the model a is loaded again: the device is lost"
    assert pool.readiness() == pool.readiness() == (False, reason)
    await settle(pool)
    await pool.preload("a")
    assert pool.readiness() == (True, "")
    assert (shelf.loads, len(shelf.alive)) == (["a", "a"], 1)
    assert shelf.alive != [engine]
    await pool.close()


@loop
async def test_a_pinned_model_that_is_unloaded_by_hand_is_pinned_no_more() -> None:
    shelf = Shelf(a=60, b=60)
    pool = pool_over(shelf, memory=100)
    pool.pin("ai/a")
    await pool.start()
    await settle(pool)
    assert await pool.unload(["a"]) == ["a"]
    assert pool.readiness() == (True, "")
    await pool.preload("a")
    assert not pool.running()[0].pinned
    await pool.preload("b")
    assert loaded(pool) == ["b"]
    await pool.close()


@loop
async def test_a_pinned_model_is_loaded_again_with_its_new_settings() -> None:
    shelf = Shelf(a=1)
    pool = pool_over(shelf)
    pool.pin("a")
    await pool.start()
    await settle(pool)
    shelf.gate.clear()
    configuring = asyncio.create_task(pool.configure("a", ModelSettings(preset="code")))
    while pool.readiness()[0]:
        await asyncio.sleep(0)
    assert pool.readiness() == (False, "the model a is being loaded")
    shelf.gate.set()
    await configuring
    assert pool.readiness() == (True, "")
    assert [model.settings.preset for model in pool.running()] == ["code"]
    await pool.close()


@loop
async def test_a_pinned_model_serves_on_with_its_settings_where_new_ones_do_not_load() -> None:
    shelf = Shelf(a=1)
    pool = pool_over(shelf)
    pool.pin("a")
    await pool.start()
    await settle(pool)
    await pool.configure("a", ModelSettings(context_size=50))
    shelf.most_loaded = 70
    with pytest.raises(ModelLoadError, match="a has no room for 80"):
        await pool.configure("a", ModelSettings(context_size=80))
    assert pool.readiness() == (True, "")
    assert (await pool.settings("a")).context_size == 50
    async with pool.lease("a") as model:
        assert model.max_model_len == 50
    await pool.close()


@loop
async def test_settings_that_the_model_cannot_have_unload_nothing() -> None:
    shelf = Shelf(a=1)
    pool = pool_over(shelf, memory=10)
    pool.pin("a")
    await pool.start()
    await settle(pool)
    with pytest.raises(UsageError, match="this model's context is 10000"):
        await pool.configure("a", ModelSettings(context_size=1_000_000))
    shelf.sizes["a"] = 11  # what it needs with the settings that come next
    shelf.index += 1
    pool.entries()[0].stored = shelf.find("a")
    with pytest.raises(OutOfMemoryError, match="a needs about"):
        await pool.configure("a", ModelSettings(context_size=60))
    assert pool.readiness() == (True, "")
    assert shelf.loads == ["a"]
    await pool.close()


@loop
async def test_so_many_wait_for_a_model_and_no_more() -> None:
    shelf = Shelf(a=1)
    pool = pool_over(shelf, max_waiting=2)
    shelf.gate.clear()
    waiting = [asyncio.create_task(pool.preload("a")) for _ in range(2)]
    while not pool.entries() or pool.entries()[0].preloading < 2:
        await asyncio.sleep(0)
    with pytest.raises(LoadingError, match="2 requests wait"):
        await pool.preload("a")
    shelf.gate.set()
    await asyncio.gather(*waiting)
    await pool.preload("a")


@loop
async def test_the_start_is_reported_once() -> None:
    shelf, said = Shelf(a=1, b=1), []

    def pool() -> ModelPool:
        made = pool_over(
            shelf, on_ready=lambda: said.append("ready"),
            on_failure=lambda name, error: said.append(f"{name}: {error}"),
        )  # fmt: skip
        made.pin("a")
        made.pin("b")
        return made

    for broken, expected in ((set(), "ready"), ({"b"}, "b: b is damaged"), ({"a"}, "a: a is")):
        shelf.fails = broken
        one = pool()
        await one.start()
        await settle(one)
        assert len(said) == 1
        assert said.pop().startswith(expected)
        shelf.fails = {"a", "b"}
        await one.unload()
        with pytest.raises(ModelLoadError):
            await one.preload("a")
        assert said == []
        await one.close()


@loop
async def test_a_pinned_model_that_fails_is_told() -> None:
    shelf = Shelf(a=1)
    shelf.fails.add("a")
    pool = pool_over(shelf)
    pool.pin("a")
    pool.pin("missing")
    await pool.start()
    with pytest.raises(ModelLoadError):
        await pool.preload("a")
    ready, why = pool.readiness()
    assert not ready
    assert "damaged" in why
    await pool.close()


@loop
async def test_who_will_not_wait_hears_that_it_is_loading() -> None:
    shelf = Shelf(a=1)
    pool = pool_over(shelf)
    shelf.gate.clear()
    waiting = asyncio.create_task(pool.preload("a"))
    while not pool.running():
        await asyncio.sleep(0)
    with pytest.raises(LoadingError):
        async with pool.lease("a", wait=False):
            pass
    shelf.gate.set()
    await waiting
    async with pool.lease("a", wait=False):
        pass


@loop
async def test_who_leaves_while_it_loads_leaves_no_trace() -> None:
    shelf = Shelf(a=1)
    pool = pool_over(shelf)
    shelf.gate.clear()
    leaver = asyncio.create_task(pool.preload("a"))
    while not pool.running():
        await asyncio.sleep(0)
    leaver.cancel()
    with pytest.raises(asyncio.CancelledError):
        await leaver
    shelf.gate.set()
    await pool.preload("a")
    assert shelf.loads == ["a"]
    assert pool.running()[0].users == 0


@loop
async def test_unloading_waits_for_streams_then_goes_on() -> None:
    shelf = Shelf(a=1)
    pool = pool_over(shelf, grace=10)
    stack = AsyncExitStack()
    model = await stack.enter_async_context(pool.lease("a"))
    unloading = asyncio.create_task(pool.unload(["a"]))
    while pool.running()[0].state is not ModelState.UNLOADING:
        await asyncio.sleep(0)
    again = asyncio.create_task(pool.preload("a"))
    await asyncio.sleep(0)
    assert model.engine is shelf.alive[0]
    await stack.aclose()
    assert await unloading == ["a"]
    await again
    assert shelf.loads == ["a", "a"]

    async with pool.lease("a"):
        await pool.unload(grace=0)
        assert shelf.alive == []
    assert await pool.unload() == []


@loop
async def test_unloading_what_is_idle() -> None:
    shelf = Shelf(a=1, b=1, c=1)
    pool = pool_over(shelf)
    await pool.preload("a")
    async with pool.lease("b"):
        shelf.gate.clear()
        loading = asyncio.create_task(pool.preload("c"))
        while len(pool.running()) < 3:
            await asyncio.sleep(0)
        assert await pool.unload(["b", "c"], idle_only=True) == []
        assert await pool.unload(idle_only=True) == ["a"]
        assert loaded(pool) == ["b", "c"]
        shelf.gate.set()
        await loading
    assert sorted(await pool.unload(idle_only=True)) == ["b", "c"]


@loop
async def test_configuring() -> None:
    shelf = Shelf(a=1)
    pool = pool_over(shelf, settings=ModelSettings(preset="chat"))
    wide = ModelSettings(context_size=50, runtime_flags=("--temp", "0.3"))
    await pool.configure("a", wide)
    async with pool.lease("a") as model:
        assert model.max_model_len == 50
        params = model.sampling_params({})
        assert (params.temperature, params.top_p, params.min_p) == (0.3, 0.9, 0.05)
        await pool.configure("ai/a", wide)
        with pytest.raises(BusyError):
            await pool.configure("a", ModelSettings(context_size=60))
    await pool.configure("a", ModelSettings(context_size=60, keep_alive=7))
    assert shelf.alive == []
    assert (await pool.settings("a")).context_size == 60
    await pool.preload("a")
    assert pool.running()[0].keep_alive == 7
    with pytest.raises(UsageError, match="--bogus"):
        await pool.configure("a", ModelSettings(runtime_flags=("--bogus",)))


@loop
async def test_counters_go_on_over_loads() -> None:
    pool = pool_over(Shelf(a=1))
    for expected in (1, 2):
        await pool.preload("a")
        [entry] = pool.entries()
        assert entry.stats().num_finished == expected
        await pool.unload()
    assert entry.stats().num_finished == 2
    assert entry.stats().blocks_total == 0


@loop
async def test_idle_models_go_by_themselves() -> None:
    clock = Clock()
    pool = pool_over(Shelf(a=1), clock)
    await pool.start()
    await pool.preload("a", keep_alive=0)
    await settle(pool)
    assert loaded(pool) == []
    await pool.close()


@loop
async def test_a_model_loads_while_the_load_of_another_hangs() -> None:
    shelf = Shelf(a=40, b=40, c=90)
    pool = pool_over(shelf, memory=200)
    shelf.hangs["a"] = hang = threading.Event()
    hanging = asyncio.create_task(pool.preload("a"))
    await shelf.started("a")
    await pool.preload("b")
    async with pool.lease("b") as model:
        assert model.name == "b"
    assert [(m.name, m.state) for m in pool.running()] == [
        ("a", ModelState.LOADING),
        ("b", ModelState.READY),
    ]
    hang.set()
    await hanging
    assert loaded(pool) == ["a", "b"]


@loop
async def test_loads_at_the_same_time_share_the_memory() -> None:
    """A load reserves memory: another load waits for the rest, or is refused."""
    shelf = Shelf(a=60, b=60, c=101)
    pool = pool_over(shelf, memory=100)
    shelf.hangs["a"] = hang = threading.Event()
    first = asyncio.create_task(pool.preload("a"))
    await shelf.started("a")
    with pytest.raises(OutOfMemoryError):
        await pool.preload("c")
    second = asyncio.create_task(pool.preload("b"))
    while len(pool.running()) < 2:
        await asyncio.sleep(0)
    hang.set()
    await first
    await second  # `a` is idle by then, and is unloaded
    assert loaded(pool) == ["b"]
    assert sum(engine.memory_bytes for engine in shelf.alive) == 60


@loop
async def test_a_load_that_nobody_waits_for_is_cancelled() -> None:
    shelf = Shelf(a=1)
    pool = pool_over(shelf, memory=10)
    shelf.hangs["a"] = threading.Event()
    waiting = [asyncio.create_task(pool.preload("a")) for _ in range(2)]
    await shelf.started("a")
    waiting[0].cancel()
    await asyncio.wait([waiting[0]])
    [budget] = [entry.budget for entry in pool.entries()]
    assert budget is not None
    assert not budget.is_cancelled  # the other request still waits
    waiting[1].cancel()
    await asyncio.wait([waiting[1]])
    assert budget.is_cancelled
    del shelf.hangs["a"]
    await pool.preload("a")  # it waits for the end of the cancelled load, then loads again
    assert shelf.loads == ["a"]
    assert shelf.cancelled == ["a"]


@loop
async def test_a_load_that_takes_too_long_is_abandoned() -> None:
    shelf = Shelf(a=60, b=60)
    shelf.deaf.add("a")
    pool = pool_over(shelf, memory=100, load_seconds=0.05)
    shelf.hangs["a"] = hang = threading.Event()
    with pytest.raises(ModelLoadError, match="took longer than"):
        await pool.preload("a")
    assert loaded(pool) == []
    with pytest.raises(OutOfMemoryError):  # the thread still runs, and its memory counts
        await pool.preload("b")
    hang.set()
    await settle(pool)
    assert shelf.alive == []
    await pool.preload("b")
    await pool.close()


@loop
async def test_closing_cancels_loads() -> None:
    shelf = Shelf(a=1)
    pool = pool_over(shelf)
    pool.pin("a")
    shelf.hangs["a"] = threading.Event()
    await pool.start()
    await shelf.started("a")
    await pool.close()
    assert shelf.cancelled == ["a"]
    assert shelf.alive == []
