"""HttpConnection: uvicorn's HTTP/1.1 protocol with fewer copies of large bodies, both ways.

Uvicorn copies each byte of a request's body four times on its way to the application, and can send
a file only through Python. Here the socket fills pieces that become messages without a copy, and
`http.response.zerocopysend` (an ASGI extension) has the kernel send part of a file. Heads, framing
and the order of events are uvicorn's and h11's. Requests that h11 accepts and a proxy before the
server may frame differently are refused (RFC 9112 section 11.2).

Responses use the public interface of h11, requests need two private parts of it, for which
pyproject.toml limits its version:

- `ContentLengthReader._remaining`, the bytes of a body that are left. `receive_data` is the only
  public way for a body into h11, and copies it: 1.9 s of processor time per GiB with uvicorn's
  collection of the pieces, against 0.001 s to count them here (h11 0.16, uvicorn 0.54). Uvicorn's
  other parser, httptools, has no public way around it either.
- `ReceiveBuffer`, which holds the bytes of lines. h11 reports neither a bare CR or LF nor a header
  in several lines, so any check outside of it would have to parse heads and chunks again.
"""

from __future__ import annotations

import asyncio
import os
import re
import select
import socket
import threading
from collections import deque
from typing import TYPE_CHECKING, Any, Final, cast

import h11
from h11._readers import ContentLengthReader
from h11._receivebuffer import ReceiveBuffer
from uvicorn.protocols.http.h11_impl import H11Protocol

from modelpack.http import REUSE

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

#: The extension's name in `scope["extensions"]`, and the type of its message.
ZERO_COPY_SEND: Final = "http.response.zerocopysend"
#: Bytes of a body in one message to the application, if the body has as many.
PIECE: Final = 1024 * 1024
# Bodies of which less is left are read by uvicorn and h11.
_WORTH_IT: Final = 64 * 1024
# Seconds that part of a piece waits for the rest.
_PATIENCE: Final = 0.05
_SPARE_PIECES: Final = 3
# Large bodies that are received without turns. With more, one piece begins in each iteration of the
# event loop.
_AT_ONCE: Final = 4
#: Seconds that a client has for the head of a request, from when it may send one.
HEAD_SECONDS: Final = 30.0
_CLOSE: Final = (b"connection", b"close")
_READ_SIZE: Final = 256 * 1024  # what asyncio reads at once by itself
_FULL_MILLISECONDS: Final = 5  # that a worker thread waits for a full socket
_BARE_LF: Final = re.compile(rb"(?<!\r)\n")
_BARE_CR: Final = re.compile(rb"\r(?!\n)")


class _Shared(threading.local):
    """What the connections of a thread, and so of an event loop, share.

    `buffer` receives heads, which connections copy at once. `bodies` are the connections that
    receive a large body; `waiting` are those of them that wait for their turn to read.
    """

    def __init__(self) -> None:
        self.buffer = memoryview(bytearray(_READ_SIZE))
        self.loop: asyncio.AbstractEventLoop | None = None
        self.bodies: set[HttpConnection] = set()
        self.waiting: deque[HttpConnection] = deque()

    def begin(self, connection: HttpConnection) -> None:
        """Count a connection whose large body begins."""
        if connection.loop is not self.loop:
            self.loop = connection.loop
            self.bodies.clear()
            self.waiting.clear()
        self.bodies.add(connection)

    def read_on(self, connection: HttpConnection) -> None:
        """Let a connection read: at once if few connections receive large bodies, else in turn.

        Each read releases the interpreter's lock and then waits for it while other threads work.
        Dozens of reads in each iteration of the event loop would delay small requests.
        """
        if connection not in self.bodies or len(self.bodies) <= _AT_ONCE:
            connection.flow.resume_reading()
            return
        self.waiting.append(connection)
        if len(self.waiting) == 1:
            connection.loop.call_soon(self._next_turn)

    def _next_turn(self) -> None:
        connection = self.waiting.popleft()
        connection.flow.resume_reading()
        if self.waiting:
            connection.loop.call_soon(self._next_turn)


_shared = _Shared()


