"""How fast a connection brings a blob, and when that is too slow."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from modelpack.registry.timeouts import Timeouts


class Speed:
    """How fast one connection brings a blob; only the time spent reading counts."""

    def __init__(self, timeouts: Timeouts) -> None:
        self._minimum = timeouts.minimum_speed
        self._window = timeouts.idle
        self._seconds = 0.0
        self._bytes = 0
        self._window_seconds = 0.0
        self._window_bytes = 0

    @contextmanager
    def clocked(self) -> Iterator[None]:
        """Count the time that this context takes."""
        started = time.monotonic()
        try:
            yield
        finally:
            elapsed = time.monotonic() - started
            self._seconds += elapsed
            self._window_seconds += elapsed

    def is_too_low(self, count: int) -> bool:
        """Count bytes; return whether the last whole window was below the minimum."""
        self._bytes += count
        self._window_bytes += count
        if self._window_seconds < self._window:
            return False
        slow = self._window_bytes < self._minimum * self._window_seconds
        self._window_seconds, self._window_bytes = 0.0, 0
        return slow

    def was_fair(self, size: int, pause: float) -> bool:
        """Return whether the connection brought something of `size` bytes, and not at a crawl.

        The `pause` before the next connection counts (seconds): a server that cuts each off after
        a byte crawls as well. It does not for a connection that brought a hundredth of it all.
        """
        pause = 0.0 if self._bytes * 100 >= size else pause
        return self._bytes > 0 and self._bytes >= self._minimum * (self._seconds + pause)
