"""RateLimit: how many bytes a second all connections of a command may move together."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Final

from modelpack.progress import Stop

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
