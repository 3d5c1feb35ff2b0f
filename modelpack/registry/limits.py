"""How long to wait for a registry."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

from modelpack.progress import Stop


@dataclass(frozen=True, slots=True)
class Timeouts:
    """Limits in seconds; there is none for a whole transfer, which takes as long as it takes.

    `connect` is for a connection, `idle` for any wait in which nothing comes or goes, `commit` for
    the answer after an upload's last byte (registries may copy the blob in their storage first).
    A download that is slower than `minimum_speed` bytes a second, over `idle`, is a broken one.
    `reply` is for headers, and for all that is not a blob (manifests, tokens, lists, errors): each
    has to be complete so many seconds after its first byte.
    """

    connect: float = 10.0
    idle: float = 60.0
    commit: float = 600.0
    minimum_speed: float = 100.0
    reply: float = 300.0


# Seconds of traffic that may go at once after a pause.
_BURST: Final = 0.25
_MIN_STEP: Final = 1024


class RateLimit:
    """A budget of bytes that refills steadily; threads may share it."""

    def __init__(
        self, bytes_per_second: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        if bytes_per_second <= 0:
            raise ValueError(f"a rate of {bytes_per_second} bytes a second moves nothing")
        self._rate = bytes_per_second
        self._clock = clock
        self._lock = threading.Lock()
        self._paid_until = clock()
        #: Bytes to move at a time, so that the traffic is even.
        self.step = max(_MIN_STEP, int(bytes_per_second * _BURST / 2))

    def wait(self, count: int, stop: Stop) -> None:
        """Wait until `count` bytes may go; raise `InterruptedTransferError` for a stop."""
        with self._lock:
            now = self._clock()
            self._paid_until = max(self._paid_until, now - _BURST) + count / self._rate
            delay = self._paid_until - now
        if delay > 0:
            stop.wait(delay)


_LOOK = 0.1  # seconds between looks at the second of two


def either(first: Stop, second: Stop) -> Stop:
    """Return a stop that is requested as soon as one of the two is."""
    return first if first is second else _Either(first, second)


class _Either(Stop):
    def __init__(self, first: Stop, second: Stop) -> None:
        super().__init__()
        self._first = first
        self._second = second

    def is_requested(self) -> bool:
        return self._first.is_requested() or self._second.is_requested()

    def check(self) -> None:
        self._first.check()
        self._second.check()

    def wait(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            self._second.check()
            self._first.wait(min(left, _LOOK))
        self.check()


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


@dataclass(frozen=True, slots=True)
class BlobOptions:
    """How blobs are sent and fetched; sizes are bytes.

    `chunk_size` sends blobs in chunks of that size, or of what the registry wants at least; by
    default a blob goes in one piece, which every registry takes. A blob that is large and slow to
    come is fetched over up to `connections` at a time, counted over all blobs beyond the first
    connection of each. `rate` holds all of it back.
    """

    chunk_size: int | None = None
    connections: int = 4
    rate: RateLimit | None = None

    def __post_init__(self) -> None:
        if self.chunk_size is not None and self.chunk_size < 1:
            raise ValueError(f"a chunk of {self.chunk_size} bytes is none")
        if self.connections < 1:
            raise ValueError(f"{self.connections} connections fetch nothing")
