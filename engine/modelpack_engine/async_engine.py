"""AsyncEngine: an engine in its own thread, whose events asyncio code reads as streams.

The server submits an `EngineRequest` to an `EngineClient` and iterates over the `RequestStream`
that it returns. Events that wait in a stream are merged, so a slow reader gets one event for each
choice. `EngineLoop` runs the engine; `AsyncEngine` is a client with a loop in a thread.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextvars
import itertools
import logging
import queue
import threading
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from typing import TYPE_CHECKING, Generic, TypeVar

from modelpack.errors import ModelpackError
from modelpack_engine.core.metrics import Meter
from modelpack_engine.errors import EngineError, RequestError
from modelpack_engine.outputs import EngineStats, FinishReason, RequestEvent
from modelpack_engine.platform.streams import reused_streams
from modelpack_engine.request import EngineRequest

if TYPE_CHECKING:
    from modelpack.formats.adapter import Adapter
    from modelpack_engine.models.tokenizer import Tokenizer
    from modelpack_engine.runner.base_engine import BaseEngine
    from modelpack_engine.vision.processor import MediaProcessor

_log = logging.getLogger(__name__)

# Seconds without a call before idle time is used: the next request waits for what has begun.
_QUIET_SECONDS = 0.1


@dataclass(frozen=True, slots=True)
class Abort:
    """A call that ends a request, or one of its choices."""

    request_id: str
    index: int | None = None


class RequestStream:
    """The events of one request: iterate over it; leaving its context aborts the request.

    `finals` are the last events of the choices whose end was read. `num_tokens` counts the
    generated tokens that were read.
    """

    def __init__(
        self, request_id: str, prompt_tokens: int, choices: int, call: Callable[[Abort], object]
    ) -> None:
        self.request_id = request_id
        self.prompt_tokens = prompt_tokens
        self.finals: list[RequestEvent] = []
        self.num_tokens = 0
        self.loop = asyncio.get_running_loop()
        self._call = call
        self._open = set(range(choices))
        self._waiting: list[RequestEvent | Exception] = []
        self._reader: asyncio.Future[None] | None = None

    async def __aenter__(self) -> RequestStream:
        return self

    async def __aexit__(self, *_error: object) -> None:
        self.abort()

    def abort(self) -> None:
        """End the request and free its blocks within a step; do nothing after its end."""
        if self._open:
            self._open.clear()
            self._call(Abort(self.request_id))

    def cancel(self) -> None:
        """End all choices; the stream still yields their last events."""
        for index in tuple(self._open):
            self.abort_choice(index)

    def abort_choice(self, index: int) -> None:
        """End one choice; the stream still yields its last event."""
        if index in self._open:
            self._call(Abort(self.request_id, index))

    def put(self, event: RequestEvent | Exception) -> None:
        """Add an event to the stream; must be called on the event loop."""
        self._waiting.append(event)
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)

    async def __aiter__(self) -> AsyncIterator[RequestEvent]:
        while self._open:
            if not self._waiting:
                self._reader = self.loop.create_future()
                await self._reader
                self._reader = None
            waiting, self._waiting = self._waiting, []
            for event in waiting if len(waiting) == 1 else _merged(waiting):
                if isinstance(event, Exception):
                    self._open.clear()
                    raise event
                if event.index not in self._open:
                    continue
                self.num_tokens += len(event.token_ids)
                if event.finish_reason is not None:
                    self._open.discard(event.index)
                    self.finals.append(event)
                    if event.finish_reason is FinishReason.ERROR:
                        self.abort()
                        raise _failure(event)
                yield event


def _failure(event: RequestEvent) -> EngineError:
    message = event.error or "the request failed"
    if event.error_param is not None:
        return RequestError(message, param=event.error_param)
    return EngineError(message)


def _merged(events: list[RequestEvent | Exception]) -> list[RequestEvent | Exception]:
    """Return one event for each choice, in the order of their first events."""
    merged: dict[int, RequestEvent] = {}
    rest: list[Exception] = []
    for event in events:
        if isinstance(event, Exception):
            rest.append(event)
            continue
        before = merged.get(event.index)
        merged[event.index] = event if before is None else _joined(before, event)
    return [*merged.values(), *rest]


def _joined(first: RequestEvent, second: RequestEvent) -> RequestEvent:
    logprobs = first.logprobs
    if second.logprobs is not None:
        logprobs = (*(logprobs or ()), *second.logprobs)
    return RequestEvent(  # `replace` takes several times as long
        second.request_id, second.index, first.token_ids + second.token_ids,
        first.text + second.text, logprobs, first.prompt_logprobs, second.finish_reason,
        second.stop_reason, second.usage, second.timing, second.error, second.error_param,
        first.cached_tokens,
    )  # fmt: skip


_Delivery = tuple[RequestStream, RequestEvent | Exception]
Loaded = TypeVar("Loaded")
Call = TypeVar("Call")
Result = TypeVar("Result")


def settle(future: asyncio.Future[Result], result: Result | Exception) -> bool:
    """Set the result of a future, or its exception, on its event loop; any thread may call this.

    Does nothing if the future is done. Returns False if the loop has ended.
    """

    def set_result() -> None:
        if future.done():
            return
        if isinstance(result, Exception):
            future.set_exception(result)
        else:
            future.set_result(result)

    try:
        future.get_loop().call_soon_threadsafe(set_result)
    except RuntimeError:  # the loop has ended
        return False
    return True


class EngineState(StrEnum):
    """The state of an engine's thread."""

    LOADING = "loading"
    READY = "ready"
    FAILED = "failed"
    STOPPED = "stopped"


