"""ProcessEngine: an engine in a process of its own, for a server that would share its GIL.

The client starts the process and sends it the function that makes the engine, then the calls; the
process runs an `EngineLoop`, and sends the events of each step in one message. Messages are
pickled, over a socket pair that only these two processes have.
"""

from __future__ import annotations

import concurrent.futures
import contextvars
import io
import itertools
import logging
import logging.handlers
import os
import pickle
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any

from modelpack.errors import ModelpackError
from modelpack_engine.async_engine import (
    Abort,
    Add,
    AddAdapter,
    Change,
    EngineCall,
    EngineClient,
    EngineLoop,
    EngineState,
    RemoveAdapter,
)
from modelpack_engine.core.metrics import Meter
from modelpack_engine.core.scheduler import check_room
from modelpack_engine.errors import EngineError, ModelLoadError
from modelpack_engine.models import load_budget, load_progress
from modelpack_engine.models.tokenizer import Tokenizer
from modelpack_engine.outputs import EngineStats, RequestEvent
from modelpack_engine.worker.process import python_command

if TYPE_CHECKING:
    from modelpack_engine.runner.base_engine import BaseEngine
    from modelpack_engine.vision.processor import MediaProcessor

_log = logging.getLogger(__name__)

#: Seconds for a process to end after its last request: it may write its prefix cache to disk.
CLOSE_SECONDS = 120.0
# Seconds between two reports of a running engine's counters.
_STATS_INTERVAL = 0.1
# Seconds between two checks whether a load is still wanted.
_CHECK_INTERVAL = 0.1


@dataclass(frozen=True, slots=True)
class _Facts:
    """What the server has to know of a loaded engine."""

    tokenizer: Tokenizer
    picture_processor: MediaProcessor | None
    no_vision: str
    runs_adapters: bool
    model_type: str
    max_model_len: int
    max_waiting: int
    vocab_size: int
    memory_bytes: int
    weight_bytes: int
    kv_cache_bytes: int

    @classmethod
    def of(cls, engine: BaseEngine) -> _Facts:
        return cls(
            engine.tokenizer, engine.picture_processor, engine.no_vision, engine.runs_adapters,
            engine.model_type, engine.max_model_len, engine.config.max_waiting, engine.vocab_size,
            engine.memory_bytes, engine.weight_bytes, engine.kv_cache_bytes,
        )  # fmt: skip


