"""Workers: a pool of a few worker processes, and the queue for them."""

from __future__ import annotations

import atexit
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from modelpack_engine.errors import RETRY_AFTER, QueueFullError, RequestError
from modelpack_engine.worker.process import (
    WorkerDiedError,
    WorkerProcess,
    WorkerTimeoutError,
    decoded,
    encoded,
)
from modelpack_engine.worker.threads import Cancellation, current_cancellation

#: Bytes of address space of a worker that renders.
MAX_MEMORY = 1024 * 1024 * 1024


# Extra seconds for a job that checks its own time to report a timeout.
_GRACE = 0.5


class JobFailedError(Exception):
    """A worker's job failed; the text says why."""


class Workers:
    """At most `count` processes, started on demand and kept.

    Jobs of one `key` (a template) run one after another, so that a slow one leaves workers for the
    others. At most `waiting` jobs wait.
    """

    def __init__(
        self,
        *,
        count: int = 2,
        waiting: int = 64,
        memory: int = MAX_MEMORY,
        purpose: str = "render",
    ) -> None:
        self._count, self._waiting, self._memory = count, waiting, memory
        self._purpose = purpose
        self._idle: list[WorkerProcess] = []
        self._busy: dict[str, WorkerProcess | None] = {}
        self._waiters = 0
        self._changed = threading.Condition()

    def start(self) -> None:
        """Start a process if there is none, so that it is ready for the first job.

        If that fails, the first job says why.
        """
        with self._changed, suppress(OSError):
            if not (self._idle or self._busy):
                self._idle.append(WorkerProcess(self._memory, purpose=self._purpose))

    def run(self, key: str, job: dict[str, Any], seconds: float) -> Any:
        """Return the result of a job.

        Raises `JobFailedError` if the job fails, takes longer than `seconds` or ends its process,
        and `QueueFullError` if too many jobs wait.
        """
        message = encoded({**job, "seconds": seconds})
        cancellation = current_cancellation.get() or Cancellation()
        with self._worker(key, cancellation) as worker:
            return _call(worker, message, seconds, cancellation)["value"]

    @contextmanager
    def reserved(
        self, key: str
    ) -> Iterator[Callable[[dict[str, Any], bytes, float], dict[str, Any]]]:
        """Reserve a worker for jobs of `key`; yield what runs one, as `run` does.

        It takes the job, its bytes and seconds, and returns the answer: `value`, and `raw` if the
        answer has bytes. The worker stays reserved while the caller works on them.
        """
        cancellation = current_cancellation.get() or Cancellation()
        with self._worker(key, cancellation) as worker:

            def run(job: dict[str, Any], raw: bytes, seconds: float) -> dict[str, Any]:
                message = encoded({**job, "seconds": seconds}, raw)
                return _call(worker, message, seconds, cancellation)

            yield run

    def close(self) -> None:
        """Kill all workers."""
        with self._changed:
            for worker in self._idle:
                worker.close()
            self._idle.clear()
            for busy in self._busy.values():
                if busy is not None:
                    busy.kill()

    @contextmanager
    def _worker(self, key: str, cancellation: Cancellation) -> Iterator[WorkerProcess]:
        self._enter(key, cancellation)
        worker = None
        try:
            worker = self._take()
            with self._changed:
                self._busy[key] = worker
            yield worker
        finally:
            if worker is not None and not worker.is_usable:
                worker.close()
                worker = None
            with self._changed:
                del self._busy[key]
                if worker is not None:
                    self._idle.append(worker)
                self._changed.notify_all()

    def _enter(self, key: str, cancellation: Cancellation) -> None:
        """Wait until a worker may run a job of `key`."""
        cancellation.set_end(self._wake)
        with self._changed:
            if self._must_wait(key) and self._waiters >= self._waiting:
                raise QueueFullError(
                    f"{self._waiters} requests wait for {_QUEUES[self._purpose]}",
                    retry_after=RETRY_AFTER,
                    hint="try again later",
                )
            self._waiters += 1
            try:
                while self._must_wait(key):
                    if cancellation.is_set:
                        raise JobFailedError("the request was cancelled")
                    self._changed.wait()
                self._busy[key] = None
            finally:
                self._waiters -= 1

    def _must_wait(self, key: str) -> bool:
        return key in self._busy or len(self._busy) >= self._count

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify_all()

    def _take(self) -> WorkerProcess:
        while True:
            with self._changed:
                worker = self._idle.pop() if self._idle else None
            if worker is None:
                try:
                    return WorkerProcess(self._memory, purpose=self._purpose)
                except OSError as error:
                    raise RequestError(
                        f"cannot start a worker process: {error.strerror}"
                    ) from error
            if worker.is_usable:
                return worker
            worker.close()


def _call(
    worker: WorkerProcess, message: bytes, seconds: float, cancellation: Cancellation
) -> dict[str, Any]:
    cancellation.set_end(worker.kill)
    try:
        answer = decoded(worker.call(message, seconds + _GRACE))
    except WorkerTimeoutError:
        worker.kill()
        raise JobFailedError(f"it took longer than {seconds:g} s") from None
    except WorkerDiedError:
        worker.kill()
        reason = "the request was cancelled" if cancellation.is_set else _DIED
        raise JobFailedError(reason) from None
    except BaseException:
        worker.kill()  # its response would go to the next caller
        raise
    finally:
        cancellation.set_end(None)
    if answer["last"]:
        worker.kill()
    if "error" in answer:
        raise JobFailedError(answer["error"])
    return answer


_DIED = "its worker process ended: it takes too much memory or processor time"
#: Bytes of address space of a worker that decodes files: pictures and sounds it holds four times,
#: and of a video 17 frames.
_MEDIA_MEMORY = 2 * MAX_MEMORY
_QUEUES = {
    "render": "their chat template to be rendered",
    "media": "a file to be decoded",
    "video": "a video to be decoded",
}
_shared: dict[str, Workers] = {}
_owner = 0  # the process that has started them
_lock = threading.Lock()


def shared_workers(purpose: str = "render") -> Workers:
    """Return the workers of this process that "render" templates, or decode "media" or "video"."""
    global _owner
    with _lock:
        if _owner != os.getpid():  # workers of a parent process belong to it
            _shared.clear()
            _owner = os.getpid()
        if purpose not in _shared:
            memory = MAX_MEMORY if purpose == "render" else _MEDIA_MEMORY
            # Videos wait with their files in memory, and each waiting job takes a thread.
            waiting = 16 if purpose == "video" else 64
            _shared[purpose] = Workers(memory=memory, purpose=purpose, waiting=waiting)
            atexit.register(_shared[purpose].close)
        return _shared[purpose]
