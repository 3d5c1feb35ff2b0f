"""AsyncTranscriber: requests in order, and how they end."""

from __future__ import annotations

import asyncio
import gc
import threading
import weakref
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager
from typing import Any, cast

import pytest

from modelpack_engine.async_engine import EngineState
from modelpack_engine.errors import EngineError, QueueFullError, RequestError
from modelpack_engine.speech import async_transcriber
from modelpack_engine.speech.async_transcriber import AsyncTranscriber
from modelpack_engine.speech.loader import Transcriber
from modelpack_engine.speech.transcript import OnWindow, Transcript, TranscriptionRequest
from tests.engine.speech.tiny import Samples, noise

SOUND = noise(0.5)


class Scripted:
    """A model of windows that end when the test says so; the prompt is the text."""

    kind = "scripted"

    def __init__(self, windows: int = 2) -> None:
        self.windows = windows
        self.entered = threading.Semaphore(0)
        self.go_on = threading.Semaphore(0)
        self.begun: list[str] = []
        self.threads: set[int] = set()

    def check(self, request: TranscriptionRequest) -> None:
        if request.prompt == "refused":
            raise RequestError("refused", param="prompt")

    def transcribe(self, request: TranscriptionRequest, on_window: OnWindow) -> Transcript:
        self.threads.add(threading.get_ident())
        for number in range(self.windows):
            on_window()
            self.begun.append(f"{request.prompt} {number}")
            self.entered.release()
            assert self.go_on.acquire(timeout=60)
            if request.prompt == "fails":
                raise ValueError("the device is gone")
        return Transcript(request.prompt, request.seconds)


@pytest.fixture
def model() -> Iterator[Scripted]:
    model = Scripted()
    yield model
    model.go_on.release(1000)


@asynccontextmanager
async def running(model: Scripted) -> AsyncIterator[AsyncTranscriber]:
    engine = AsyncTranscriber(lambda: Transcriber(cast(Any, model), "cpu", 7))
    await asyncio.to_thread(engine.wait_until_ready, 60)
    try:
        yield engine
    finally:
        model.go_on.release(1000)
        await asyncio.to_thread(engine.close)


