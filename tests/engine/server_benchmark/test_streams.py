"""Responses that the benchmark's client reads while they arrive, in all framings of HTTP/1.1."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence

import pytest

from modelpack_server.bench.streams import ConnectionLostError, EventServer

CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n6;x=y\r\n world\r\n"
END = b"0\r\nTrailer: x\r\n\r\n"
COUNTED = b"HTTP/1.1 200 OK\r\ncontent-length: 11\r\n\r\nhello world"
OPEN = b"HTTP/1.1 200 OK\r\n\r\nhello world"


class Scripted:
    """A server that sends the next of `responses` for each request; None: it hangs up."""

    def __init__(self, responses: Sequence[bytes | None], *, closes: bool = False) -> None:
        self._responses = list(responses)
        self._closes = closes
        self.connections = 0
        self.tasks: list[asyncio.Task[None] | None] = []

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        self.tasks.append(asyncio.current_task())
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while self._responses:
                await reader.readuntil(b"\r\n\r\n{}")
                response = self._responses.pop(0)
                if response is not None:
                    writer.write(response)
                    await writer.drain()
                if response is None or self._closes:
                    break
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()


@contextlib.asynccontextmanager
async def client(script: Scripted, read_seconds: float = 20) -> AsyncIterator[EventServer]:
    server = await asyncio.start_server(script.serve, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    found = EventServer(
        f"http://127.0.0.1:{port}/v1", {}, read_seconds=read_seconds, connect_seconds=20
    )
    try:
        yield found
    finally:
        found.close()
        server.close()
        await asyncio.gather(*filter(None, script.tasks))


async def read(server: EventServer) -> bytes:
    async with await server.post("/chat", b"{}") as response:
        assert response.status == 200
        return b"".join([piece async for piece in response.pieces()])


@pytest.mark.parametrize(
    ("response", "closes", "connections"),
    [
        (CHUNKED + END, False, 1),
        (COUNTED, False, 1),
        (b"HTTP/1.1 100 Continue\r\n\r\n" + COUNTED, False, 1),
        (COUNTED.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n"), True, 2),
        (OPEN, True, 2),
        (COUNTED.replace(b"1.1", b"1.0"), True, 2),
    ],
)
def test_bodies_and_connections(response: bytes, closes: bool, connections: int) -> None:
    script = Scripted([response, response], closes=closes)

    async def both() -> list[bytes]:
        async with client(script) as server:
            return [await read(server), await read(server)]

    assert asyncio.run(both()) == [b"hello world"] * 2
    assert script.connections == connections


def test_an_idle_connection_that_the_server_has_closed() -> None:
    script = Scripted([COUNTED, None, COUNTED])

    async def both() -> list[bytes]:
        async with client(script) as server:
            return [await read(server), await read(server)]

    assert asyncio.run(both()) == [b"hello world"] * 2
    assert script.connections == 2


@pytest.mark.parametrize(
    "response",
    [CHUNKED, COUNTED[:-1], b"HTTP/2 200\r\n\r\n", b"", CHUNKED + b"oops\r\n", b"220 mail\r\n\r\n"],
)
def test_broken_responses(response: bytes) -> None:
    async def one() -> bytes:
        async with client(Scripted([response], closes=True)) as server:
            return await read(server)

    with pytest.raises(ConnectionLostError):
        asyncio.run(one())


def test_a_response_that_stops() -> None:
    async def one() -> bytes:
        # Another response is left to send, so the server waits for the next request.
        async with client(Scripted([CHUNKED, COUNTED]), read_seconds=0.05) as server:
            return await read(server)

    with pytest.raises(TimeoutError):
        asyncio.run(one())