class HttpConnection(H11Protocol, asyncio.BufferedProtocol):
    """One connection, created by uvicorn (its setting `http`).

    A large body is delivered in pieces of `PIECE` bytes, in smaller ones if the client is slow. A
    delivered piece belongs to the application. If a client disconnects in the middle of a body, the
    received bytes are delivered before `http.disconnect`.
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
        """Start the time limit for the head of the first request."""
        super().connection_made(transport)
        self._expect_head()

    def on_response_complete(self) -> None:
        """Start the time limit for the head of the next request."""
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
        """Refuse a request; if its response has started, close the connection."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            super().send_400_response(msg)
        else:
            self.transport.close()

    async def _run(self, scope: Scope, receive: Receive, send: Send) -> None:
        cycle = self.cycle
        chunked = False

        async def receive_piece() -> Message:
            if cycle.response_complete:
                self._pieces.clear()
            message = {} if self._pieces else await receive()
            if not self._pieces:
                return message
            piece = self._pieces.popleft()
            _shared.read_on(self)
            more = bool(self._pieces) or cycle.more_body
            return {"type": "http.request", "body": piece, "more_body": more}

        async def send_any(message: Message) -> None:
            nonlocal chunked
            kind = message["type"]
            if chunked and kind == "http.response.body" and message.get("more_body"):
                # The same bytes as h11 makes, in a fraction of the time.
                if self.flow.write_paused and not cycle.disconnected:
                    await self.flow.drain()
                if (body := message.get("body")) and not cycle.disconnected:
                    self.transport.write(b"%x\r\n%b\r\n" % (len(body), body))
                return
            chunked = False  # the body's last part
            if kind == "http.response.start":
                if self._is_asked_for_100():
                    # The client may send the body or another request now, so nothing after it can
                    # be read.
                    message = {**message, "headers": [*message.get("headers", ()), _CLOSE]}
                chunked = _is_chunked(scope, message)
            if kind == ZERO_COPY_SEND:
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
        """Return whether the client waits for a 100 (Continue) and has sent none of its body."""
        return (
            self.cycle.waiting_for_100_continue
            and self.conn.they_are_waiting_for_100_continue
            and not self._filled
            and not self._pieces
        )

    # Bodies of requests

    def get_buffer(self, sizehint: int) -> memoryview:
        """Return the buffer for the socket's next bytes; it never extends beyond a body's end."""
        return _shared.buffer if self._body is None else memoryview(self._piece)[self._filled :]

    def buffer_updated(self, nbytes: int) -> None:
        """Process `nbytes` that arrived in the buffer."""
        if self._body is None:
            self.data_received(bytes(_shared.buffer[:nbytes]))
            body = self._large_body()
            self._begin_piece(body)
            if body is not None:
                _shared.begin(self)
                self.flow.pause_reading()
                _shared.read_on(self)
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
            _shared.bodies.discard(self)
            self.handle_events()  # the end of the message
        else:
            self._begin_piece(body)

    def connection_lost(self, exc: Exception | None) -> None:
        """Deliver the received part of a piece; wake the task that waits for the socket."""
        if self._body is not None and self._filled:
            self._deliver(self._begun())
        self._body = None
        _shared.bodies.discard(self)
        # Free memory now: the connection is in a cycle of references until the next collection.
        self._piece, self._filled = bytearray(), 0
        self._spare.clear()
        if self.cycle is not None and self.cycle.response_complete:
            self._pieces.clear()
        if self._head_timer is not None:
            self._head_timer.cancel()
        super().connection_lost(exc)
        self._wake()

    def _large_body(self) -> ContentLengthReader | None:
        """Return h11's counter of the bytes left of the current body, or None for a small body.

        h11 only counts the bytes of a body down, which `buffer_updated` does in its place.
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
        # Begin with the bytes that came with the head, so that pieces are whole.
        begun, self.cycle.body = self.cycle.body, bytearray()
        size = min(PIECE, len(begun) + body._remaining)
        self._piece = self._spare.pop() if size == PIECE and self._spare else bytearray(size)
        self._piece[: len(begun)] = begun
        self._filled = len(begun)
        if begun:
            self._wait_for_the_rest()

    def _give_back(self, piece: bytes | bytearray) -> None:
        """Reuse a piece, since new memory costs more; called in the event loop's thread."""
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
        """Deliver part of a piece: the client is slow, or waits for a response to it."""
        self._waiting = None
        if self._body is None or not self._filled:
            return
        if self._pieces:  # the application is slow, not the client
            self._wait_for_the_rest()
            return
        self._deliver(self._begun())
        self._begin_piece(self._body)

    def _deliver(self, piece: bytes | bytearray) -> None:
        if self._waiting is not None:
            self._waiting.cancel()
            self._waiting = None
        if self.cycle.response_complete:
            return  # the client still sends although it has its response
        self._pieces.append(piece)
        self.flow.pause_reading()  # until the application takes it
        self.cycle.message_event.set()

    # Parts of files in responses

    async def _send_file(self, file: int, offset: int, count: int) -> None:
        """Have the kernel send `count` bytes of a file.

        Raises `ConnectionError` if the client disconnected, or if the file ends too early; the
        connection is closed then.
        """
        cycle = self.cycle
        await self.flow.drain()
        if cycle.disconnected or self.transport.is_closing():
            raise ConnectionError("the client disconnected")
        content = cast("bytes", _Length(count))
        for output in cycle.conn.send_with_data_passthrough(h11.Data(data=content)) or ():
            if output is not content:
                self.transport.write(output)  # the framing of chunks
                continue
            self.transport.set_write_buffer_limits(0)
            await self.flow.drain()  # send earlier writes first
            try:
                await self._sendfile(file, offset, count)
            except OSError:
                self.transport.abort()
                raise

    async def _sendfile(self, file: int, offset: int, count: int) -> None:
        """Send by the kernel, in worker threads since it may wait for the disk.

        The threads use a duplicate of the socket: the transport may close its descriptor at any
        time, and its number could then belong to another file.
        """
        loop = asyncio.get_running_loop()
        sink: socket.socket = self.transport.get_extra_info("socket").dup()
        try:
            end = offset + count
            while offset < end:
                if self.cycle.disconnected:
                    raise ConnectionError("the client disconnected")
                work = loop.run_in_executor(None, _send_what_fits, sink, file, offset, end)
                try:
                    offset = await asyncio.shield(work)
                except asyncio.CancelledError:
                    await asyncio.wait([work])  # it does not wait for the client
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


