"""The faults of the registry in `tests.registry.faulty`.

A fault is a function of an `Exchange`: it may read less of the request, send another response than
the correct `reply`, or none at all.
"""

from __future__ import annotations

import re
import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from http.server import BaseHTTPRequestHandler
from typing import TYPE_CHECKING
from urllib.parse import parse_qs, urlsplit

from tests.registry.faulty_content import Reply

if TYPE_CHECKING:
    from tests.registry.faulty import FaultyRegistry


@dataclass
class Recorded:
    """A request as it arrived; header names are in lower case.

    `body_size` counts the bytes read of its body, `sent_size` those sent of the response's body.
    """

    method: str
    path: str
    query: dict[str, list[str]]
    headers: dict[str, str]
    body_size: int = 0
    sent_size: int = 0


class Exchange:
    """One request and its response, which a fault may change."""

    def __init__(self, registry: FaultyRegistry, handler: BaseHTTPRequestHandler) -> None:
        self.registry = registry
        self._handler = handler
        self.method = handler.command
        self.target = handler.path
        parts = urlsplit(handler.path)
        self.path = parts.path
        self.query = parse_qs(parts.query, keep_blank_values=True)
        self.headers = {name.lower(): value for name, value in handler.headers.items()}
        self.body = b""
        self.length = int(self.headers.get("content-length", "0"))
        self._unread = self.length
        self.recorded = Recorded(self.method, self.path, self.query, dict(self.headers))

    @property
    def unread(self) -> int:
        """The bytes of the request's body that were not read yet."""
        return self._unread

    def receive(self, count: int | None = None) -> None:
        """Read `count` bytes of the request's body, or all that is left, into `body`."""
        wanted = self._unread if count is None else min(count, self._unread)
        arrived = self._handler.rfile.read(wanted)
        self.body += arrived
        self.recorded.body_size += len(arrived)
        self._unread -= len(arrived)
        if len(arrived) < wanted:
            raise ConnectionError("the client went away")

    def reply(self) -> Reply:
        """Return the response of a correct registry."""
        self.receive()
        return self.registry.content.answer(self)

    def send(self, reply: Reply, stop_after: int | None = None) -> None:
        """Send `reply`, or only `stop_after` bytes of its body before the connection is cut."""
        self.send_head(reply.status, {"Content-Length": str(len(reply.body)), **reply.headers})
        self.write(b"" if self.method == "HEAD" else reply.body[:stop_after])
        if stop_after is not None:
            self.cut()

    def send_head(self, status: int, headers: dict[str, str]) -> None:
        """Send a status and headers."""
        handler = self._handler
        handler.send_response_only(status)
        for name, value in {"Date": handler.date_time_string(), **headers}.items():
            handler.send_header(name, value)
        handler.end_headers()

    def write(self, content: bytes) -> None:
        """Send bytes as they are."""
        self._handler.wfile.write(content)
        self.recorded.sent_size += len(content)
        self._handler.wfile.flush()

    def cut(self) -> None:
        """Close the connection now."""
        self._handler.close_connection = True
        self._handler.connection.shutdown(socket.SHUT_RDWR)

    def keep_silent(self) -> None:
        """Send nothing until the client disconnects or the test ends."""
        self._handler.close_connection = True
        self.registry.closing.wait(timeout=60)


Fault = Callable[[Exchange], None]


def cut_after(count: int) -> Fault:
    """Announce the whole body, but close the connection after `count` bytes of it."""
    return lambda exchange: exchange.send(exchange.reply(), stop_after=count)


def changed(change: Callable[[Reply], Reply]) -> Fault:
    """Send the correct reply, changed by `change`."""
    return lambda exchange: exchange.send(change(exchange.reply()))


def with_headers(**headers: str) -> Fault:
    """Send the correct reply with these headers (`Docker_Content_Digest="..."`)."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return changed(lambda reply: replace(reply, headers=reply.headers | named))


def without_headers(*names: str) -> Fault:
    """Send the correct reply without these headers."""
    return changed(
        lambda reply: replace(
            reply, headers={k: v for k, v in reply.headers.items() if k not in names}
        )
    )


def shortened(count: int) -> Fault:
    """Leave out the last `count` bytes, with a matching Content-Length."""
    return changed(lambda reply: replace(reply, body=reply.body[: len(reply.body) - count]))


def flipped_bit(position: int) -> Fault:
    """Flip one bit of the byte at `position`."""

    def flip(reply: Reply) -> Reply:
        body = bytearray(reply.body)
        body[position] ^= 1
        return replace(reply, body=bytes(body))

    return changed(flip)


def replaced(body: bytes) -> Fault:
    """Send another body with the same headers."""
    return changed(lambda reply: replace(reply, body=body))


def answering(status: int, body: bytes = b"", **headers: str) -> Fault:
    """Send a status (`Retry_After="3"`) for any request, after reading its body."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}

    def answer(exchange: Exchange) -> None:
        exchange.receive()
        exchange.send(Reply(status, named, body))

    return answer