def run(work: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(asyncio.wait_for(work(), 60))


def asked(prompt: str) -> TranscriptionRequest:
    return TranscriptionRequest(SOUND, prompt=prompt)


def test_requests_run_in_order_in_one_thread(model: Scripted) -> None:
    async def work() -> None:
        async with running(model) as engine:
            tasks = [asyncio.create_task(engine.transcribe(asked(name))) for name in "abc"]
            await asyncio.to_thread(model.entered.acquire)
            stats = engine.stats()
            assert (stats.num_running, stats.num_waiting, stats.num_finished) == (1, 2, 0)
            model.go_on.release(6)
            made = await asyncio.gather(*tasks)
            assert [one.text for one in made] == ["a", "b", "c"]
            assert model.begun == ["a 0", "a 1", "b 0", "b 1", "c 0", "c 1"]
            stats = engine.stats()
            assert (stats.num_running, stats.num_waiting, stats.num_finished) == (0, 0, 3)
            assert engine.memory_bytes == 7

    run(work)
    assert len(model.threads) == 1
    assert threading.get_ident() not in model.threads


def test_a_cancelled_request_ends_before_its_next_window(model: Scripted) -> None:
    async def work() -> None:
        async with running(model) as engine:
            first = asyncio.create_task(engine.transcribe(asked("a")))
            waiting = asyncio.create_task(engine.transcribe(asked("b")))
            last = asyncio.create_task(engine.transcribe(asked("c")))
            await asyncio.to_thread(model.entered.acquire)
            for task in (first, waiting):
                task.cancel()
            await asyncio.gather(first, waiting, return_exceptions=True)
            model.go_on.release(3)
            assert (await last).text == "c"
            assert model.begun == ["a 0", "c 0", "c 1"]
            assert engine.meter.finished["abort"] == 2
            assert engine.meter.finished["stop"] == 1

    run(work)


def test_a_failure_fails_its_request_alone(model: Scripted) -> None:
    async def work() -> None:
        async with running(model) as engine:
            model.go_on.release(3)
            failing = engine.transcribe(asked("fails"))
            with pytest.raises(EngineError, match="the device is gone"):
                await failing
            assert (await engine.transcribe(asked("b"))).text == "b"
            with pytest.raises(RequestError):
                await engine.transcribe(asked("refused"))
            assert engine.meter.finished["error"] == 1

    run(work)


def test_a_full_queue(model: Scripted, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(async_transcriber, "MAX_WAITING", 2)

    async def work() -> None:
        async with running(model) as engine:
            tasks = [asyncio.create_task(engine.transcribe(asked(name))) for name in "abc"]
            await asyncio.to_thread(model.entered.acquire)
            with pytest.raises(QueueFullError, match="2 requests wait"):
                await engine.transcribe(asked("d"))
            model.go_on.release(6)
            await asyncio.gather(*tasks)

    run(work)


def test_closing_fails_what_waits_and_ends_what_runs(model: Scripted) -> None:
    async def work() -> None:
        async with running(model) as engine:
            tasks = [asyncio.create_task(engine.transcribe(asked(name))) for name in "ab"]
            await asyncio.to_thread(model.entered.acquire)
            closing = asyncio.create_task(asyncio.to_thread(engine.close))
            while engine.state is not EngineState.STOPPED:
                await asyncio.sleep(0)
            model.go_on.release(1)
            for task in tasks:
                with pytest.raises(EngineError, match="was stopped"):
                    await task
            await closing
            assert model.begun == ["a 0"]
            with pytest.raises(EngineError, match="the model is stopped"):
                await engine.transcribe(asked("c"))

    run(work)


def test_a_cancelled_request_gives_up_its_sound_at_once(model: Scripted) -> None:
    async def work() -> None:
        async with running(model) as engine:
            first = asyncio.create_task(engine.transcribe(asked("a")))
            await asyncio.to_thread(model.entered.acquire)
            sound = noise(1)
            held = weakref.ref(sound)
            waiting = asyncio.create_task(engine.transcribe(TranscriptionRequest(sound)))
            del sound
            await asyncio.sleep(0)
            assert held() is not None
            waiting.cancel()
            await asyncio.wait([waiting])
            del waiting
            gc.collect()
            assert held() is None
            model.go_on.release(2)
            assert (await first).text == "a"
            assert model.begun == ["a 0", "a 1"]

    run(work)


def test_sounds_are_made_by_requests_with_a_place(
    model: Scripted, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(async_transcriber, "MAX_WAITING", 0)
    made: list[str] = []

    async def work() -> None:
        ready = asyncio.Event()

        async def sound() -> Samples:
            made.append("sound")
            await ready.wait()
            return SOUND

        async with running(model) as engine:
            with pytest.raises(RequestError, match="refused"):
                await engine.transcribe(asked("refused"), sound)
            with pytest.raises(RequestError, match="temperature"):
                await engine.transcribe(TranscriptionRequest(SOUND[:0], temperature=2), sound)
            assert made == []
            first = asyncio.create_task(
                engine.transcribe(TranscriptionRequest(SOUND[:0], prompt="a"), sound)
            )
            await asyncio.sleep(0)
            assert made == ["sound"]
            with pytest.raises(QueueFullError):
                await engine.transcribe(asked("b"), sound)
            assert made == ["sound"]
            ready.set()
            model.go_on.release(2)
            assert (await first).text == "a"

    run(work)


def test_a_request_that_meets_the_end_of_the_thread_fails(model: Scripted) -> None:
    async def work() -> None:
        async with running(model) as engine:

            async def sound() -> Samples:
                await asyncio.to_thread(engine.close)
                return SOUND

            with pytest.raises(EngineError, match="the model is stopped"):
                await engine.transcribe(asked("a"), sound)

    run(work)


def test_it_answers_no_prompts(model: Scripted) -> None:
    async def work() -> None:
        async with running(model) as engine:
            with pytest.raises(RequestError, match="answers no prompts"):
                await engine.submit(cast(Any, None))
            with pytest.raises(RequestError, match="answers no prompts"):
                _ = engine.tokenizer

    run(work)