class ProcessEngine(EngineClient):
    """Starts a process that makes the engine with `make_engine` and then runs its steps.

    `make_engine` has to be picklable. If the process dies, its requests fail, and so does the load
    that it was at. The process ends with `close`, and when this process ends.
    """

    def __init__(self, make_engine: Callable[[], BaseEngine], meter: Meter | None = None) -> None:
        super().__init__()
        self.state = EngineState.LOADING
        self.failure = ""
        self.error = None
        self.meter = meter or Meter()
        self._facts: _Facts | None = None
        self._memory_bytes = 0
        self._stats = EngineStats()
        self._adds: dict[str, Callable[[Exception | None], None]] = {}
        self._changes: dict[int, concurrent.futures.Future[None]] = {}
        self._change_numbers = itertools.count()
        self._gate = threading.Lock()  # guards the state and the unanswered calls
        self._loaded = threading.Event()
        # Calls, with the numbers of changes, and messages.
        self._outgoing: queue.SimpleQueue[tuple[EngineCall, int] | bytes | None] = (
            queue.SimpleQueue()
        )
        level = logging.getLogger("modelpack_engine").getEffectiveLevel()
        self._outgoing.put(_dumped((make_engine, level)))
        self._connection, theirs = Pipe()
        with theirs:
            try:
                self._process = subprocess.Popen(
                    python_command(__name__, str(theirs.fileno())),
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    pass_fds=[theirs.fileno()],
                    start_new_session=True,  # only the server gets the terminal's signals
                )
            except OSError as error:
                self._connection.close()
                raise ModelLoadError(f"the engine's process cannot start: {error}") from error
        self._sender = _thread(self._send)
        self._reader = _thread(self._read)

    @property
    def pid(self) -> int:
        """The id of the engine's process."""
        return self._process.pid

    def wait_until_ready(self, timeout: float | None = None) -> None:
        """Wait until the model is loaded; raise `EngineError` if it could not be loaded.

        Raises as `load_budget.checkpoint` does while it waits.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        while not self._loaded.wait(_CHECK_INTERVAL):
            load_budget.checkpoint()
            if deadline is not None and time.monotonic() >= deadline:
                raise EngineError(f"the model is not loaded after {timeout} s")
        if self.state is EngineState.FAILED:
            raise EngineError(self.failure)

    def check_queue(self) -> None:
        """Raise `QueueFullError` if a request would find the queue full.

        Requests wait by the last counters, or are unanswered: their grammars are being compiled.
        """
        check_room(self._stats.num_waiting + len(self._adds), 1, self._ready().max_waiting)

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
        self._ready()
        return self._memory_bytes

    @property
    def weight_bytes(self) -> int:
        return self._ready().weight_bytes

    @property
    def kv_cache_bytes(self) -> int:
        return self._ready().kv_cache_bytes

    def stats(self) -> EngineStats:
        """Return the engine's counters, at most a tenth of a second old."""
        return self._stats

    def close(self) -> None:
        with self._gate:
            was_ready = self.state is EngineState.READY
            if self.state is not EngineState.FAILED:
                self.state = EngineState.STOPPED
        if was_ready:
            self._outgoing.put(_dumped(None))
            self._reader.join(CLOSE_SECONDS)
        if self._reader.is_alive():  # it is being loaded, or hangs
            self._process.kill()
        self._reader.join()

    def _ready(self) -> _Facts:
        if self._facts is None:
            raise EngineError(f"the engine is {self.state}")
        return self._facts

    def _call(self, call: EngineCall) -> bool:
        number = next(self._change_numbers) if isinstance(call, Change) else 0
        with self._gate:
            if self.state is not EngineState.READY:
                return False
            if isinstance(call, Add):
                self._adds[call.request_id] = call.accepted
            elif isinstance(call, Change):
                self._changes[number] = call.done
            self._outgoing.put((call, number))
        return True

    # The threads of the connection

    def _send(self) -> None:
        """Send messages in a thread: large ones take long, and the socket may be full."""
        with suppress(OSError):  # the process ended, which the other thread detects
            while self._send_next():
                pass

    def _send_next(self) -> bool:
        """Send the next messages, and keep no request; return False at the end."""
        item = self._outgoing.get()
        if item is None:
            return False
        for message in (item,) if isinstance(item, bytes) else self._messages(*item):
            self._connection.send_bytes(message)
        return True

    def _messages(self, call: EngineCall, number: int) -> tuple[bytes, ...]:
        """Return the messages of a call; fail one that cannot be sent, and return none."""
        try:
            return _messages(call, number)
        except Exception as error:  # noqa: BLE001 - only this call fails
            failure = EngineError(f"the request cannot be sent to the engine: {error}")
            with self._gate:  # `_end` may have failed it
                accepted = self._adds.pop(call.request_id, None) if isinstance(call, Add) else None
                done = self._changes.pop(number, None) if isinstance(call, Change) else None
            if accepted is not None:
                accepted(failure)
            if done is not None:
                _finish(done, failure)
            return ()

    def _read(self) -> None:
        try:
            while True:
                kind, *body = pickle.loads(self._connection.recv_bytes())  # noqa: S301 - our own
                getattr(self, f"_take_{kind}")(*body)
        except (EOFError, OSError):  # the process ended
            pass
        except Exception as error:  # noqa: BLE001 - the requests fail
            _log.exception("a message of the engine's process cannot be read")
            self.failure = f"the engine failed: {error}"
            self._process.kill()
        self._end()

    def _take_events(self, events: list[tuple[Any, ...]], stats: EngineStats | None) -> None:
        if stats is not None:
            self._stats = stats
        self._emit([RequestEvent(*fields) for fields in events])

    def _take_accepted(self, request_id: str, error: Exception | None) -> None:
        with self._gate:
            accepted = self._adds.pop(request_id)
        accepted(error)

    def _take_changed(self, number: int, error: Exception | None, memory_bytes: int) -> None:
        self._memory_bytes = memory_bytes
        with self._gate:
            done = self._changes.pop(number)
        _finish(done, error)

    def _take_ready(self, facts: _Facts) -> None:
        self._facts = facts
        self._memory_bytes = facts.memory_bytes
        with self._gate:
            if self.state is EngineState.LOADING:
                self.state = EngineState.READY
        self._loaded.set()

    def _take_failed(self, error: Exception) -> None:
        self.failure = str(error) or type(error).__name__
        if self.state is EngineState.LOADING:
            self.error = error

    def _take_log(self, record: logging.LogRecord) -> None:
        logger = logging.getLogger(record.name)
        if logger.isEnabledFor(record.levelno):
            logger.handle(record)

    def _take_progress(self, progress: load_progress.LoadProgress) -> None:
        load_progress.forward(progress)

    def _end(self) -> None:
        """Accept no more calls, and fail those that have no answer, once the process has ended."""
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(CLOSE_SECONDS)
        self._process.kill()  # does nothing to one that has ended
        code = self._process.wait()
        with self._gate:
            is_loading = self.state is EngineState.LOADING
            if self.state is EngineState.STOPPED:
                self.failure = "the engine is stopped"
            else:
                self.state = EngineState.FAILED
                self.failure = self.failure or f"the engine's process {_end_of(code)}"
            adds, self._adds = self._adds, {}
            changes, self._changes = self._changes, {}
        if is_loading and self.error is None:
            self.error = ModelLoadError(self.failure, hint=_HINTS.get(code))
        if self.state is EngineState.FAILED and not is_loading:
            _log.error("%s", self.failure)
        facts, self._facts = self._facts, None
        if facts is not None and facts.picture_processor is not None:
            facts.picture_processor.close()
        for accepted in adds.values():
            accepted(EngineError(self.failure))
        for done in changes.values():
            _finish(done, EngineError(self.failure))
        self._fail_streams()
        self._stats = self._stats.counters()
        self._loaded.set()
        self._outgoing.put(None)
        self._sender.join()
        self._connection.close()


