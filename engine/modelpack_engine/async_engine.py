"""AsyncEngine: the engine in a thread of its own, which makes every call to MLX.

Other threads and event loops talk to it through a queue; events come back as async streams.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import queue
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from types import TracebackType
from typing import TYPE_CHECKING

from modelpack.errors import ModelpackError
from modelpack_engine.errors import EngineError
from modelpack_engine.outputs import EngineStats, FinishReason, RequestEvent
from modelpack_engine.sampling_params import SamplingParams

if TYPE_CHECKING:
    from modelpack_engine.engine import Engine
    from modelpack_engine.loaders.tokenizer import Tokenizer

_log = logging.getLogger(__name__)


class EngineState(StrEnum):
    """Where an engine is in its life."""

    LOADING = "loading"
    READY = "ready"
    FAILED = "failed"
    STOPPED = "stopped"


class RequestStream:
    """The events of one request; leaving its context aborts what has not ended."""

    def __init__(self, engine: AsyncEngine, request_id: str, choices: int) -> None:
        self.request_id = request_id
        self._engine = engine
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[RequestEvent | Exception] = asyncio.Queue()
        self._open_choices = choices

    async def __aenter__(self) -> RequestStream:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.abort()

    def __aiter__(self) -> AsyncIterator[RequestEvent]:
        return self._read()

    async def _read(self) -> AsyncIterator[RequestEvent]:
        while self._open_choices:
            event = await self._events.get()
            if isinstance(event, Exception):
                self._open_choices = 0
                raise event
            if event.finished:
                self._open_choices -= 1
            if event.finish_reason is FinishReason.ERROR:
                raise EngineError(event.error or "the request failed")
            yield event

    async def abort(self) -> None:
        """End the request: its blocks are free within a step. Does nothing after its end."""
        if self._open_choices:
            self._open_choices = 0
            self._engine._call(_Abort(self.request_id))

    def _put(self, event: RequestEvent | Exception) -> None:
        """Hand an event over; called by the engine's thread."""
        try:
            self._loop.call_soon_threadsafe(self._events.put_nowait, event)
        except RuntimeError:  # the loop has ended: nobody listens
            self._engine._call(_Abort(self.request_id))


@dataclass(frozen=True, slots=True)
class _Add:
    stream: RequestStream
    token_ids: list[int]
    params: SamplingParams
    n: int
    accepted: asyncio.Future[None]


@dataclass(frozen=True, slots=True)
class _Abort:
    request_id: str


