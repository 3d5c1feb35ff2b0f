"""HttpConnection: uvicorn's HTTP/1.1 with large bodies left where they are, both ways.

Uvicorn copies each byte of a request's body four times on its way to the application, and has no
way to send a file but through Python. Here the socket fills pieces that become messages as they
are, and `http.response.zerocopysend` (an ASGI extension) has the kernel send part of a file.
Everything else, the heads and the order of things above all, is uvicorn's and h11's. Requests that
h11 accepts and a proxy before us may frame differently are refused (RFC 9112 section 11.2).
"""

from __future__ import annotations

import asyncio
import os
import re
import socket
import threading
from collections import deque
from typing import TYPE_CHECKING, Any, Final, cast

import h11
from h11._readers import ContentLengthReader
from h11._receivebuffer import ReceiveBuffer
from uvicorn.protocols.http.h11_impl import H11Protocol

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

#: The extension's name in `scope["extensions"]`, and the type of its message.
ZERO_COPY_SEND: Final = "http.response.zerocopysend"
#: An extension of ours: its `give_back` takes pieces of a body that the application is done with.
REUSE: Final = "modelpack.reuse"
#: Bytes of a body that come to the application as one message, if it has as many.
PIECE: Final = 1024 * 1024
# Bodies of which less is left come as uvicorn gives them.
_WORTH_IT: Final = 64 * 1024
# Seconds that part of a piece waits for the rest.
_PATIENCE: Final = 0.05
_SPARE_PIECES: Final = 3
#: Seconds that a client has for the head of a request, from when it may send one.
HEAD_SECONDS: Final = 30.0
_CLOSE: Final = (b"connection", b"close")
_READ_SIZE: Final = 256 * 1024  # what asyncio reads at once by itself
_BARE_LF: Final = re.compile(rb"(?<!\r)\n")
_BARE_CR: Final = re.compile(rb"\r(?!\n)")


class _Shared(threading.local):
    """Where the connections of a thread receive heads: each copies what it got before the next."""

    def __init__(self) -> None:
        self.buffer = memoryview(bytearray(_READ_SIZE))


_shared = _Shared()