_HINTS = {-signal.SIGKILL: "look in the system's log: it kills processes if memory is short"}


def _end_of(code: int) -> str:
    """Return how a process with this exit status ended."""
    if code < 0:
        with suppress(ValueError):
            return f"was killed by the signal {signal.Signals(-code).name}"
    return f"ended with the exit status {code}"


def _finish(done: concurrent.futures.Future[None], error: Exception | None) -> None:
    if not done.set_running_or_notify_cancel():  # its caller was cancelled
        return
    if error is None:
        done.set_result(None)
    else:
        done.set_exception(error)


def _thread(run: Callable[[], None]) -> threading.Thread:
    # The context has the load's progress callback.
    context = contextvars.copy_context()
    made = threading.Thread(
        target=context.run, args=(run,), name="modelpack-engine-process", daemon=True
    )
    made.start()
    return made


def _messages(call: EngineCall, number: int) -> tuple[bytes, ...]:
    if isinstance(call, Add):
        # The request is a message by itself: reading it compiles its grammar, which can take long.
        is_masked = call.request.params.mask is not None
        return _dumped(("add", call.request_id, is_masked)), _dumped(call.request)
    if isinstance(call, Abort):
        return (_dumped(("abort", call)),)
    return (_dumped(("change", number, call.change)),)


class _Pickler(pickle.Pickler):
    """Pickles errors with all their attributes, and the engine's tokenizer by reference."""

    def __init__(self, file: io.BytesIO, *, to_server: bool) -> None:
        super().__init__(file, pickle.HIGHEST_PROTOCOL)
        self._to_server = to_server

    def reducer_override(self, value: Any) -> Any:
        if isinstance(value, ModelpackError):
            return _restored, (type(value), value.args, vars(value))
        if isinstance(value, Tokenizer) and not self._to_server:
            return _engine_tokenizer, ()
        return NotImplemented


def _dumped(value: Any, *, to_server: bool = False) -> bytes:
    file = io.BytesIO()
    _Pickler(file, to_server=to_server).dump(value)
    return file.getvalue()


def _restored(
    kind: type[ModelpackError], args: tuple[Any, ...], attributes: dict[str, Any]
) -> ModelpackError:
    error = kind.__new__(kind, *args)  # constructors differ
    vars(error).update(attributes)
    return error


# The engine's process


_tokenizer: Tokenizer | None = None  # of the engine of this process


def _engine_tokenizer() -> Tokenizer:
    assert _tokenizer is not None, "requests come after the engine is ready"
    return _tokenizer


def main() -> None:
    """Run the engine's process; the argument is the number of its socket."""
    # The server ends it by closing the socket, after the last requests. A service manager or a
    # terminal may signal both.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    from modelpack_engine.platform import blas

    blas.prepare()
    # Names of this module's classes are the same in both processes.
    _EngineProcess(Connection(int(sys.argv[1]))).run()