class ModelThread(Generic[Loaded, Call]):
    """A thread that loads a model with `load` and then serves its requests, the calls.

    `meter` records the histograms of the requests. `error` is the exception that loading raised;
    `failure` is its text, or the text of the exception that stopped the thread later.
    """

    def __init__(self, name: str, load: Callable[[], Loaded], meter: Meter | None) -> None:
        self.state = EngineState.LOADING
        self.failure = ""
        self.error: Exception | None = None
        self.meter = meter or Meter()
        self._calls: queue.SimpleQueue[Call | None] = queue.SimpleQueue()
        self._gate = threading.Lock()  # guards the queue, which is not read after the thread ends
        self._load = load
        self._model: Loaded | None = None
        self._loaded = threading.Event()
        self._thread = threading.Thread(
            target=contextvars.copy_context().run,  # the load's budget
            args=(self._run,),
            name=name,
            daemon=True,
        )
        self._thread.start()

    def wait_until_ready(self, timeout: float | None = None) -> None:
        """Wait until the model is loaded; raise `EngineError` if it could not be loaded."""
        if not self._loaded.wait(timeout):
            raise EngineError(f"the model is not loaded after {timeout} s")
        if self.state is EngineState.FAILED:
            raise EngineError(self.failure)

    def _call(self, call: Call) -> bool:
        """Queue a call for the thread; return False if the thread does not serve."""
        with self._gate:
            runs = self.state is EngineState.READY
            if runs:
                self._calls.put(call)
        return runs

    def _end(self, state: EngineState) -> None:
        """Accept no more calls."""
        with self._gate:
            self.state = state

    def _serve(self, model: Loaded) -> None:
        """Serve requests until the thread has to stop."""
        raise NotImplementedError

    def _run(self) -> None:
        with reused_streams() as frees:
            self._load_and_serve(frees)

    def _load_and_serve(self, frees: Callable[[object], None]) -> None:
        try:
            self._model = self._load()
            frees(self._model)
            self.state = EngineState.READY
        except BaseException as error:  # noqa: BLE001 - whatever it is, waiting callers get it
            if not isinstance(error, ModelpackError):  # its text is complete without a traceback
                _log.exception("the model could not be loaded")
            self.failure = str(error) or type(error).__name__
            self.error = error if isinstance(error, Exception) else EngineError(self.failure)
            self.state = EngineState.FAILED
            return
        finally:
            self._loaded.set()
        try:
            self._serve(self._model)
        finally:
            self._model = None  # frees its memory


@dataclass(frozen=True, slots=True)
class Add:
    """A call that adds a request; `accepted` is called once, with the error if it was refused."""

    request_id: str
    request: EngineRequest
    accepted: Callable[[Exception | None], None]


