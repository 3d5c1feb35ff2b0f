"""AsyncTranscriber: a speech-to-text model in its own thread, which makes every call to MLX.

Requests run one after another, in the order in which their sound was ready. A request whose caller
no longer waits gives up its sound at once, and ends before its next window. `AsyncTranscriber` has
the interface that the model pool expects of an engine, but does not answer prompts.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NoReturn

from modelpack_engine.async_engine import EngineState, ModelThread, settle
from modelpack_engine.core.metrics import Meter
from modelpack_engine.errors import RETRY_AFTER, EngineError, QueueFullError, RequestError
from modelpack_engine.outputs import EngineStats
from modelpack_engine.speech.transcript import Transcript, TranscriptionRequest

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from modelpack_engine.async_engine import RequestStream
    from modelpack_engine.models.tokenizer import Tokenizer
    from modelpack_engine.request import EngineRequest
    from modelpack_engine.speech.loader import Transcriber

_log = logging.getLogger(__name__)

#: The most requests that wait while one runs; each holds its sound, up to 115 MB.
MAX_WAITING = 16


class _DroppedError(Exception):
    """The caller of a request no longer waits."""


@dataclass(eq=False, slots=True)
class _Job:
    request: TranscriptionRequest | None  # None: its caller no longer waits
    done: asyncio.Future[Transcript]


class AsyncTranscriber(ModelThread["Transcriber", _Job]):
    """Starts a thread that makes the model with `make_model` and then serves requests."""

    picture_processor = None
    no_vision = ""

    def __init__(self, make_model: Callable[[], Transcriber], meter: Meter | None = None) -> None:
        self._running = 0
        self._finished = 0
        super().__init__("modelpack-transcriber", make_model, meter)

    @property
    def model(self) -> Transcriber:
        """The loaded model: its `architecture`, `notes` and `check` are for any thread."""
        if self._model is None:
            raise EngineError(f"the model is {self.state}", hint="wait until it is ready")
        return self._model

    @property
    def tokenizer(self) -> Tokenizer:
        """Raise `RequestError`: the model answers no prompts."""
        self._refuse()

    @property
    def max_model_len(self) -> int:
        """0: sound of any length is cut into windows."""
        return 0

    @property
    def vocab_size(self) -> int:
        """0: the model answers no prompts."""
        return 0

    @property
    def memory_bytes(self) -> int:
        """The bytes of the weights; windows hold memory only while they run."""
        return 0 if self._model is None else self._model.weight_bytes

    def stats(self) -> EngineStats:
        """Return the counters of requests; the others are 0."""
        return EngineStats(
            num_running=min(1, self._running),
            num_waiting=max(0, self._running - 1),
            num_finished=self._finished,
        )

    def check_queue(self) -> None:
        """Raise `QueueFullError` if a request would find the queue full now."""
        if self._running > MAX_WAITING:
            raise QueueFullError(
                f"{MAX_WAITING} requests wait for this model", retry_after=RETRY_AFTER
            )

    async def submit(self, request: EngineRequest) -> RequestStream:
        """Raise `RequestError`: the model answers no prompts."""
        self._refuse()

    def _refuse(self) -> NoReturn:
        raise RequestError(
            f"this model ({self.model.architecture}) transcribes sound; it answers no prompts",
            param="model",
            hint="use it with /v1/audio/transcriptions",
        )

    async def transcribe(
        self,
        request: TranscriptionRequest,
        sound: Callable[[], Awaitable[NDArray[np.float32]]] | None = None,
    ) -> Transcript:
        """Return the transcript; cancelling the call stops the work at the next window.

        With `sound`, it makes the samples, and is called once the settings of the request are
        checked and the request has a place in the queue.

        Raises `RequestError` for a request that the model cannot fulfil, `QueueFullError`, and
        `EngineError` if the model fails or is unloaded.
        """
        self.model.check(request)
        self.check_queue()
        began, reason = time.monotonic(), "error"
        job = _Job(None, asyncio.get_running_loop().create_future())
        self._running += 1
        try:
            job.request = request if sound is None else replace(request, samples=await sound())
            del request
            job.request.check_sound()
            if not self._call(job):
                raise EngineError(f"the model is {self.state}")
            made = await job.done
            reason = "stop"
            return made
        except asyncio.CancelledError:
            reason = "abort"
            raise
        finally:
            job.request = None
            self._running -= 1
            self._finished += 1
            self.meter.answered(reason, 0, time.monotonic() - began)

    def close(self) -> None:
        """Stop the thread; requests that have not ended fail."""
        if self.state is EngineState.READY:
            self._end(EngineState.STOPPED)
        self._calls.put(None)
        self._thread.join()

    # The model's thread

    def _serve(self, model: Transcriber) -> None:
        try:
            while (job := self._calls.get()) is not None:
                if self.state is EngineState.STOPPED:
                    settle(job.done, EngineError("the model was stopped"))
                else:
                    self._run_job(model, job)
                job = None  # a waiting thread keeps no sound
        finally:
            self._end(EngineState.STOPPED)
            while not self._calls.empty():
                if (left := self._calls.get_nowait()) is not None:
                    settle(left.done, EngineError("the model was stopped"))

    def _run_job(self, model: Transcriber, job: _Job) -> None:
        request = job.request  # the caller may drop it at any time
        if request is None:
            return

        def on_window() -> None:
            if job.request is None:
                raise _DroppedError
            if self.state is EngineState.STOPPED:
                raise EngineError("the model was stopped")

        try:
            settle(job.done, model.transcribe(request, on_window))
        except _DroppedError:
            return
        except EngineError as error:
            settle(job.done, error)
        except BaseException as error:  # noqa: BLE001 - the request fails, the model goes on
            _log.exception("a transcription failed")
            settle(job.done, EngineError(f"the model failed: {error}"))