class HttpConnection(H11Protocol, asyncio.BufferedProtocol):
    """One connection, as uvicorn makes it (its setting `http`).

    A body comes in pieces of `PIECE` bytes, in smaller ones where the client is slow.
    A piece of a body belongs to the application once it has it. Where a client goes in the middle
    of a body, what came is delivered before `http.disconnect` is.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.conn = _StrictConnection(h11.SERVER, self.config.h11_max_incomplete_event_size)
        self._application: ASGIApp = cast("ASGIApp", self.app)
        self.app = self._run
        self._body: ContentLengthReader | None = None
        self._piece = bytearray()
        self._filled = 0
        self._pieces: deque[bytes | bytearray] = deque()
        self._spare: list[bytearray] = []
        self._waiting: asyncio.TimerHandle | None = None
        self._writable: asyncio.Future[None] | None = None
        self._head_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Wait for the head of a request, for a while."""
        super().connection_made(transport)
        self._expect_head()

    def on_response_complete(self) -> None:
        """Wait for the head of the next request, for a while."""
        super().on_response_complete()
        self._expect_head()

    def _expect_head(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
        self._head_timer = self.loop.call_later(HEAD_SECONDS, self._close_without, self.cycle)

    def _close_without(self, last: object) -> None:
        """Close the connection if no request began after the one of `last`."""
        cycle = self.cycle
        if cycle is last and (cycle is None or cycle.response_complete):
            self.transport.close()

    def send_400_response(self, msg: str) -> None:
        """Refuse a request; after the start of its response all that is left is to close."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            super().send_400_response(msg)
        else:
            self.transport.close()

    async def _run(self, scope: Scope, receive: Receive, send: Send) -> None:
        cycle = self.cycle

        async def receive_piece() -> Message:
            if cycle.response_complete:
                self._pieces.clear()
            message = {} if self._pieces else await receive()
            if not self._pieces:
                return message
            piece = self._pieces.popleft()
            self.flow.resume_reading()
            more = bool(self._pieces) or cycle.more_body
            return {"type": "http.request", "body": piece, "more_body": more}

        async def send_any(message: Message) -> None:
            if message["type"] == "http.response.start" and self._is_asked_for_100():
                # Whether the body comes now is up to the client: what follows could be anything.
                message = {**message, "headers": [*message.get("headers", ()), _CLOSE]}
            if message["type"] == ZERO_COPY_SEND:
                if scope["method"] != "HEAD":
                    await self._send_file(message["file"], message["offset"], message["count"])
                if message.get("more_body", False):
                    return
                message = {"type": "http.response.body"}
            await send(message)

        extensions = scope.setdefault("extensions", {})
        extensions[REUSE] = {"give_back": self._give_back}
        if self.scheme == "http" and hasattr(os, "sendfile"):
            extensions[ZERO_COPY_SEND] = {}
        await self._application(scope, receive_piece, send_any)

    def _is_asked_for_100(self) -> bool:
        """Return whether the client waits to be told to send its body, and has sent none of it."""
        return (
            self.cycle.waiting_for_100_continue
            and self.conn.they_are_waiting_for_100_continue
            and not self._filled
            and not self._pieces
        )

    # Bodies of requests

    def get_buffer(self, sizehint: int) -> memoryview:
        """Return where the socket's next bytes go; never beyond the end of a body."""
        return _shared.buffer if self._body is None else memoryview(self._piece)[self._filled :]

    def buffer_updated(self, nbytes: int) -> None:
        """Take `nbytes` that came into the buffer."""
        if self._body is None:
            self.data_received(bytes(_shared.buffer[:nbytes]))
            self._begin_piece(self._large_body())
            return
        self._unset_keepalive_if_required()
        self._body._remaining -= nbytes
        self._filled += nbytes
        if self._filled < len(self._piece):
            self._wait_for_the_rest()
            return
        body = self._body
        self._deliver(self._piece)
        if body._remaining == 0:
            self._body = None
            self.handle_events()  # the end of the message
        else:
            self._begin_piece(body)

    def connection_lost(self, exc: Exception | None) -> None:
        """Deliver what there is of a piece; have nobody wait for the socket any more."""
        if self._body is not None and self._filled:
            self._deliver(self._begun())
        self._body = None
        # The connection is part of a cycle of references: it stays until the next collection.
        self._piece, self._filled = bytearray(), 0
        self._spare.clear()
        if self._head_timer is not None:
            self._head_timer.cancel()
        super().connection_lost(exc)
        self._wake()

    def _large_body(self) -> ContentLengthReader | None:
        """Return h11's account of the body that comes now, if it is worth to go past h11.

        h11 has no public way to be told that bytes of a body came by elsewhere. All that it does
        with them is to count them down in here.
        """
        reader = self.conn._reader
        if (
            self.conn.their_state is h11.SEND_BODY
            and isinstance(reader, ContentLengthReader)
            and reader._remaining >= _WORTH_IT
            and not self.conn.trailing_data[0]
            and not self.cycle.response_complete
        ):
            return reader
        return None

    def _begin_piece(self, body: ContentLengthReader | None) -> None:
        self._body = body
        self._filled = 0
        if body is None:
            self._piece = bytearray()
            return
        # What came with the head goes first, so that pieces are whole.
        begun, self.cycle.body = self.cycle.body, bytearray()
        size = min(PIECE, len(begun) + body._remaining)
        self._piece = self._spare.pop() if size == PIECE and self._spare else bytearray(size)
        self._piece[: len(begun)] = begun
        self._filled = len(begun)
        if begun:
            self._wait_for_the_rest()

    def _give_back(self, piece: bytes | bytearray) -> None:
        """Have a piece filled again, from the event loop's thread: fresh memory costs more."""
        if (
            isinstance(piece, bytearray)
            and len(piece) == PIECE
            and len(self._spare) < _SPARE_PIECES
            and not self.transport.is_closing()
        ):
            self._spare.append(piece)

    def _begun(self) -> bytes:
        return bytes(memoryview(self._piece)[: self._filled])

    def _wait_for_the_rest(self) -> None:
        if self._waiting is None:
            self._waiting = self.loop.call_later(_PATIENCE, self._deliver_begun)

    def _deliver_begun(self) -> None:
        """Deliver part of a piece: the client is slow, or waits for an answer to it."""
        self._waiting = None
        if self._body is None or not self._filled:
            return
        if self._pieces:  # the application is what is slow
            self._wait_for_the_rest()
            return
        self._deliver(self._begun())
        self._begin_piece(self._body)

    def _deliver(self, piece: bytes | bytearray) -> None:
        if self._waiting is not None:
            self._waiting.cancel()
            self._waiting = None
        if self.cycle.response_complete:
            return  # the client goes on although it has its answer
        self._pieces.append(piece)
        self.flow.pause_reading()  # until the application takes it
        self.cycle.message_event.set()

    # Parts of files in responses

    async def _send_file(self, file: int, offset: int, count: int) -> None:
        """Have the kernel send `count` bytes.

        Raises `ConnectionError` if the client is gone. So it has to be where the file ends before:
        the connection is closed.
        """
        cycle = self.cycle
        await self.flow.drain()
        if cycle.disconnected or self.transport.is_closing():
            raise ConnectionError("the client is gone")
        content = cast("bytes", _Length(count))
        for output in cycle.conn.send_with_data_passthrough(h11.Data(data=content)) or ():
            if output is not content:
                self.transport.write(output)  # around chunks
                continue
            self.transport.set_write_buffer_limits(0)
            await self.flow.drain()  # what was written before goes before
            try:
                await self._sendfile(file, offset, count)
            except OSError:
                self.transport.abort()
                raise

    async def _sendfile(self, file: int, offset: int, count: int) -> None:
        """Send by the kernel in worker threads, as it may wait for the disk.

        By a descriptor of its own: the transport may close its one at any time, and a thread
        would write to whoever gets that number next.
        """
        loop = asyncio.get_running_loop()
        sink: socket.socket = self.transport.get_extra_info("socket").dup()
        try:
            end = offset + count
            while offset < end:
                if self.cycle.disconnected:
                    raise ConnectionError("the client is gone")
                work = loop.run_in_executor(None, _send_what_fits, sink, file, offset, end)
                try:
                    offset = await asyncio.shield(work)
                except asyncio.CancelledError:
                    await asyncio.wait([work])  # it waits for no client; then it lets go of both
                    raise
                if offset < end:
                    await self._until_writable(loop, sink)
        finally:
            sink.close()

    async def _until_writable(self, loop: asyncio.AbstractEventLoop, sink: socket.socket) -> None:
        if self.cycle.disconnected:
            return
        self._writable = loop.create_future()
        loop.add_writer(sink, self._wake)
        try:
            await self._writable
        finally:
            loop.remove_writer(sink)
            self._writable = None

    def _wake(self) -> None:
        if self._writable is not None and not self._writable.done():
            self._writable.set_result(None)


class _StrictConnection(h11.Connection):
    """h11's server side, which refuses requests whose end a proxy before us may see elsewhere.

    Each refusal is a `RemoteProtocolError`: uvicorn answers 400 and closes the connection, so that
    nothing after the request is read as another one.
    """

    def __init__(self, role: type[h11.CLIENT | h11.SERVER], max_incomplete: int | None) -> None:
        if max_incomplete is None:
            super().__init__(role)
        else:
            super().__init__(role, max_incomplete)
        self._receive_buffer = _StrictBuffer()

    def next_event(self) -> Any:
        """Return the next event; raise `RemoteProtocolError` for a request framed ambiguously."""
        event = super().next_event()
        if isinstance(event, h11.Request):
            names = [name for name, _ in event.headers]
            chunked = b"transfer-encoding" in names
            if chunked and (b"content-length" in names or event.http_version != b"1.1"):
                self._process_error(self.their_role)
                raise h11.RemoteProtocolError("Transfer-Encoding with Content-Length or HTTP/1.0")
        return event


class _StrictBuffer(ReceiveBuffer):
    """Lines end with CRLF alone, and no header goes on in the next line."""

    def maybe_extract_next_line(self) -> bytearray | None:
        """Return the line of a chunk's size; raise `RemoteProtocolError` for a CR or LF in it."""
        line = super().maybe_extract_next_line()
        if line is not None and (_BARE_LF.search(line) or _BARE_CR.search(line)):
            raise h11.RemoteProtocolError("a chunk's line holds a CR or LF of its own")
        return line

    def maybe_extract_lines(self) -> list[bytearray] | None:
        """Return the lines of a head; raise `RemoteProtocolError` as said above."""
        self._head = bytearray()
        lines = super().maybe_extract_lines()
        if _BARE_LF.search(self._head) or _BARE_CR.search(self._head):
            raise h11.RemoteProtocolError("a line of the head does not end with CRLF")
        if any(line.startswith((b" ", b"\t")) for line in lines or ()):
            raise h11.RemoteProtocolError("a header goes on in the next line")
        return lines

    def _extract(self, count: int) -> bytearray:
        self._head = super()._extract(count)
        return self._head


class _Length:
    """Stands for bytes that h11 counts and does not see."""

    def __init__(self, count: int) -> None:
        self._count = count

    def __len__(self) -> int:
        return self._count


def _send_what_fits(sink: socket.socket, file: int, offset: int, end: int) -> int:
    """Send until the socket is full; return up to where. Raises `OSError`."""
    while offset < end:
        try:
            count = os.sendfile(sink.fileno(), file, offset, end - offset)
        except BlockingIOError:
            break
        if count == 0:
            raise ConnectionAbortedError("the file ends before its part does")
        offset += count
    return offset


def body_size(message: Message) -> int:
    """Return how many bytes of a body a message to or from an application has."""
    if message["type"] == ZERO_COPY_SEND:
        return cast("int", message["count"])
    return len(message.get("body", b""))
