"""The events of a background response, by sequence number: clients read them again from any."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncGenerator, Sequence

from modelpack_engine.errors import RequestError

#: The limit of bytes of one log, which drops its oldest events.
MAX_LOG = 16 * 1024 * 1024
_REFERENCE = 8
_AT_ONCE = 256  # events that a reader gets in one piece


class EventLog:
    """Events as text, numbered from 0; readers may follow it while it grows.

    `first` is the number of the oldest event that is kept, `size` the bytes of all. Use it on one
    event loop.
    """

    def __init__(self, *, max_bytes: int = MAX_LOG) -> None:
        self.first = 0
        self.size = 0
        self._max_bytes = max_bytes
        self._texts: list[str] = []
        self._ended = False
        self._changed = asyncio.Event()

    def add(self, texts: Sequence[str]) -> None:
        """Append events; drop the oldest if the log exceeds its limit."""
        self._texts += texts
        self.size += sum(map(_size, texts))
        if self.size > self._max_bytes:
            self.drop(self._max_bytes - self._max_bytes // 8)
        self._notify()

    def drop(self, most: int) -> None:
        """Drop the oldest events until at most `most` bytes are left."""
        count = 0
        while self.size > most and count < len(self._texts):
            self.size -= _size(self._texts[count])
            count += 1
        del self._texts[:count]
        self.first += count

    def end(self) -> None:
        """Let readers stop after the last event."""
        self._ended = True
        self._notify()

    def check_kept(self, number: int) -> None:
        """Raise `RequestError` if the event with this number has been dropped."""
        if number < self.first:
            raise RequestError(
                f"the events before number {self.first} are no longer kept",
                param="starting_after",
                hint="retrieve the response without stream",
            )

    async def read(self, number: int) -> AsyncGenerator[str, None]:
        """Yield the events from `number` on, until the log has ended. Raises `RequestError`."""
        while True:
            self.check_kept(number)
            at = number - self.first
            texts = self._texts[at : at + _AT_ONCE]
            if texts:
                number += len(texts)
                yield "".join(texts)
            elif self._ended:
                return
            else:
                await self._changed.wait()

    def _notify(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()


def _size(text: str) -> int:
    return sys.getsizeof(text) + _REFERENCE
