"""The effects of API keys with a list of models on the pool."""

from __future__ import annotations

import asyncio
import math
import threading

import pytest

from modelpack.errors import NotFoundError
from modelpack_engine.errors import BusyError, LoadingError, ModelLoadError, OutOfMemoryError
from modelpack_server.api.ollama.chat import unload
from modelpack_server.gateway.caller import ANYONE, Caller
from modelpack_server.pool import names as access
from modelpack_server.pool.catalogue import StoredModel
from modelpack_server.pool.names import MAX_NAME, Names
from modelpack_server.pool.pool import ModelPool
from modelpack_server.pool.settings import ModelSettings
from tests.engine.pool.shelf import Clock, Shelf, pool_over
from tests.engine.pool.test_pool import loaded, loop, settle

ALICE, BOB = Caller("alice", ("ai/a", "ai/b")), Caller("bob", ("ai/*",))
ADMIN = Caller("admin")


async def use(pool: ModelPool, caller: Caller, name: str, keep_alive: float | None = None) -> None:
    """Use a model as a caller."""
    with access.acting_for(caller):
        async with pool.lease(name, keep_alive=keep_alive):
            pass
    await settle(pool)


@loop
async def test_no_call_of_the_pool_finds_a_model_that_is_not_allowed() -> None:
    pool = pool_over(Shelf(a=1, c=1))
    await use(pool, ADMIN, "c")
    with access.acting_for(ALICE):
        assert (await pool.find("a")).names == ("a", "ai/a")
        assert [model.key for model in await pool.stored()] == ["sha256:a"]
        assert pool.running() == []
        assert pool.entries() == []
        for call in (pool.find, pool.preload, pool.settings):
            with pytest.raises(NotFoundError, match="no such model: ai/c"):
                await call("ai/c")
        with pytest.raises(NotFoundError):
            async with pool.lease("ai/c"):
                pass
        with pytest.raises(NotFoundError):
            await pool.unload(["ai/c"])
        with pytest.raises(NotFoundError):
            await pool.configure("ai/c", ModelSettings(context_size=5))
        assert await pool.unload() == []
    assert loaded(pool) == ["c"]
    await pool.close()


@pytest.mark.parametrize("keep_alive", [0.0, 1.0])
def test_a_key_does_not_shorten_what_others_asked_for(keep_alive: float) -> None:
    @loop
    async def run() -> None:
        clock = Clock()
        pool = pool_over(Shelf(a=1), clock)
        await use(pool, BOB, "a", 50)
        await use(pool, ALICE, "a", keep_alive)
        with access.acting_for(ALICE):
            await unload(pool, "a")
            with pytest.raises(BusyError):
                await pool.configure("a", ModelSettings(context_size=7))
        clock.now += 49
        await pool.reap()
        assert loaded(pool) == ["a"]
        clock.now += 1
        await pool.reap()
        assert loaded(pool) == []
        await pool.close()

    run()


@loop
async def test_a_key_shortens_what_it_alone_asked_for() -> None:
    clock = Clock()
    shelf = Shelf(a=1)
    pool = pool_over(shelf, clock)
    await use(pool, ALICE, "a", math.inf)
    clock.now += 1e9
    await pool.reap()
    assert loaded(pool) == ["a"]
    await use(pool, ALICE, "a", 0)
    assert loaded(pool) == []
    await use(pool, ALICE, "a")
    with access.acting_for(ALICE):
        await unload(pool, "a")
    assert loaded(pool) == []
    await use(pool, BOB, "a", 10)  # ends before alice unloads it
    clock.now += 10
    with access.acting_for(ALICE):
        await unload(pool, "a")
    assert loaded(pool) == []
    await pool.close()


