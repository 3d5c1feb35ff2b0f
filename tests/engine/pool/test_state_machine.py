"""The pool stays consistent in any order of leases, releases, waits, unloads and failures."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from modelpack_engine.errors import EngineError, ModelLoadError, OutOfMemoryError
from modelpack_server.pool.entry import ModelState
from modelpack_server.pool.settings import ModelSettings
from tests.engine.pool.shelf import Clock, Shelf, pool_over

NAMES = st.sampled_from(["a", "b", "c", "d"])
BUDGET = 100


class PoolMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
        self.clock = Clock()
        self.shelf = Shelf(a=30, b=40, c=50, d=101)
        self.pool = pool_over(self.shelf, self.clock, memory=BUDGET)
        self.leases: list[tuple[str, AsyncExitStack]] = []

    def held(self) -> set[str]:
        return {name for name, _ in self.leases}

    async def settle(self) -> None:
        while self.pool._tasks:
            await asyncio.gather(*self.pool._tasks)

    @rule(name=NAMES, keep_alive=st.sampled_from([None, 0, 10, 1000]))
    def lease(self, name: str, keep_alive: float | None) -> None:
        async def enter() -> None:
            stack = AsyncExitStack()
            fits = self.shelf.sizes[name] + sum(
                self.shelf.sizes[other] for other in self.held() - {name}
            )
            try:
                await stack.enter_async_context(self.pool.lease(name, keep_alive=keep_alive))
            except OutOfMemoryError:
                assert fits > BUDGET
            except ModelLoadError:
                assert name in self.shelf.fails
            else:
                self.leases.append((name, stack))

        self.runner.run(enter())

    @precondition(lambda self: self.leases)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        _, stack = self.leases.pop(data.draw(st.integers(0, len(self.leases) - 1)))

        async def leave() -> None:
            await stack.aclose()
            await self.settle()

        self.runner.run(leave())

    @rule(seconds=st.sampled_from([1, 11, 99, 101]))
    def wait(self, seconds: int) -> None:
        self.clock.now += seconds

        async def reap() -> None:
            assert await self.pool.reap() > 0

        self.runner.run(reap())

    @rule(name=NAMES)
    def unload(self, name: str) -> None:
        async def take_down() -> None:
            for held, stack in self.leases:
                if held == name:
                    await stack.aclose()
            self.leases = [lease for lease in self.leases if lease[0] != name]
            await self.pool.unload([name])
            assert name not in [model.name for model in self.pool.running()]

        self.runner.run(take_down())

    @rule(name=NAMES, size=st.sampled_from([None, 10, 20]))
    def configure(self, name: str, size: int | None) -> None:
        async def configure() -> None:
            try:
                await self.pool.configure(name, ModelSettings(context_size=size))
            except OutOfMemoryError:
                assert self.shelf.sizes[name] > BUDGET
            except EngineError:
                assert name in self.held()

        self.runner.run(configure())

    @rule(name=NAMES)
    def break_or_mend(self, name: str) -> None:
        self.shelf.fails ^= {name}

    @invariant()
    def memory_is_within_the_budget(self) -> None:
        assert sum(engine.memory_bytes for engine in self.shelf.alive) <= BUDGET

    @invariant()
    def what_runs_is_what_is_alive(self) -> None:
        running = self.pool.running()
        assert all(model.state is ModelState.READY for model in running)
        alive = sorted(engine.key for engine in self.shelf.alive)
        assert sorted(model.stored.key for model in running) == alive

    @invariant()
    def what_is_held_stays(self) -> None:
        users = {model.name: model.users for model in self.pool.running()}
        for name in self.held():
            assert users[name] == sum(held == name for held, _ in self.leases)

    def teardown(self) -> None:
        async def close() -> None:
            for _, stack in self.leases:
                await stack.aclose()
            await self.pool.close()

        self.runner.run(close())
        assert self.shelf.alive == []
        self.runner.close()


TestPool = PoolMachine.TestCase
TestPool.settings = settings(max_examples=40, stateful_step_count=25, deadline=None)