class AsyncEngine:
    """Starts a thread that makes the engine with `make_engine` and then runs its steps."""

    def __init__(self, make_engine: Callable[[], Engine]) -> None:
        self.state = EngineState.LOADING
        self.failure = ""
        self._make_engine = make_engine
        self._engine: Engine | None = None
        self._calls: queue.SimpleQueue[_Add | _Abort | None] = queue.SimpleQueue()
        self._streams: dict[str, RequestStream] = {}
        self._running_choices: dict[str, int] = {}
        self._numbers = itertools.count()
        self._loaded = threading.Event()
        self._thread = threading.Thread(target=self._run, name="modelpack-engine", daemon=True)
        self._thread.start()

    # What other threads call

    def wait_until_ready(self, timeout: float | None = None) -> None:
        """Return once the model is loaded; raise what loading it raised."""
        if not self._loaded.wait(timeout):
            raise EngineError(f"the model is not loaded after {timeout} s")
        if self.state is EngineState.FAILED:
            raise EngineError(self.failure)

    async def submit(
        self, token_ids: Sequence[int], params: SamplingParams, *, n: int = 1
    ) -> RequestStream:
        """Add a request; return its stream once it is accepted.

        Raises `RequestError`, `QueueFullError`, or `EngineError` if the engine does not run.
        """
        if self.state is not EngineState.READY:
            raise EngineError(f"the engine is {self.state}", hint="wait until it is ready")
        request_id = f"request-{next(self._numbers)}"
        stream = RequestStream(self, request_id, n)
        accepted = asyncio.get_running_loop().create_future()
        self._call(_Add(stream, list(token_ids), params, n, accepted))
        try:
            await accepted
        except asyncio.CancelledError:
            self._call(_Abort(request_id))
            raise
        return stream

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer, which any thread may use."""
        return self._ready().tokenizer

    @property
    def max_model_len(self) -> int:
        """The longest prompt and answer together, in tokens."""
        return self._ready().max_model_len

    def stats(self) -> EngineStats:
        """Return the engine's counters."""
        return EngineStats() if self._engine is None else self._engine.stats()

    def close(self) -> None:
        """Stop the thread; requests that have not ended are aborted."""
        self._calls.put(None)
        self._thread.join()

    def _ready(self) -> Engine:
        if self._engine is None:
            raise EngineError(f"the engine is {self.state}")
        return self._engine

    def _call(self, call: _Add | _Abort) -> None:
        self._calls.put(call)

    # The engine's thread

    def _run(self) -> None:
        try:
            self._live()
        finally:
            _end_streams()

    def _live(self) -> None:
        try:
            self._engine = self._make_engine()
            self.state = EngineState.READY
        except Exception as error:  # noqa: BLE001 - whatever it is, those who wait must hear of it
            _log.exception("the model could not be loaded")
            self.failure = str(error) or type(error).__name__
            self.state = EngineState.FAILED
            return
        finally:
            self._loaded.set()
        engine = self._engine
        while self._take_calls(engine):
            try:
                events = engine.step()
            except Exception as error:  # noqa: BLE001 - the requests fail, the engine goes on
                _log.exception("a step failed")
                events = engine.fail_all(f"a step of the engine failed: {error}")
            for event in events:
                self._hand_out(event)
        self.state = EngineState.STOPPED
        for event in engine.fail_all("the engine was stopped"):
            self._hand_out(event)

    def _take_calls(self, engine: Engine) -> bool:
        """Do what was asked for; wait for a call if there is nothing else to do."""
        while True:
            try:
                call = self._calls.get(block=not engine.has_work)
            except queue.Empty:
                return True
            if call is None:
                return False
            if isinstance(call, _Abort):
                engine.abort(call.request_id)
                self._drop(call.request_id)
            else:
                self._add(engine, call)

    def _add(self, engine: Engine, call: _Add) -> None:
        stream = call.stream
        try:
            engine.add_request(stream.request_id, call.token_ids, call.params, n=call.n)
        except ModelpackError as error:
            self._settle(call, error)
        except Exception as error:  # noqa: BLE001 - one request's trouble stays its own
            _log.exception("a request could not be added")
            self._settle(call, EngineError(f"unexpected {type(error).__name__}: {error}"))
        else:
            self._streams[stream.request_id] = stream
            self._running_choices[stream.request_id] = call.n
            self._settle(call, None)

    def _settle(self, call: _Add, error: Exception | None) -> None:
        def settle() -> None:
            if call.accepted.done():
                return
            if error is None:
                call.accepted.set_result(None)
            else:
                call.accepted.set_exception(error)

        try:
            call.stream._loop.call_soon_threadsafe(settle)
        except RuntimeError:  # the loop has ended
            self._calls.put(_Abort(call.stream.request_id))

    def _hand_out(self, event: RequestEvent) -> None:
        stream = self._streams.get(event.request_id)
        if stream is None:
            return
        stream._put(event)
        if event.finished:
            self._running_choices[event.request_id] -= 1
            if not self._running_choices[event.request_id]:
                self._drop(event.request_id)

    def _drop(self, request_id: str) -> None:
        self._streams.pop(request_id, None)
        self._running_choices.pop(request_id, None)


def _end_streams() -> None:
    """End what MLX keeps for this thread; left alone, it aborts the process at its exit."""
    import mlx.core as mx

    mx.synchronize()
    mx.clear_streams()
