"""POST requests whose responses are read while they arrive, over asyncio's own streams.

httpx takes more processor time for an event of a stream than a server on a GPU takes to make it:
the client would limit what the benchmark measures. RFC 9112 defines heads and chunks.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from urllib.parse import urlsplit

_LONGEST_LINE = 1024 * 1024

_Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


class ConnectionLostError(Exception):
    """The connection ended, or carries something else than HTTP/1.1."""


@dataclass(frozen=True, slots=True)
class Head:
    """The status and the headers of a response; names are in lower case."""

    status: int
    headers: Mapping[bytes, bytes]

    @property
    def is_chunked(self) -> bool:
        """Whether the body comes in chunks."""
        return b"chunked" in self.headers.get(b"transfer-encoding", b"").lower()

    @property
    def length(self) -> int | None:
        """The length of the body in bytes; None: it ends with the connection."""
        found = self.headers.get(b"content-length")
        return None if found is None else int(found)

    @property
    def keeps_alive(self) -> bool:
        """Whether the connection can carry another request after the body."""
        closes = b"close" in self.headers.get(b"connection", b"").lower()
        return not closes and (self.is_chunked or self.length is not None)


class EventServer:
    """A server at `url`, and the idle connections to it.

    `headers` are sent with every request. `read_seconds` limits the wait for the next bytes of a
    response, and `connect_seconds` that for a connection.
    """

    def __init__(
        self, url: str, headers: Mapping[str, str], *, read_seconds: float, connect_seconds: float
    ) -> None:
        parts = urlsplit(url)
        self._tls = ssl.create_default_context() if parts.scheme == "https" else None
        self._host = parts.hostname or ""
        self._port = parts.port or (443 if self._tls else 80)
        self._read_seconds = read_seconds
        self._connect_seconds = connect_seconds
        fields = {"Host": parts.netloc, "Content-Type": "application/json", **headers}
        self._fields = "".join(f"{name}: {value}\r\n" for name, value in fields.items()).encode()
        self._path = parts.path.encode()
        self._idle: list[_Streams] = []

    def close(self) -> None:
        """Close the idle connections."""
        for _, writer in self._idle:
            writer.close()
        self._idle.clear()

    async def post(self, path: str, body: bytes) -> EventResponse:
        """Send `body`, which is JSON, to `path`; return the response, whose body is not read yet.

        Raises `ConnectionLostError`, `TimeoutError`, and `OSError` if it cannot connect.
        """
        request = b"POST %s%s HTTP/1.1\r\n%sContent-Length: %d\r\n\r\n%s" % (
            self._path, path.encode(), self._fields, len(body), body,
        )  # fmt: skip
        while self._idle:
            try:
                return await self._send(self._idle.pop(), request)
            except ConnectionLostError:
                continue  # the server has closed it meanwhile
        connecting = asyncio.open_connection(
            self._host, self._port, ssl=self._tls, limit=_LONGEST_LINE
        )
        return await self._send(await asyncio.wait_for(connecting, self._connect_seconds), request)

    async def _send(self, streams: _Streams, request: bytes) -> EventResponse:
        reader, writer = streams
        try:
            writer.write(request)
            async with asyncio.timeout(self._read_seconds):
                await writer.drain()
                head = await _head(reader)
        except (OSError, EOFError, ValueError) as error:
            writer.close()
            if isinstance(error, TimeoutError):
                raise
            raise ConnectionLostError(str(error)) from error
        except asyncio.CancelledError:
            writer.close()
            raise
        return EventResponse(head, streams, self._idle, self._read_seconds)


class EventResponse:
    """A response whose body is read with `pieces`; leaving its context releases the connection."""

    def __init__(
        self, head: Head, streams: _Streams, idle: list[_Streams], read_seconds: float
    ) -> None:
        self.status = head.status
        self._head = head
        self._reader, self._writer = streams
        self._idle = idle
        self._read_seconds = read_seconds
        self._complete = False

    async def __aenter__(self) -> EventResponse:
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._complete and self._head.keeps_alive:
            self._idle.append((self._reader, self._writer))
        else:
            self._writer.close()

    async def pieces(self) -> AsyncIterator[bytes]:
        """Yield the body as it arrives. Raises `ConnectionLostError` and `TimeoutError`."""
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(self._read_seconds) as limit:
                async for piece in self._body():
                    yield piece
                    limit.reschedule(loop.time() + self._read_seconds)
        except (OSError, EOFError, ValueError) as error:
            if isinstance(error, TimeoutError):
                raise
            raise ConnectionLostError(str(error)) from error
        self._complete = True

    async def _body(self) -> AsyncIterator[bytes]:
        reader, left = self._reader, self._head.length
        if self._head.is_chunked:
            while size := int((await reader.readline()).partition(b";")[0], 16):
                piece = await reader.readexactly(size + 2)
                yield piece[:-2]
            while (await reader.readline()).strip():  # trailers
                pass
        elif left is None:
            while piece := await reader.read(65536):
                yield piece
        else:
            while left:
                piece = await reader.read(min(left, 65536))
                if not piece:
                    raise EOFError("the body is incomplete")
                left -= len(piece)
                yield piece


async def _head(reader: asyncio.StreamReader) -> Head:
    """Read the head of a response, skipping interim ones. Raises `EOFError`, `ValueError`."""
    while True:
        version, status, *_ = (await reader.readuntil(b"\r\n")).split(maxsplit=2)
        if not version.startswith(b"HTTP/1."):
            raise ValueError("not HTTP/1.1")
        headers: dict[bytes, bytes] = {}
        while line := (await reader.readuntil(b"\r\n")).strip():
            name, _, value = line.partition(b":")
            headers[name.strip().lower()] = value.strip()
        if version == b"HTTP/1.0":
            headers.setdefault(b"connection", b"close")
        if int(status) >= 200:
            return Head(int(status), headers)
