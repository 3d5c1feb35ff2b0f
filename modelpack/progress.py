"""Progress reports of long calls, `Stop`, which cancels them, `RunningTasks` and `SpeedMeter`."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from modelpack.artifacts.digest import Digest
from modelpack.errors import InterruptedTransferError


class Action(StrEnum):
    """The operation on one file or blob."""

    IMPORT = "import"  # hash a file and copy it into the store
    FETCH = "fetch"  # download a blob
    PUSH = "push"  # upload a blob
    COPY = "copy"  # registry to registry
    MOUNT = "mount"  # the registry links a blob of another repository
    SKIP = "skip"  # the target has it already
    VERIFY = "verify"
    UNPACK = "unpack"
    QUANTIZE = "quantize"
    RETRY = "retry"  # an operation failed and is retried; see `message`
    NOTE = "note"  # information for the user; see `message`


@dataclass(frozen=True, slots=True)
class Progress:
    """One report. `completed` and `total` are bytes of the file or blob `name`."""

    action: Action
    name: str = ""
    digest: Digest | None = None
    completed: int = 0
    total: int | None = None
    message: str = ""

    @property
    def finished(self) -> bool:
        """Whether all bytes of this file or blob are completed."""
        return self.total is not None and self.completed >= self.total


#: May be called from worker threads, but never by two threads at once.
ProgressCallback = Callable[[Progress], None]


def silent(_: Progress) -> None:
    """Ignore a report: the default callback."""


def serialized(callback: ProgressCallback | None) -> ProgressCallback:
    """Return `callback` guarded by a lock, so that it never runs in two threads at once."""
    if callback is None or callback is silent:
        return silent
    lock = threading.Lock()

    def report(progress: Progress) -> None:
        with lock:
            callback(progress)

    return report


class Stop:
    """A request to stop, shared by the threads of one call."""

    def __init__(self) -> None:
        self._event = threading.Event()

    def request(self) -> None:
        """Request a stop: every thread that checks this raises an error."""
        self._event.set()

    def is_requested(self) -> bool:
        """Return whether a stop was requested."""
        return self._event.is_set()

    def check(self) -> None:
        """Raise `InterruptedTransferError` if a stop was requested."""
        if self._event.is_set():
            raise InterruptedTransferError("stopped on request")

    def wait(self, seconds: float) -> None:
        """Wait; raise `InterruptedTransferError` as soon as a stop is requested."""
        self._event.wait(seconds)
        self.check()


#: Seconds after which a wait of the main thread looks for Ctrl-C: a signal that another thread
#: receives, or that comes just before the wait, does not end it.
SIGNAL_SECONDS: Final = 0.25


class RunningTasks:
    """Counts the tasks that other threads run; one thread may wait for their end.

    Ctrl-C may interrupt the wait, after which it may be repeated. With `Thread.join` it may not: on
    Python 3.11, an interrupted one marks its thread as ended. And an executor does not know a
    thread whose start was interrupted.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._count = 0
        self._closed = False

    def begin(self) -> bool:
        """Count a task; return False if it must not begin, because `wait` was called."""
        with self._changed:
            self._count += not self._closed
            return not self._closed

    def end(self) -> None:
        """Stop counting a task."""
        with self._changed:
            self._count -= 1
            self._changed.notify_all()

    def wait(self) -> None:
        """Let no other task begin, and return when all have ended."""
        with self._changed:
            self._closed = True
            while self._count:
                self._changed.wait(SIGNAL_SECONDS)


class SpeedMeter:
    """Counts the `bytes` read from a stream and the `seconds` spent waiting for them.

    `with meter:` times one wait. Time between waits does not count: a stream is not slow because
    the disk is, or because of a rate limit.
    """

    def __init__(self) -> None:
        self.bytes = 0
        self.seconds = 0.0
        self._started = 0.0

    def __enter__(self) -> None:
        self._started = time.monotonic()

    def __exit__(self, *_: object) -> None:
        self.seconds += time.monotonic() - self._started

    def is_below(self, bytes_per_second: float) -> bool:
        """Return whether the stream was slower than this."""
        return self.bytes < bytes_per_second * self.seconds

    def reset(self) -> None:
        """Begin a new measurement."""
        self.bytes, self.seconds = 0, 0.0
