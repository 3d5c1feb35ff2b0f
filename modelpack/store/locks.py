"""Locks between processes (and threads): a lock dies with the process that holds it.

`flock` is taken on an open file, so two threads that open the file exclude each other too. On NFS
Linux turns it into a lock of the server.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from modelpack.errors import LockedError
from modelpack.progress import Stop
from modelpack.store.filesystem import open_own, read_own, translating

_FIRST_PAUSE = 0.001
_LONGEST_PAUSE = 0.1
_PATIENCE = 60.0
_LONGEST_NAME = 64  # of a holder


@dataclass(frozen=True, slots=True)
class FileLock:
    """An exclusive lock on the file `path`, which is made when needed."""

    path: Path

    @contextmanager
    def held(
        self,
        *,
        patience: float | None = _PATIENCE,
        stop: Stop | None = None,
        waiting: Callable[[str], None] | None = None,
        remove: bool = False,
    ) -> Iterator[None]:
        """Hold the lock in the block.

        Waits `patience` seconds at most (None: for ever), then raises `LockedError`; `stop` ends
        the wait earlier. `waiting` is told once who is in the way. `remove` deletes the file at
        the end: whoever waits for it starts over with a new one.
        """
        descriptor = self._acquire(patience, stop, waiting)
        try:
            yield
        finally:
            if remove:
                self.path.unlink(missing_ok=True)
            os.close(descriptor)

    def is_free(self) -> bool:
        """Return whether nobody holds the lock now."""
        try:
            descriptor = open_own(self.path)
        except FileNotFoundError:
            return True
        try:
            return try_lock(descriptor)
        finally:
            os.close(descriptor)

    def _acquire(
        self,
        patience: float | None,
        stop: Stop | None,
        waiting: Callable[[str], None] | None,
    ) -> int:
        deadline = None if patience is None else time.monotonic() + patience
        pause = _FIRST_PAUSE
        while True:
            descriptor = self._try()
            if descriptor is not None:
                return descriptor
            if deadline is not None and time.monotonic() >= deadline:
                raise LockedError(
                    f"{self.path} is held by {self._holder()}",
                    hint="try again when that is done",
                )
            if waiting is not None:
                waiting(self._holder())
                waiting = None
            if stop is not None:
                stop.wait(pause)
            else:
                time.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)

    def _try(self) -> int | None:
        with translating("lock", self.path):
            descriptor = open_own(self.path, os.O_RDWR | os.O_CREAT)
            try:
                if try_lock(descriptor) and self._is_current(descriptor):
                    _sign(descriptor)
                    return descriptor
            except BaseException:
                os.close(descriptor)
                raise
            os.close(descriptor)
            return None

    def _is_current(self, descriptor: int) -> bool:
        """Whether the locked file is still the one with the name: a holder may have removed it."""
        try:
            named = os.stat(self.path)
        except FileNotFoundError:
            return False
        return os.path.samestat(named, os.fstat(descriptor))

    def _holder(self) -> str:
        try:
            pid = read_own(self.path, _LONGEST_NAME).decode(errors="replace").strip()
        except OSError:
            pid = ""
        return f"process {pid}" if pid.isdigit() else "another process"


def _sign(descriptor: int) -> None:
    """Leave the process id for messages; a full disk has room for the lock all the same."""
    with suppress(OSError):
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, b"%d\n" % os.getpid(), 0)


def try_lock(descriptor: int) -> bool:
    """Lock the open file exclusively if nobody else has; return whether that worked."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
