"""AsyncEngine: the engine in a thread of its own, which makes every call to MLX.

Other threads and event loops talk to it through a queue; events come back as async streams.
"""

from __future__ import annotations

import asyncio
import contextvars
import gc
import itertools
import logging
import queue
import threading
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

from modelpack.errors import ModelpackError
from modelpack_engine.errors import EngineError
from modelpack_engine.meter import Meter
from modelpack_engine.outputs import EngineStats, RequestEvent
from modelpack_engine.request_stream import Abort, RequestStream
from modelpack_engine.sampling_params import SamplingParams

if TYPE_CHECKING:
    from modelpack_engine.loaders.tokenizer import Tokenizer
    from modelpack_engine.stepping import SteppingEngine

_log = logging.getLogger(__name__)

_Delivery = tuple[RequestStream, RequestEvent | Exception]


class EngineState(StrEnum):
    """Where an engine is in its life."""

    LOADING = "loading"
    READY = "ready"
    FAILED = "failed"
    STOPPED = "stopped"


@dataclass(frozen=True, slots=True)
class _Add:
    stream: RequestStream
    token_ids: list[int]
    params: SamplingParams
    n: int
    continues_text: bool
    cache_salt: bytes
    accepted: asyncio.Future[None]


class AsyncEngine:
    """Starts a thread that makes the engine with `make_engine` and then runs its steps.

    `meter` takes the measure of its requests. `error` is what loading raised, `failure` its text,
    or that of what stopped the thread later. Whatever happens to it, nobody waits for ever: streams
    end with an error then, and so do requests that are added.
    """

    def __init__(
        self, make_engine: Callable[[], SteppingEngine], meter: Meter | None = None
    ) -> None:
        self.state = EngineState.LOADING
        self.failure = ""
        self.error: Exception | None = None
        self.meter = meter or Meter()
        self._make_engine = make_engine
        self._engine: SteppingEngine | None = None
        self._calls: queue.SimpleQueue[_Add | Abort | None] = queue.SimpleQueue()
        self._gate = threading.Lock()  # of the queue, which nobody reads after the engine's end
        self._streams: dict[str, RequestStream] = {}
        self._running_choices: dict[str, int] = {}
        self._numbers = itertools.count()
        self._loaded = threading.Event()
        self._thread = threading.Thread(
            target=contextvars.copy_context().run,  # the load's budget
            args=(self._run,),
            name="modelpack-engine",
            daemon=True,
        )
        self._thread.start()

    # What other threads call

    def wait_until_ready(self, timeout: float | None = None) -> None:
        """Return once the model is loaded; raise what loading it raised."""
        if not self._loaded.wait(timeout):
            raise EngineError(f"the model is not loaded after {timeout} s")
        if self.state is EngineState.FAILED:
            raise EngineError(self.failure)

    async def submit(
        self,
        token_ids: Sequence[int],
        params: SamplingParams,
        *,
        n: int = 1,
        continues_text: bool = False,
        cache_salt: bytes = b"",
    ) -> RequestStream:
        """Add a request; return its stream once it is accepted. Arguments: `Engine.add_request`.

        Raises `RequestError`, `QueueFullError`, or `EngineError` if the engine does not run.
        """
        request_id = f"request-{next(self._numbers)}"
        stream = RequestStream(request_id, len(token_ids), n, self._call)
        accepted = asyncio.get_running_loop().create_future()
        add = _Add(stream, list(token_ids), params, n, continues_text, cache_salt, accepted)
        if not self._call(add):
            raise EngineError(f"the engine is {self.state}", hint="wait until it is ready")
        try:
            await accepted
        except asyncio.CancelledError:
            self._call(Abort(request_id))
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

    @property
    def vocab_size(self) -> int:
        """The number of the model's logits."""
        return self._ready().vocab_size

    @property
    def memory_bytes(self) -> int:
        """The bytes of its weights and its KV cache."""
        return self._ready().memory_bytes

    def stats(self) -> EngineStats:
        """Return the engine's counters."""
        return EngineStats() if self._engine is None else self._engine.stats()

    def close(self) -> None:
        """Stop the thread; requests that have not ended fail. Its memory is free afterwards."""
        self._calls.put(None)
        self._thread.join()
        self._engine = None

    def _ready(self) -> SteppingEngine:
        if self._engine is None:
            raise EngineError(f"the engine is {self.state}")
        return self._engine

    def _call(self, call: _Add | Abort) -> bool:
        """Queue a call; return whether the engine runs, which will do it."""
        with self._gate:
            runs = self.state is EngineState.READY
            if runs:
                self._calls.put(call)
        return runs

    # The engine's thread

    def _run(self) -> None:
        try:
            self._live()
        finally:
            self._engine = None
            end_streams()

    def _live(self) -> None:
        try:
            self._engine = self._make_engine()
            self.state = EngineState.READY
        except BaseException as error:  # noqa: BLE001 - whatever it is, waiting callers get it
            if not isinstance(error, ModelpackError):  # whose text says it all
                _log.exception("the model could not be loaded")
            self.failure = str(error) or type(error).__name__
            self.error = error if isinstance(error, Exception) else EngineError(self.failure)
            self.state = EngineState.FAILED
            return
        finally:
            self._loaded.set()
        engine = self._engine
        try:
            while self._take_calls(engine):
                try:
                    events = engine.step()
                except BaseException as error:  # noqa: BLE001 - the requests fail, not the engine
                    _log.exception("a step failed")
                    events = engine.fail_all(f"a step of the engine failed: {error}")
                self.meter.stepped(events)
                self._hand_out(events)
            self._end(EngineState.STOPPED)
            self._hand_out(engine.fail_all("the engine was stopped"))
            engine.close()
        except BaseException as error:  # noqa: BLE001 - it cannot go on: fail pending requests
            _log.exception("the engine failed")
            self.failure = f"the engine failed: {error}"
            self._end(EngineState.FAILED)
            for stream in list(self._streams.values()):
                self._deliver([(stream, EngineError(self.failure))])
            self._streams.clear()
            self._running_choices.clear()

    def _end(self, state: EngineState) -> None:
        """Take no calls any more, and refuse those that nobody has read."""
        with self._gate:
            self.state = state
        while not self._calls.empty():
            call = self._calls.get()
            if isinstance(call, _Add):
                self._settle(call, EngineError(self.failure or f"the engine is {state}"))

    def _take_calls(self, engine: SteppingEngine) -> bool:
        """Do what was asked for; wait for a call if there is nothing else to do."""
        while True:
            try:
                call = self._calls.get(block=not engine.has_work)
            except queue.Empty:
                return True
            if call is None:
                return False
            if isinstance(call, Abort):
                aborted = engine.abort(call.request_id, call.index)
                self.meter.stepped(aborted)
                self._hand_out(aborted)
            else:
                self._add(engine, call)

    def _add(self, engine: SteppingEngine, call: _Add) -> None:
        stream = call.stream
        try:
            engine.add_request(
                stream.request_id,
                call.token_ids,
                call.params,
                n=call.n,
                continues_text=call.continues_text,
                cache_salt=call.cache_salt,
            )
        except ModelpackError as error:
            self._settle(call, error)
        except BaseException as error:  # noqa: BLE001 - one request's trouble stays its own
            _log.exception("a request could not be added")
            self._settle(call, EngineError(f"unexpected {type(error).__name__}: {error}"))
        else:
            self._streams[stream.request_id] = stream
            self._running_choices[stream.request_id] = call.n
            self.meter.accepted(call.params.max_tokens, call.n)
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
            call.stream.loop.call_soon_threadsafe(settle)
        except RuntimeError:  # the loop has ended
            self._call(Abort(call.stream.request_id))

    def _hand_out(self, events: Iterable[RequestEvent]) -> None:
        """Give events to their streams: one call for each event loop, however many there are."""
        by_loop: dict[asyncio.AbstractEventLoop, list[_Delivery]] = defaultdict(list)
        events = list(events)
        for event in events:
            stream = self._streams.get(event.request_id)
            if stream is not None:
                by_loop[stream.loop].append((stream, event))
        for batch in by_loop.values():
            self._deliver(batch)
        self._close_choices(events)

    def _deliver(self, batch: list[_Delivery]) -> None:
        """Give streams of one event loop what is new."""
        try:
            batch[0][0].loop.call_soon_threadsafe(_put, batch)
        except RuntimeError:  # the loop has ended: nobody listens
            for stream, _ in batch:
                self._call(Abort(stream.request_id))

    def _close_choices(self, events: Iterable[RequestEvent]) -> None:
        """Forget requests whose last choice has ended."""
        for event in events:
            if event.finished and event.request_id in self._running_choices:
                self._running_choices[event.request_id] -= 1
                if not self._running_choices[event.request_id]:
                    del self._running_choices[event.request_id]
                    self._streams.pop(event.request_id, None)


def _put(batch: list[_Delivery]) -> None:
    for stream, event in batch:
        stream.put(event)


def end_streams() -> None:
    """End what MLX keeps for this thread; left alone, it aborts the process at its exit."""
    import mlx.core as mx

    gc.collect()  # a model is full of cycles, and its memory is wanted now
    mx.synchronize()
    mx.clear_cache()
    mx.clear_streams()
