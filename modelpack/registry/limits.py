"""Limits of registry requests: timeouts, retries, rate, minimum speed and connections.

Connection failures and the statuses 408, 425, 429, 500, 502, 503 and 504 are retried; a server's
`Retry-After` (RFC 9110, section 10.2.3) is honoured up to a limit.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Final

from modelpack.errors import RegistryError
from modelpack.progress import Action, Progress, ProgressCallback, SpeedMeter, Stop


@dataclass(frozen=True, slots=True)
class Timeouts:
    """Limits in seconds; a whole transfer has none.

    `connect` is for a connection, `idle` for any wait in which nothing is received or sent,
    `commit` for the response to an upload's last byte (registries may copy the blob in their
    storage first). A download slower than `minimum_speed` bytes a second, over `idle`, counts as
    broken. `reply` is for headers, and for bodies that are not blobs (manifests, tokens, lists,
    errors): each must be complete this many seconds after its first byte.
    """

    connect: float = 10.0
    idle: float = 60.0
    commit: float = 600.0
    minimum_speed: float = 100.0
    reply: float = 300.0


# Seconds of traffic that may be sent at once after a pause.
_BURST: Final = 0.25
_MIN_STEP: Final = 1024


class RateLimit:
    """A budget of bytes that refills steadily; threads may share it."""

    def __init__(
        self, bytes_per_second: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        if bytes_per_second <= 0:
            raise ValueError(f"rate must be positive, got {bytes_per_second} bytes a second")
        self._rate = bytes_per_second
        self._clock = clock
        self._lock = threading.Lock()
        self._paid_until = clock()
        #: Bytes to move at a time, so that the traffic is even.
        self.step = max(_MIN_STEP, int(bytes_per_second * _BURST / 2))

    def wait(self, count: int, stop: Stop) -> None:
        """Wait until `count` bytes may be moved; raise `InterruptedTransferError` for a stop."""
        with self._lock:
            now = self._clock()
            self._paid_until = max(self._paid_until, now - _BURST) + count / self._rate
            delay = self._paid_until - now
        if delay > 0:
            stop.wait(delay)


_LOOK = 0.1  # seconds between two checks of the second stop


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
    """Decides by `timeouts` whether the connection that brings a blob is too slow."""

    def __init__(self, timeouts: Timeouts) -> None:
        self._timeouts = timeouts
        self._whole, self._window = SpeedMeter(), SpeedMeter()

    @contextmanager
    def clocked(self) -> Iterator[None]:
        """Count the time of the block, which waits for bytes."""
        with self._whole, self._window:
            yield

    def is_too_low(self, count: int) -> bool:
        """Count bytes; return whether the last whole window was below the minimum."""
        self._whole.bytes += count
        self._window.bytes += count
        if self._window.seconds < self._timeouts.idle:
            return False
        slow = self._window.is_below(self._timeouts.minimum_speed)
        self._window.reset()
        return slow

    def was_fair(self, size: int, pause: float) -> bool:
        """Return whether the connection brought enough of a blob of `size` bytes for its time.

        `pause`, the seconds before the next connection, counts as time: a server that cuts off each
        connection after a byte is too slow. It does not count if the connection brought a hundredth
        of the blob.
        """
        whole = self._whole
        seconds = whole.seconds + (0.0 if whole.bytes * 100 >= size else pause)
        return whole.bytes > 0 and whole.bytes >= self._timeouts.minimum_speed * seconds


@dataclass(frozen=True, slots=True)
class BlobOptions:
    """How blobs are uploaded and downloaded; sizes are bytes.

    With `chunk_size`, blobs are uploaded in chunks of that size, or of the registry's minimum if
    that is larger; by default in one request, which every registry accepts. A large blob that
    arrives slowly is downloaded over up to `connections` connections: each blob has one, and all
    blobs share the others. `rate` limits all transfers together.
    """

    chunk_size: int | None = None
    connections: int = 4
    rate: RateLimit | None = None

    def __post_init__(self) -> None:
        if self.chunk_size is not None and self.chunk_size < 1:
            raise ValueError(f"chunk_size must be positive, got {self.chunk_size}")
        if self.connections < 1:
            raise ValueError(f"connections must be positive, got {self.connections}")


RETRYABLE_STATUSES: Final = frozenset({408, 425, 429, 500, 502, 503, 504})


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """How often and how fast to retry; times are seconds.

    `tries` counts tries without progress: each progress of a download resets the count. The wait
    doubles from `first_delay` to `max_delay`, minus a random part of up to half. If a server asks
    for a longer wait than `max_retry_after`, the call fails at once. `sleep`, `now` and `chance`
    are for tests; without `sleep`, a stop ends the wait.
    """

    tries: int = 5
    first_delay: float = 0.25
    max_delay: float = 30.0
    max_retry_after: float = 120.0
    sleep: Callable[[float], None] | None = None
    now: Callable[[], float] = time.time
    chance: Callable[[], float] = random.random

    def delay(self, failures: int) -> float:
        """Return the wait after this many failures in a row (one or more)."""
        full = min(self.max_delay, self.first_delay * 2.0 ** min(failures - 1, 30))
        return full * (1 - self.chance() / 2)

    def wait(self, seconds: float, stop: Stop) -> None:
        """Wait; raise `InterruptedTransferError` if a stop is requested."""
        if self.sleep is None:
            stop.wait(seconds)
        else:
            self.sleep(seconds)
            stop.check()


class FailedTry(Exception):
    """A try that failed, though another may succeed; `error` is raised after the last one."""

    def __init__(self, error: RegistryError, retry_after: float | None = None) -> None:
        super().__init__(str(error))
        self.error = error
        self.retry_after = retry_after


class Retries:
    """Counts the failed tries of one call and waits between them."""

    def __init__(self, policy: RetryPolicy, stop: Stop, report: ProgressCallback) -> None:
        self._policy = policy
        self._stop = stop
        self._report = report
        self._failures = 0

    def made_progress(self) -> None:
        """Reset the count of failures."""
        self._failures = 0

    def wait_after(self, failed: FailedTry) -> None:
        """Wait before the next try, or raise the error of this one if it was the last."""
        policy, error = self._policy, failed.error
        self._stop.check()
        self._failures += 1
        asked, most = failed.retry_after or 0.0, policy.max_retry_after
        if self._failures >= policy.tries:
            tries = f"{self._failures} tries" if self._failures > 1 else "1 try"
            raise _amended(error, f"given up after {tries}") from failed.__cause__
        if asked > most:
            reason = f"it asks to wait {asked:.0f} s, more than the limit of {most:.0f} s"
            raise _amended(error, reason) from failed.__cause__
        delay = max(policy.delay(self._failures), asked)
        self._report(Progress(Action.RETRY, message=f"{error}; trying again in {delay:.1f} s"))
        policy.wait(delay, self._stop)


def parse_retry_after(headers: Mapping[str, str], now: float) -> float | None:
    """Return how many seconds `Retry-After` asks to wait; None if it is absent or malformed.

    A date counts from the answer's own `Date`, so that a wrong clock here does not matter; `now`
    (seconds since the epoch) stands in for it.
    """
    value = headers.get("Retry-After", "").strip()
    if value.isascii() and value.isdigit():
        return float(value[:12])
    until = _epoch(value)
    if until is None:
        return None
    sent = _epoch(headers.get("Date", ""))
    return max(0.0, until - (now if sent is None else sent))


def _epoch(date: str) -> float | None:
    try:
        return parsedate_to_datetime(date).timestamp()
    except (ValueError, TypeError, OverflowError, IndexError):
        return None


def _amended(error: RegistryError, addition: str) -> RegistryError:
    return type(error)(
        f"{error.message}; {addition}",
        host=error.host,
        status_code=error.status_code,
        code=error.code,
        hint=error.hint,
    )
