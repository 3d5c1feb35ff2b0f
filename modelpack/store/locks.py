"""File locks between processes and threads; a lock is released when its process ends.

`flock` belongs to an open file, so two threads that open the file exclude each other too. On NFS,
Linux turns it into a lock on the server.
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
from modelpack.store.filesystem import map_os_errors, open_own, read_own

# Seconds between two attempts, and in all.
_FIRST_PAUSE = 0.001
_LONGEST_PAUSE = 0.1
_PATIENCE = 60.0
_MAX_HOLDER_BYTES = 64


@dataclass(frozen=True, slots=True)
class FileLock:
    """An exclusive lock on the file `path`, which is created when needed."""

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

        Waits at most `patience` seconds (None: for ever), then raises `LockedError`; `stop` ends
        the wait early. `waiting` is called once with the name of the holder. `remove` deletes the
        file at the end; waiting processes then lock a new one.
        """
        descriptor = self._acquire(patience, stop, waiting)
        try:
            yield
        finally:
            if remove:
                self.path.unlink(missing_ok=True)
            os.close(descriptor)

    def is_free(self) -> bool:
        """Return whether no process holds the lock."""
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
                    hint="try again when it has finished",
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
        with map_os_errors("lock", self.path):
            descriptor = open_own(self.path, os.O_RDWR | os.O_CREAT)
            try:
                if try_lock(descriptor) and self._is_current(descriptor):
                    _write_holder(descriptor)
                    return descriptor
            except BaseException:
                os.close(descriptor)
                raise
            os.close(descriptor)
            return None

    def _is_current(self, descriptor: int) -> bool:
        """Return whether `path` is still the locked file: its last holder may have removed it."""
        try:
            named = os.stat(self.path)
        except FileNotFoundError:
            return False
        return os.path.samestat(named, os.fstat(descriptor))

    def _holder(self) -> str:
        try:
            pid = read_own(self.path, _MAX_HOLDER_BYTES).decode(errors="replace").strip()
        except OSError:
            pid = ""
        return f"process {pid}" if pid.isdigit() else "another process"


def _write_holder(descriptor: int) -> None:
    """Write the process id for error messages; a full disk does not prevent locking."""
    with suppress(OSError):
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, b"%d\n" % os.getpid(), 0)


def try_lock(descriptor: int) -> bool:
    """Try to lock the open file exclusively; return whether that succeeded."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