@dataclass(frozen=True, slots=True)
class AddAdapter:
    """A change that makes an adapter available, as `BaseEngine.add_adapter` does."""

    name: str
    adapter: Adapter
    identity: str

    def apply(self, engine: BaseEngine) -> None:
        engine.add_adapter(self.name, self.adapter, self.identity)


@dataclass(frozen=True, slots=True)
class RemoveAdapter:
    """A change that removes an adapter, as `BaseEngine.remove_adapter` does."""

    name: str

    def apply(self, engine: BaseEngine) -> None:
        engine.remove_adapter(self.name)


@dataclass(frozen=True, slots=True)
class Change:
    """A call that changes the engine between two steps, unless its caller cancelled it before."""

    change: AddAdapter | RemoveAdapter
    done: concurrent.futures.Future[None]


EngineCall = Add | Abort | Change


class EngineClient(ABC):
    """An engine that runs elsewhere, for asyncio code: requests in, streams of events out.

    When the engine stops, open streams and new requests fail with an error; none waits forever.
    `meter` records the histograms of the requests. `error` is the exception that loading raised;
    `failure` is its text, or the text of what stopped the engine later.
    """

    state: EngineState
    failure: str
    error: Exception | None
    meter: Meter

    def __init__(self) -> None:
        self._streams: dict[str, RequestStream] = {}
        self._running_choices: dict[str, int] = {}
        self._numbers = itertools.count()

    @abstractmethod
    def wait_until_ready(self, timeout: float | None = None) -> None:
        """Wait until the model is loaded; raise `EngineError` if it could not be loaded."""

    @abstractmethod
    def close(self) -> None:
        """Stop the engine and free its memory; unfinished requests fail."""

    @abstractmethod
    def _call(self, call: EngineCall) -> bool:
        """Queue a call for the engine; return False if it does not run."""

    # Calls from other threads

    async def submit(self, request: EngineRequest) -> RequestStream:
        """Add a request; return its stream once the engine has accepted it.

        Raises `RequestError`, `QueueFullError`, or `EngineError` if the engine does not run.
        """
        request_id = f"request-{next(self._numbers)}"
        stream = RequestStream(request_id, len(request.prompt_token_ids), request.n, self._call)
        accepted = asyncio.get_running_loop().create_future()
        if not self._call(
            Add(request_id, request, partial(self._admit, stream, request, accepted))
        ):
            raise self._stopped()
        try:
            await accepted
        except asyncio.CancelledError:
            self._call(Abort(request_id))
            raise
        return stream

    async def add_adapter(self, name: str, adapter: Adapter, identity: str) -> None:
        """Add an adapter between two steps; raises what `BaseEngine.add_adapter` raises.

        Removes it if the caller is cancelled. Raises `EngineError` if the engine does not run.
        """
        done = self.change(AddAdapter(name, adapter, identity))
        try:
            await asyncio.wrap_future(done)
        except asyncio.CancelledError:
            self.change(RemoveAdapter(name))  # the engine may have begun to add it
            raise

    async def remove_adapter(self, name: str) -> None:
        """Remove an adapter between two steps; raises what `BaseEngine.remove_adapter` raises.

        Raises `EngineError` if the engine does not run.
        """
        await asyncio.wrap_future(self.change(RemoveAdapter(name)))

    def change(self, change: AddAdapter | RemoveAdapter) -> concurrent.futures.Future[None]:
        """Change the engine between two steps; return a future of the end of that."""
        done: concurrent.futures.Future[None] = concurrent.futures.Future()
        if not self._call(Change(change, done)):
            done.set_exception(self._stopped())
        return done

    @abstractmethod
    def check_queue(self) -> None:
        """Raise `QueueFullError` if a request would find the queue full now."""

    @property
    @abstractmethod
    def runs_adapters(self) -> bool:
        """Whether adapters can be added."""

    @property
    @abstractmethod
    def model_type(self) -> str:
        """The type of the model, as its configuration or its GGUF file names it."""

    @property
    @abstractmethod
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer; any thread may use it."""

    @property
    @abstractmethod
    def picture_processor(self) -> MediaProcessor | None:
        """What places pictures in prompts, for any thread; None if the engine reads text only."""

    @property
    @abstractmethod
    def no_vision(self) -> str:
        """Why the engine reads no pictures, where the model's files should."""

    @property
    @abstractmethod
    def max_model_len(self) -> int:
        """The most tokens of a prompt and its output together."""

    @property
    @abstractmethod
    def vocab_size(self) -> int:
        """The number of the model's logits."""

    @property
    @abstractmethod
    def memory_bytes(self) -> int:
        """The bytes of its weights and its KV cache."""

    @property
    @abstractmethod
    def weight_bytes(self) -> int:
        """The bytes of its weights, a draft model's included."""

    @property
    @abstractmethod
    def kv_cache_bytes(self) -> int:
        """The bytes of its KV cache."""

    @abstractmethod
    def stats(self) -> EngineStats:
        """Return the engine's counters."""

    def _stopped(self) -> EngineError:
        return EngineError(f"the engine is {self.state}", hint="wait until it is ready")

    # The thread that gets the events

    def _admit(
        self,
        stream: RequestStream,
        request: EngineRequest,
        accepted: asyncio.Future[None],
        error: Exception | None,
    ) -> None:
        """Open the stream of an accepted request, or fail a refused one."""
        if error is None:
            self._streams[stream.request_id] = stream
            self._running_choices[stream.request_id] = request.n
            self.meter.accepted(request.params.max_tokens, request.n)
        if not settle(accepted, error) or accepted.cancelled():
            self._call(Abort(stream.request_id))

    def _emit(self, events: Sequence[RequestEvent]) -> None:
        self.meter.stepped(events)
        self._hand_out(events)

    def _hand_out(self, events: Sequence[RequestEvent]) -> None:
        """Deliver events to their streams, with one call for each event loop; drop ended ones."""
        by_loop: dict[asyncio.AbstractEventLoop, list[_Delivery]] = defaultdict(list)
        for event in events:
            stream = self._streams.get(event.request_id)
            if stream is not None:
                by_loop[stream.loop].append((stream, event))
        for batch in by_loop.values():
            self._deliver(batch)
        for event in events:
            if event.finished and event.request_id in self._running_choices:
                self._running_choices[event.request_id] -= 1
                if not self._running_choices[event.request_id]:
                    del self._running_choices[event.request_id]
                    self._streams.pop(event.request_id, None)

    def _deliver(self, batch: list[_Delivery]) -> None:
        """Deliver events to the streams of one event loop."""
        try:
            batch[0][0].loop.call_soon_threadsafe(_put, batch)
        except RuntimeError:  # the loop has ended: abort its requests
            for stream, _ in batch:
                self._call(Abort(stream.request_id))

    def _fail_streams(self) -> None:
        """Fail all requests, after the end of an engine that emits no last events."""
        for stream in list(self._streams.values()):
            self._deliver([(stream, EngineError(self.failure))])
        self._streams.clear()
        self._running_choices.clear()


