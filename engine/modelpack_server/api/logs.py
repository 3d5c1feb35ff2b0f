"""GET /logs: the last lines that the program logged, and those that come."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import AsyncGenerator

_LINES = 2000
_WAITING = 10_000


class LogBuffer(logging.Handler):
    """A handler that keeps the last lines and passes new ones to whoever follows."""

    def __init__(self, lines: int = _LINES) -> None:
        super().__init__()
        self.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        self._lines: deque[str] = deque(maxlen=lines)
        self._followers: dict[asyncio.Queue[str], asyncio.AbstractEventLoop] = {}

    def emit(self, record: logging.LogRecord) -> None:
        """Keep a record."""
        try:
            line = self.format(record) + "\n"
        except (TypeError, ValueError):  # a message and arguments that do not fit
            self.handleError(record)
            return
        self._lines.append(line)
        for queue, loop in list(self._followers.items()):
            if not loop.is_closed():
                loop.call_soon_threadsafe(_put, queue, line)

    def text(self) -> str:
        """Return the lines that are kept."""
        return "".join(self._lines)

    async def follow(self) -> AsyncGenerator[str, None]:
        """Yield the lines that are kept, then each one as it comes, for ever."""
        queue: asyncio.Queue[str] = asyncio.Queue(_WAITING)
        self._followers[queue] = asyncio.get_running_loop()
        try:
            yield self.text()
            while True:
                yield await queue.get()
        finally:
            self._followers.pop(queue, None)


def _put(queue: asyncio.Queue[str], line: str) -> None:
    if not queue.full():  # who reads too slowly misses lines
        queue.put_nowait(line)