def _is_chunked(scope: Scope, start: Message) -> bool:
    """Return whether h11 sends the body of a response in chunks (RFC 9112 section 6.3)."""
    return (
        scope["http_version"] == "1.1"
        and scope["method"] != "HEAD"
        and start["status"] not in (204, 304)
        and not any(
            name.lower() in (b"content-length", b"transfer-encoding")
            for name, _ in start.get("headers", ())
        )
    )


class _StrictConnection(h11.Connection):
    """h11's server side, which refuses requests that a proxy before it may frame differently.

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
                raise h11.RemoteProtocolError("Transfer-Encoding with Content-Length or HTTP/1.0")
        return event


class _StrictBuffer(ReceiveBuffer):
    """h11's buffer, restricted: lines end with CRLF only, and headers have one line each."""

    def maybe_extract_next_line(self) -> bytearray | None:
        """Return the line of a chunk's size; raise `RemoteProtocolError` for a CR or LF in it."""
        line = super().maybe_extract_next_line()
        if line is not None and (_BARE_LF.search(line) or _BARE_CR.search(line)):
            raise h11.RemoteProtocolError("a bare CR or LF in the line of a chunk's size")
        return line

    def maybe_extract_lines(self) -> list[bytearray] | None:
        """Return the lines of a head; raise `RemoteProtocolError` for other line ends or folds."""
        self._head = bytearray()
        lines = super().maybe_extract_lines()
        if _BARE_LF.search(self._head) or _BARE_CR.search(self._head):
            raise h11.RemoteProtocolError("a line of the head does not end with CRLF")
        if any(line.startswith((b" ", b"\t")) for line in lines or ()):
            raise h11.RemoteProtocolError("a header continues in the next line")
        return lines

    def _extract(self, count: int) -> bytearray:
        self._head = super()._extract(count)
        return self._head


class _Length:
    """A length in place of bytes, which h11 only counts."""

    def __init__(self, count: int) -> None:
        self._count = count

    def __len__(self) -> int:
        return self._count


def _send_what_fits(sink: socket.socket, file: int, offset: int, end: int) -> int:
    """Send until the socket stays full; return the offset of the next byte. Raises `OSError`.

    A full socket is waited for briefly, since a fast client empties it sooner than the event loop
    would start another call.
    """
    poll = select.poll()
    poll.register(sink, select.POLLOUT)
    while offset < end:
        try:
            count = os.sendfile(sink.fileno(), file, offset, end - offset)
        except BlockingIOError:
            if poll.poll(_FULL_MILLISECONDS):
                continue
            break
        if count == 0:
            raise ConnectionAbortedError("the file ends before the part to send does")
        offset += count
    return offset


def body_size(message: Message) -> int:
    """Return the bytes of a body in a message to or from an application."""
    if message["type"] == ZERO_COPY_SEND:
        return cast("int", message["count"])
    return len(message.get("body", b""))