class EngineLoop:
    """Runs the steps of an engine and, between them, the calls of a queue; None ends it.

    `emit` gets the events of each step and of each call. While the engine has no work and no call
    comes, it uses its idle time, piece by piece.
    """

    def __init__(
        self,
        engine: BaseEngine,
        calls: queue.SimpleQueue[EngineCall | None],
        emit: Callable[[Sequence[RequestEvent]], None],
    ) -> None:
        self._engine = engine
        self._calls = calls
        self._emit = emit
        self._has_idle_work = False  # whether work may wait for idle time

    def run(self) -> None:
        """Return when None is in the queue; then call `end`."""
        self._use_idle_time()  # from now on, work waits for it
        while self._take_calls():
            self._has_idle_work = True
            try:
                events = self._engine.step()
            except BaseException as error:  # noqa: BLE001 - the requests fail, not the engine
                _log.exception("a step failed")
                events = self._engine.fail_all(f"a step of the engine failed: {error}")
            self._emit(events)

    def end(self) -> None:
        """Fail all requests and close the engine."""
        self._emit(self._engine.fail_all("the engine was stopped"))
        self._engine.close()

    def _take_calls(self) -> bool:
        """Run the queued calls; if the engine has no work, wait for one. Return False to stop."""
        while True:
            has_work = self._engine.has_work
            try:
                quiet = _QUIET_SECONDS if self._has_idle_work else None
                call = self._calls.get(block=not has_work, timeout=quiet)
            except queue.Empty:
                if has_work:
                    return True
                self._use_idle_time()
                continue
            if call is None:
                return False
            if isinstance(call, Abort):
                self._emit(self._engine.abort(call.request_id, call.index))
            elif isinstance(call, Change):
                self._apply(call)
            else:
                call.accepted(self._refusal(call))

    def _use_idle_time(self) -> None:
        try:
            self._has_idle_work = self._engine.use_idle_time()
        except BaseException:  # noqa: BLE001 - requests do not need this work
            _log.exception("work in idle time failed")
            self._has_idle_work = False

    def _refusal(self, call: Add) -> Exception | None:
        """Add a request; return the error if the engine refuses it."""
        try:
            self._engine.add_request(call.request_id, call.request)
        except ModelpackError as error:
            return error
        except BaseException as error:  # noqa: BLE001 - only this request fails
            _log.exception("a request could not be added")
            return EngineError(f"unexpected {type(error).__name__}: {error}")
        return None

    def _apply(self, call: Change) -> None:
        if not call.done.set_running_or_notify_cancel():  # its caller was cancelled
            return
        try:
            call.change.apply(self._engine)
        except ModelpackError as error:
            call.done.set_exception(error)
        except BaseException as error:  # noqa: BLE001 - only this change fails
            _log.exception("the engine could not be changed")
            call.done.set_exception(EngineError(f"unexpected {type(error).__name__}: {error}"))
        else:
            call.done.set_result(None)


