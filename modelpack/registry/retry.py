"""When to try again, and how long to wait before.

Connection failures and the answers 408, 425, 429, 500, 502, 503 and 504 are worth another try; a
server's `Retry-After` (RFC 9110, section 10.2.3) is honoured up to a limit.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Final

from modelpack.errors import RegistryError
from modelpack.progress import Action, Progress, ProgressCallback, Stop

RETRYABLE_STATUSES: Final = frozenset({408, 425, 429, 500, 502, 503, 504})


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """How often and how fast to retry; times are seconds.

    `tries` counts tries without progress: a download that got further starts counting anew. The
    wait doubles from `first_delay` to `max_delay`, less up to half of it by chance. A server that
    asks to wait longer than `max_retry_after` is not waited for. `sleep`, `now` and `chance` are
    there for tests; without `sleep`, a request to stop ends the wait.
    """

    tries: int = 5
    first_delay: float = 0.25
    max_delay: float = 30.0
    max_retry_after: float = 120.0
    sleep: Callable[[float], None] | None = None
    now: Callable[[], float] = time.time
    chance: Callable[[], float] = random.random

    def delay(self, failures: int) -> float:
        """Return the wait after this many failures in a row, at least one."""
        full = min(self.max_delay, self.first_delay * 2.0 ** min(failures - 1, 30))
        return full * (1 - self.chance() / 2)

    def wait(self, seconds: float, stop: Stop) -> None:
        """Wait; raise `InterruptedTransferError` when a stop is asked for."""
        if self.sleep is None:
            stop.wait(seconds)
        else:
            self.sleep(seconds)
            stop.check()


class FailedTry(Exception):
    """A try that failed in a way that another may not; `error` is raised when none is left."""

    def __init__(self, error: RegistryError, retry_after: float | None = None) -> None:
        super().__init__(str(error))
        self.error = error
        self.retry_after = retry_after


class Retries:
    """The failed tries of one call."""

    def __init__(self, policy: RetryPolicy, stop: Stop, report: ProgressCallback) -> None:
        self._policy = policy
        self._stop = stop
        self._report = report
        self._failures = 0

    def made_progress(self) -> None:
        """Forget earlier failures: what was achieved since is not lost."""
        self._failures = 0

    def wait_after(self, failed: FailedTry) -> None:
        """Wait before the next try, or raise the error of this one if it was the last."""
        policy, error = self._policy, failed.error
        self._stop.check()
        self._failures += 1
        if self._failures >= policy.tries:
            tries = f"{self._failures} tries" if self._failures > 1 else "1 try"
            raise _amended(error, f"given up after {tries}") from failed.__cause__
        delay = policy.delay(self._failures)
        if failed.retry_after is not None:
            if failed.retry_after > policy.max_retry_after:
                raise _amended(
                    error,
                    f"it asks to wait {failed.retry_after:.0f} s, "
                    f"more than the {policy.max_retry_after:.0f} s that are waited",
                ) from failed.__cause__
            delay = max(delay, failed.retry_after)
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