class _EngineProcess:
    """The process's end of the connection, and its engine."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._lock = threading.Lock()  # one message at a time
        self._calls: queue.SimpleQueue[EngineCall | None] = queue.SimpleQueue()
        self._engine: BaseEngine | None = None
        self._stats_due = 0.0
        self._has_ended = threading.Event()
        # Several, so that a grammar that takes long does not delay the next ones.
        self._compilers = concurrent.futures.ThreadPoolExecutor(4, "modelpack-grammar")
        self._compiling: set[concurrent.futures.Future[None]] = set()
        # One, which keeps the order of changes.
        self._changer = concurrent.futures.ThreadPoolExecutor(1, "modelpack-change")

    def run(self) -> None:
        """Load the engine and run it until the server closes the connection."""
        try:
            make_engine, level = pickle.loads(self._connection.recv_bytes())  # noqa: S301 - our own
            _thread(self._read)
            logging.getLogger().addHandler(_LogSender(self))
            logging.getLogger().setLevel(level)
            with load_progress.watched(lambda progress: self.send("progress", progress)):
                engine = self._load(make_engine)
            loop = EngineLoop(engine, self._calls, self._emit)
            loop.run()
            loop.end()
        except BaseException as error:  # noqa: BLE001 - the server gets it
            if not isinstance(error, ModelpackError):  # its text is complete without a traceback
                _log.exception("the engine failed")
                text = str(error) or type(error).__name__
                error = EngineError(text if self._engine is None else f"the engine failed: {text}")
            self.send("failed", error)
        finally:
            self._has_ended.set()
            # Nothing is left to do: the system frees the memory faster than destructors.
            logging.shutdown()
            os._exit(0)

    def _load(self, make_engine: Callable[[], BaseEngine]) -> BaseEngine:
        global _tokenizer
        engine = make_engine()
        _tokenizer = engine.tokenizer
        self._engine = engine
        self.send("ready", _Facts.of(engine))
        return engine

    def send(self, *message: Any) -> None:
        """Send a message to the server; do nothing once it has ended."""
        self._send(_dumped(message, to_server=True))

    def _send(self, data: bytes) -> None:
        with self._lock, suppress(OSError):
            self._connection.send_bytes(data)

    def _emit(self, events: Sequence[RequestEvent]) -> None:
        assert self._engine is not None
        now, stats = time.monotonic(), None
        if now >= self._stats_due or not self._engine.has_work:
            stats, self._stats_due = self._engine.stats(), now + _STATS_INTERVAL
        if events or stats is not None:
            message = ("events", [*map(_fields, events)], stats)
            self._send(pickle.dumps(message, pickle.HIGHEST_PROTOCOL))

    # The thread that reads

    def _read(self) -> None:
        try:
            while (message := pickle.loads(self._connection.recv_bytes())) is not None:  # noqa: S301
                self._take(*message)
        except (EOFError, OSError):  # the server ended
            if self._engine is None:
                os._exit(1)
        except BaseException as error:  # noqa: BLE001 - nothing can be read any more
            try:
                _log.exception("a message of the server cannot be read")
                text = str(error) or type(error).__name__
                self.send("failed", EngineError(f"the engine failed: {text}"))
            finally:
                os._exit(1)
        finally:
            self._calls.put(None)
            if not self._has_ended.wait(CLOSE_SECONDS):
                os._exit(1)

    def _take(self, kind: str, *body: Any) -> None:
        if kind == "abort":
            self._calls.put(body[0])
        elif kind == "change":
            # Requests that were sent before it must not lose their adapter.
            self._changer.submit(self._change, frozenset(self._compiling), *body)
        else:
            request_id, is_masked = body
            data = self._connection.recv_bytes()
            if is_masked:
                compiling = self._compilers.submit(self._add, request_id, data)
                self._compiling = {one for one in self._compiling if not one.done()} | {compiling}
            else:
                self._add(request_id, data)

    def _add(self, request_id: str, data: bytes) -> None:
        accepted = partial(self.send, "accepted", request_id)
        try:
            request = pickle.loads(data)  # noqa: S301 - the server's
        except ModelpackError as error:
            accepted(error)
        except BaseException as error:  # noqa: BLE001 - only this request fails
            _log.exception("a request could not be read")
            accepted(EngineError(f"unexpected {type(error).__name__}: {error}"))
        else:
            self._calls.put(Add(request_id, request, accepted))

    def _change(
        self,
        compiling: frozenset[concurrent.futures.Future[None]],
        number: int,
        change: AddAdapter | RemoveAdapter,
    ) -> None:
        concurrent.futures.wait(compiling)
        done: concurrent.futures.Future[None] = concurrent.futures.Future()
        done.add_done_callback(partial(self._changed, number))
        self._calls.put(Change(change, done))

    def _changed(self, number: int, done: concurrent.futures.Future[None]) -> None:
        assert self._engine is not None
        self.send("changed", number, done.exception(), self._engine.memory_bytes)


class _LogSender(logging.handlers.QueueHandler):
    """Sends log records to the server, whose handlers write them."""

    def __init__(self, process: _EngineProcess) -> None:
        super().__init__(queue.SimpleQueue())
        self._process = process

    def enqueue(self, record: logging.LogRecord) -> None:
        self._process.send("log", record)


def _fields(event: RequestEvent) -> tuple[Any, ...]:
    """Return the arguments that make an equal event; most have only tokens and text."""
    if (
        event.finish_reason is None
        and event.logprobs is None
        and event.cached_tokens is None
        and event.prompt_logprobs is None
    ):
        return event.request_id, event.index, event.token_ids, event.text
    return (
        event.request_id, event.index, event.token_ids, event.text, event.logprobs,
        event.prompt_logprobs, event.finish_reason, event.stop_reason, event.usage, event.timing,
        event.error, event.error_param, event.cached_tokens,
    )  # fmt: skip
