"""Two requests to stop in one: that of a registry client and that of a call."""

from __future__ import annotations

import time

from modelpack.progress import Stop

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
