"""What long calls report while they work, and how they are asked to stop."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

from modelpack.artifacts.digest import Digest
from modelpack.errors import InterruptedTransferError


class Action(StrEnum):
    """What is being done to one file or blob."""

    IMPORT = "import"  # hash a file and copy it into the store
    FETCH = "fetch"  # download a blob
    PUSH = "push"  # upload a blob
    COPY = "copy"  # registry to registry
    MOUNT = "mount"  # the registry links a blob it has elsewhere
    SKIP = "skip"  # already there
    VERIFY = "verify"
    UNPACK = "unpack"
    RETRY = "retry"  # something failed and is tried again; see `message`
    NOTE = "note"  # worth telling the user; see `message`


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
        """Whether all bytes of this file or blob are done."""
        return self.total is not None and self.completed >= self.total


#: Called from worker threads too, but never by two threads at once.
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
        """Ask every thread that checks this to stop."""
        self._event.set()

    def is_requested(self) -> bool:
        """Return whether somebody asked to stop."""
        return self._event.is_set()

    def check(self) -> None:
        """Raise `InterruptedTransferError` if somebody asked to stop."""
        if self._event.is_set():
            raise InterruptedTransferError("stopped on request")

    def wait(self, seconds: float) -> None:
        """Wait before a retry; raise `InterruptedTransferError` as soon as a stop is asked for."""
        self._event.wait(seconds)
        self.check()
