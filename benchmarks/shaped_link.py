"""A TCP proxy that simulates a slow link: a rate and a delay for each connection.

It replaces netem of Linux on kernels without it. A byte is forwarded after half of the round-trip
time, and after the earlier bytes at the given rate. A new connection first waits for one round
trip, like a handshake.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from types import TracebackType

_SIZE = 16 * 1024


class ShapedLink:
    """The proxy, in a thread; `downloaded` counts the bytes sent to clients."""

    def __init__(self, upstream: str, *, round_trip: float, bytes_per_second: float) -> None:
        """Times are in seconds; the rate applies to each direction of each connection."""
        host, _, port = upstream.rpartition(":")
        self._upstream = host, int(port)
        self._round_trip = round_trip
        self._rate = bytes_per_second
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="shaped link", daemon=True)
        self._ready = threading.Event()
        self._port = 0
        self.downloaded = 0

    @property
    def host(self) -> str:
        """The address to connect to, as `host:port`."""
        return f"127.0.0.1:{self._port}"

    def __enter__(self) -> ShapedLink:
        self._thread.start()
        self._ready.wait()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    def _run(self) -> None:
        serving = asyncio.start_server(self._connected, "127.0.0.1", 0, limit=_SIZE)
        server = self._loop.run_until_complete(serving)
        self._port = server.sockets[0].getsockname()[1]
        self._ready.set()
        self._loop.run_forever()

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(self._round_trip)
        there = await asyncio.open_connection(*self._upstream, limit=_SIZE)
        await asyncio.gather(
            self._pass(reader, there[1], counts=False), self._pass(there[0], writer, counts=True)
        )

    async def _pass(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, counts: bool
    ) -> None:
        # The capacity of the link, and a small queue before it.
        held = int(self._rate * self._round_trip / _SIZE) + 4
        queue: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(held)
        receiving = asyncio.create_task(self._receive(reader, queue))
        free_at = 0.0
        with contextlib.suppress(OSError):
            while True:
                arrived, data = await queue.get()
                if not data:
                    break
                due = max(arrived + self._round_trip / 2, free_at)
                free_at = due + len(data) / self._rate
                if (delay := due - self._loop.time()) > 0.001:
                    await asyncio.sleep(delay)
                writer.write(data)
                await writer.drain()
                self.downloaded += len(data) if counts else 0
        receiving.cancel()
        with contextlib.suppress(OSError):
            writer.close()

    async def _receive(
        self, reader: asyncio.StreamReader, queue: asyncio.Queue[tuple[float, bytes]]
    ) -> None:
        data = b"?"
        while data:
            try:
                data = await reader.read(_SIZE)
            except OSError:
                data = b""
            await queue.put((self._loop.time(), data))
