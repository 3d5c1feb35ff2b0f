"""A failure of the engine's thread fails all its requests; none waits without end."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from modelpack_engine.async_engine import AsyncEngine, EngineState
from modelpack_engine.engine import Engine
from modelpack_engine.errors import EngineError
from modelpack_engine.outputs import FinishReason, RequestEvent
from modelpack_engine.request import EngineRequest, SamplingParams
from tests.engine.serving.tiny import tiny_engine

LONG = SamplingParams(max_tokens=200, temperature=0, ignore_eos=True)


class Breaking:
    """A tiny engine that fails on demand."""

    def __init__(self) -> None:
        self.engine: Engine | None = None

    def make(self) -> Engine:
        self.engine = tiny_engine()
        return self.engine

    def fail(self, *names: str) -> None:
        for name in names:
            setattr(self.engine, name, self._fails)

    @staticmethod
    def _fails(*args: object) -> list[RequestEvent]:
        raise RuntimeError("the device is lost")


def with_engine(use: Callable[[AsyncEngine, Breaking], object]) -> AsyncEngine:
    breaking = Breaking()
    engine = AsyncEngine(breaking.make)
    engine.wait_until_ready(60)
    try:
        use(engine, breaking)
    finally:
        engine.close()
    assert not engine._streams
    assert not engine._running_choices
    return engine


async def last_of(engine: AsyncEngine, broken: Callable[[], None]) -> str:
    """Return the end of a stream for a failure after its beginning."""
    async with await engine.submit(EngineRequest([1, 2, 3], LONG)) as stream:
        try:
            async for _ in stream:
                broken()
        except EngineError as error:
            return str(error)
    return "the answer"


def test_a_step_that_fails_ends_its_requests_and_no_others() -> None:
    def use(engine: AsyncEngine, breaking: Breaking) -> None:
        said = asyncio.run(last_of(engine, lambda: breaking.fail("step")))
        assert said == "a step of the engine failed: the device is lost"
        del breaking.engine.__dict__["step"]  # type: ignore[union-attr]

        async def another() -> list[RequestEvent]:
            async with await engine.submit(
                EngineRequest([1, 2], SamplingParams(max_tokens=2))
            ) as stream:
                return [event async for event in stream]

        assert asyncio.run(another())[-1].finish_reason is not FinishReason.ERROR

    assert with_engine(use).state is EngineState.STOPPED


def test_an_engine_that_cannot_even_fail_tells_everybody() -> None:
    def use(engine: AsyncEngine, breaking: Breaking) -> None:
        async def run() -> None:
            both = (last_of(engine, lambda: breaking.fail("step", "fail_all")) for _ in range(2))
            assert set(await asyncio.wait_for(asyncio.gather(*both), 60)) == {
                "the engine failed: the device is lost"
            }
            with pytest.raises(EngineError, match="failed"):
                await asyncio.wait_for(engine.submit(EngineRequest([1], LONG)), 60)

        asyncio.run(run())
        assert engine.state is EngineState.FAILED
        assert "the device is lost" in engine.failure

    with_engine(use)


def test_requests_that_nobody_has_read_are_refused() -> None:
    """A request is added while the thread is in the step that fails."""

    def use(engine: AsyncEngine, breaking: Breaking) -> None:
        async def run() -> None:
            added: list[asyncio.Task[object]] = []
            loop = asyncio.get_running_loop()

            def step() -> list[RequestEvent]:
                def add() -> None:
                    added.append(loop.create_task(engine.submit(EngineRequest([1], LONG))))

                loop.call_soon_threadsafe(add)
                while engine._calls.empty():
                    pass
                raise RuntimeError("the device is lost")

            async with await engine.submit(EngineRequest([1, 2, 3], LONG)) as stream:
                breaking.fail("fail_all")
                breaking.engine.step = step  # type: ignore[method-assign, union-attr]
                with pytest.raises(EngineError, match="the device is lost"):
                    [event async for event in stream]
                with pytest.raises(EngineError, match="the device is lost"):
                    await asyncio.wait_for(added[0], 60)

        asyncio.run(run())

    with_engine(use)


def test_an_engine_that_is_stopped_ends_its_streams() -> None:
    def use(engine: AsyncEngine, breaking: Breaking) -> None:
        async def run() -> None:
            async with await engine.submit(EngineRequest([1, 2, 3], LONG)) as stream:
                closing = asyncio.get_running_loop().run_in_executor(None, engine.close)
                with pytest.raises(EngineError, match="stopped"):
                    [event async for event in stream]
                await closing
            with pytest.raises(EngineError, match="stopped"):
                await asyncio.wait_for(engine.submit(EngineRequest([1], LONG)), 60)

        asyncio.run(run())

    with_engine(use)