class AsyncEngine(ModelThread["BaseEngine", EngineCall], EngineClient):
    """Starts a thread that makes the engine with `make_engine` and then runs its steps."""

    def __init__(self, make_engine: Callable[[], BaseEngine], meter: Meter | None = None) -> None:
        EngineClient.__init__(self)
        self._last_stats = EngineStats()
        ModelThread.__init__(self, "modelpack-engine", make_engine, meter)

    def check_queue(self) -> None:
        self._ready().check_queue()

    @property
    def runs_adapters(self) -> bool:
        return self._ready().runs_adapters

    @property
    def model_type(self) -> str:
        return self._ready().model_type

    @property
    def tokenizer(self) -> Tokenizer:
        return self._ready().tokenizer

    @property
    def picture_processor(self) -> MediaProcessor | None:
        return self._ready().picture_processor

    @property
    def no_vision(self) -> str:
        return self._ready().no_vision

    @property
    def max_model_len(self) -> int:
        return self._ready().max_model_len

    @property
    def vocab_size(self) -> int:
        return self._ready().vocab_size

    @property
    def memory_bytes(self) -> int:
        return self._ready().memory_bytes

    @property
    def weight_bytes(self) -> int:
        return self._ready().weight_bytes

    @property
    def kv_cache_bytes(self) -> int:
        return self._ready().kv_cache_bytes

    def stats(self) -> EngineStats:
        return self._last_stats if self._model is None else self._model.stats()

    def close(self) -> None:
        self._calls.put(None)
        self._thread.join()

    def _ready(self) -> BaseEngine:
        if self._model is None:
            raise EngineError(f"the engine is {self.state}")
        return self._model

    # The engine's thread

    def _serve(self, model: BaseEngine) -> None:
        try:
            loop = EngineLoop(model, self._calls, self._emit)
            loop.run()
            self._end(EngineState.STOPPED)
            loop.end()
        except BaseException as error:  # noqa: BLE001 - it cannot go on: fail pending requests
            _log.exception("the engine failed")
            self.failure = f"the engine failed: {error}"
            self._end(EngineState.FAILED)
            self._fail_streams()
        finally:
            self._last_stats = model.stats().counters()

    def _end(self, state: EngineState) -> None:
        """Accept no more calls, and fail the queued requests."""
        super()._end(state)
        while not self._calls.empty():
            call = self._calls.get()
            error = EngineError(self.failure or f"the engine is {state}")
            if isinstance(call, Add):
                call.accepted(error)
            elif isinstance(call, Change) and call.done.set_running_or_notify_cancel():
                call.done.set_exception(error)


def _put(batch: list[_Delivery]) -> None:
    for stream, event in batch:
        stream.put(event)
