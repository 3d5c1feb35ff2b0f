"""Workers: a pool of a few worker processes, and the queue for them."""

from __future__ import annotations

import atexit
import json
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from modelpack_engine.errors import RETRY_AFTER, QueueFullError, RequestError
from modelpack_engine.worker.process import (
    WorkerDiedError,
    WorkerProcess,
    WorkerTimeoutError,
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

    def __init__(self, *, count: int = 2, waiting: int = 64, memory: int = MAX_MEMORY) -> None:
        self._count, self._waiting, self._memory = count, waiting, memory
        self._idle: list[WorkerProcess] = []
        self._busy: dict[str, WorkerProcess | None] = {}
        self._waiters = 0
        self._changed = threading.Condition()

    def run(self, key: str, job: dict[str, Any], seconds: float) -> Any:
        """Return the result of a job.

        Raises `JobFailedError` if the job fails, takes longer than `seconds` or ends its process,
        and `QueueFullError` if too many jobs wait.
        """
        message = encoded({**job, "seconds": seconds})
        cancellation = current_cancellation.get() or Cancellation()
        with self._worker(key, cancellation) as worker:
            cancellation.set_end(worker.kill)
            try:
                answer = json.loads(worker.call(message, seconds + _GRACE))
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
        return answer["value"]

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
                    f"{self._waiters} requests wait for their chat template to be rendered",
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
                    return WorkerProcess(self._memory)
                except OSError as error:
                    raise RequestError(
                        f"cannot start a worker process: {error.strerror}"
                    ) from error
            if worker.is_usable:
                return worker
            worker.close()


_DIED = "its worker process ended: it takes too much memory or processor time"
_shared: tuple[int, Workers] | None = None
_lock = threading.Lock()


def shared_workers() -> Workers:
    """Return the workers of this process."""
    global _shared
    with _lock:
        if _shared is None or _shared[0] != os.getpid():  # workers of a parent process belong to it
            made = Workers()
            atexit.register(made.close)
            _shared = (os.getpid(), made)
        return _shared[1]