def redirecting(to: FaultyRegistry | str, status: int = 307) -> Fault:
    """Redirect to the same path at another registry, or to a URL."""
    return lambda exchange: exchange.send(
        Reply(status, {"Location": to if isinstance(to, str) else to.url + exchange.target})
    )


def ignoring_range(exchange: Exchange) -> None:
    """Ignore ranges and send 200 with the whole blob, as old servers do."""
    exchange.headers.pop("range", None)
    exchange.send(exchange.reply())


def shifted_range(by: int) -> Fault:
    """Send another range than the requested one."""

    def shift(exchange: Exchange) -> None:
        asked = exchange.headers.get("range")
        if asked is not None:
            start = int(asked.removeprefix("bytes=").partition("-")[0])
            exchange.headers["range"] = f"bytes={start + by}-"
        exchange.send(exchange.reply())

    return shift


def chunked(exchange: Exchange) -> None:
    """Send the body in chunks, without a Content-Length."""
    reply = exchange.reply()
    chunk = b"%x\r\n%s\r\n" % (len(reply.body), reply.body) if reply.body else b""
    exchange.send_head(reply.status, reply.headers | {"Transfer-Encoding": "chunked"})
    exchange.write(chunk + b"0\r\n\r\n")


def silent(exchange: Exchange) -> None:
    """Read the request and never respond."""
    exchange.keep_silent()


def silent_after(count: int) -> Fault:
    """Send `count` bytes of the body, then nothing more."""

    def stall(exchange: Exchange) -> None:
        reply = exchange.reply()
        whole = {"Content-Length": str(len(reply.body))}
        exchange.send(replace(reply, headers=reply.headers | whole, body=reply.body[:count]))
        exchange.keep_silent()

    return stall


def dripping(piece: int = 10, pause: float = 0.01) -> Fault:
    """Send the body in pieces of a few bytes with a pause, in seconds, after each."""

    def drip(exchange: Exchange) -> None:
        reply = exchange.reply()
        exchange.send_head(reply.status, {"Content-Length": str(len(reply.body)), **reply.headers})
        for position in range(0, len(reply.body), piece):
            exchange.write(reply.body[position : position + piece])
            if exchange.registry.closing.wait(pause):
                return

    return drip


def held_until(event: threading.Event) -> Fault:
    """Send the correct reply after `event`."""

    def hold(exchange: Exchange) -> None:
        event.wait(timeout=60)
        exchange.send(exchange.reply())

    return hold


def cut_upload(after: int) -> Fault:
    """Close the connection when `after` bytes of the request's body have arrived."""

    def cut(exchange: Exchange) -> None:
        exchange.receive(after)
        exchange.cut()

    return cut


def kept_upload(after: int) -> Fault:
    """Cut an upload as `cut_upload` does, but keep the received bytes, as good registries do."""

    def cut(exchange: Exchange) -> None:
        exchange.receive(after)
        sessions = exchange.registry.content.sessions
        sessions[exchange.path.rpartition("/")[2]] += exchange.body
        exchange.cut()

    return cut


def stalled_upload(after: int) -> Fault:
    """Stop reading the request's body after `after` bytes."""

    def stall(exchange: Exchange) -> None:
        exchange.receive(after)
        exchange.keep_silent()

    return stall


@dataclass
class _Planned:
    method: str
    path: re.Pattern[str]
    fault: Fault
    times: int | None


class Faults:
    """The planned faults, and how often each occurs."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._planned: list[_Planned] = []

    def add(
        self, method: str, path: str, fault: Fault, times: int | None = 1, *, first: bool = False
    ) -> None:
        """Apply `fault` to the next `times` matching requests; None means all of them.

        With `first`, it applies before the faults that were added earlier.
        """
        with self._lock:
            place = 0 if first else len(self._planned)
            self._planned.insert(place, _Planned(method, re.compile(path), fault, times))

    def clear(self) -> None:
        """Remove all faults."""
        with self._lock:
            self._planned.clear()

    def take(self, method: str, target: str) -> Fault | None:
        """Return the fault for a request, and count its use."""
        with self._lock:
            for planned in self._planned:
                if planned.method in ("*", method) and planned.path.search(target):
                    if planned.times is not None:
                        planned.times -= 1
                        if planned.times == 0:
                            self._planned.remove(planned)
                    return planned.fault
        return None
