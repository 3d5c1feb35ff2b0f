"""A request's body as a file that a thread reads while it arrives."""

from __future__ import annotations

import asyncio
import io
from collections.abc import AsyncIterator

from fastapi import Request
from starlette.requests import ClientDisconnect

from modelpack.errors import InterruptedTransferError


class BodyFile(io.RawIOBase):
    """The body of `request`, to be read in a thread; made on the event loop.

    Raises `InterruptedTransferError` when the client leaves before its end.
    """

    def __init__(self, request: Request) -> None:
        super().__init__()
        self._loop = asyncio.get_running_loop()
        self._pieces: AsyncIterator[bytes] = request.stream().__aiter__()
        self._rest = memoryview(b"")

    def readable(self) -> bool:
        """Return True."""
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        """Wait for bytes and put them into `buffer`; return their number, 0 at the end."""
        while not self._rest:
            piece = asyncio.run_coroutine_threadsafe(self._next(), self._loop).result()
            if piece is None:
                return 0
            self._rest = memoryview(piece)
        count = min(len(buffer), len(self._rest))
        buffer[:count] = self._rest[:count]
        self._rest = self._rest[count:]
        return count

    async def _next(self) -> bytes | None:
        try:
            return await anext(self._pieces, None)
        except ClientDisconnect as error:
            raise InterruptedTransferError("the client left before the end of the body") from error