@loop
async def test_a_key_does_not_unload_what_is_pinned_or_in_use() -> None:
    pool = pool_over(Shelf(a=1, b=1))
    pool.pin("a")
    await pool.start()
    await settle_start(pool)
    with access.acting_for(ALICE):
        await unload(pool, "a")
        with pytest.raises(BusyError):
            await pool.configure("a", ModelSettings(context_size=7))
    await use(pool, ALICE, "a", 0)
    assert [(model.name, model.pinned) for model in pool.running()] == [("a", True)]
    with access.acting_for(BOB):
        async with pool.lease("b", keep_alive=0):
            with access.acting_for(ALICE):
                await unload(pool, "b")
                assert await pool.unload(["b"], grace=0) == []
            assert loaded(pool) == ["a", "b"]
    with access.acting_for(ADMIN):
        await unload(pool, "a")
    assert "a" not in loaded(pool)
    await pool.close()


async def settle_start(pool: ModelPool) -> None:
    """Wait until the pinned models are loaded."""
    await pool.preload("a")


@pytest.mark.parametrize("caller", [ADMIN, ANYONE])
def test_who_manages_models_decides_for_all(caller: Caller) -> None:
    @loop
    async def run() -> None:
        pool = pool_over(Shelf(a=1))
        await use(pool, BOB, "a", math.inf)
        await use(pool, caller, "a", 0)
        assert loaded(pool) == []
        await pool.close()

    run()


@loop
async def test_errors_name_no_other_models() -> None:
    shelf = Shelf(a=60, c=60)
    shelf.fails.add("b")
    shelf.sizes["b"] = 1
    pool = pool_over(shelf, memory=100, max_waiting=0)
    pool.pin("c")
    await pool.start()
    with pytest.raises(LoadingError, match="wait for the model c"):
        await pool.preload("c")
    with access.acting_for(BOB), pytest.raises(LoadingError) as full:
        await pool.preload("c")
    assert str(full.value) == "0 requests wait for the model"
    pool._max_waiting = 5
    await pool.preload("c")
    with access.acting_for(ALICE):
        with pytest.raises(OutOfMemoryError) as large:
            await pool.preload("a")
        with pytest.raises(ModelLoadError) as damaged:
            await pool.preload("b")
        assert pool.readiness() == (True, "")
    assert str(large.value) == "the model does not fit into the free memory"
    assert str(damaged.value) == "cannot load the model"
    with pytest.raises(OutOfMemoryError, match="held by c"):
        await pool.preload("a")
    await pool.close()


@loop
async def test_a_name_that_moves_while_it_is_looked_up_is_looked_up_again() -> None:
    begun, go_on = threading.Event(), threading.Event()

    class Moving(Shelf):
        def find(self, name: str) -> StoredModel:
            found = super().find("b" if self.index else "a")
            if not begun.is_set():
                begun.set()
                assert go_on.wait(10)
            return found

    shelf = Moving(a=1, b=1)
    names = Names(shelf)
    early = asyncio.create_task(names.find("x"))
    assert await asyncio.to_thread(begun.wait, 10)
    shelf.index = 1  # from now on the name refers to another model
    assert (await names.find("y")).key == "sha256:b"
    go_on.set()
    assert (await early).key == "sha256:a"
    assert (await names.find("x")).key == "sha256:b"


@loop
async def test_names_that_clients_choose_take_little_memory() -> None:
    class Lenient(Shelf):
        def find(self, name: str) -> StoredModel:
            assert len(name) <= MAX_NAME, "this is no name"
            return super().find(name.strip())

    names = Names(Lenient(a=1))
    names.give("nick", "ai/a")
    await names.find("nick")
    for count in range(MAX_NAME - 1):
        for ending in ("", "\t", "\n", "\r", "\f"):
            await names.find(" " * count + "a" + ending)
    assert len(names._found) <= 4096
    for caller in (ADMIN, ALICE):
        with access.acting_for(caller), pytest.raises(NotFoundError):
            await names.find(" " * MAX_NAME + "a")
    with access.acting_for(Caller("carol", ("nick",))):  # the server's alias remains
        assert (await names.find("a")).key == "sha256:a"
