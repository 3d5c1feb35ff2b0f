"""The proxy: forward requests to upstreams, and their replies to clients."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import suppress

import httpx
from starlette.types import Message, Receive, Scope, Send

from modelpack_server.gateway.affinity import prefix_key
from modelpack_server.gateway.caller import caller_of
from modelpack_server.gateway.checks import is_stored_on_server
from modelpack_server.gateway.families import error_response, family_in, retry_headers, stream_error
from modelpack_server.gateway.forwarding import CALLER_HEADERS, caller_headers, names_callers
from modelpack_server.gateway.json_bodies import document_in
from modelpack_server.gateway.stored_objects import Locations, stored_object
from modelpack_server.gateway.traces import Trace, trace_of
from modelpack_server.gateway.upstreams import Upstream, Upstreams

Header = tuple[bytes, bytes]

# RFC 9110 section 7.6.1, and headers of older software.
_HOP_BY_HOP = frozenset(
    (b"connection", b"keep-alive", b"proxy-authenticate", b"proxy-authorization",
     b"proxy-connection", b"te", b"trailer", b"transfer-encoding", b"upgrade")
)  # fmt: skip
_CREDENTIALS = frozenset((b"authorization", b"x-api-key", b"api-key", b"cookie"))
# The gateway has checked the origin; x-request-origin is internal to a server.
_NOT_FORWARDED = _HOP_BY_HOP | {
    b"host", b"expect", b"accept-encoding", b"origin", b"referer", b"forwarded",
    b"x-forwarded-for", b"x-request-origin", b"content-length",
    b"sec-fetch-site", b"sec-fetch-mode", b"sec-fetch-dest", b"sec-fetch-user",
} | CALLER_HEADERS  # fmt: skip
_NOT_RETURNED = _HOP_BY_HOP | {b"date"}  # our server adds its own
# Servers that expect no body in other requests may read it as the next request on the connection,
# whose response would go to another client. Connections of HEAD requests are not reused either,
# since servers differ in the framing of their responses.
_WITH_BODY = ("POST", "PUT", "PATCH", "DELETE")
_BUSY = (503, 529)
_CONNECT_TIMEOUT = 5.0
_LOOKUP_TIMEOUT = 10.0
_UNREACHED = (httpx.ConnectError, httpx.ConnectTimeout)


class Proxy:
    """ASGI application that forwards requests to upstreams.

    Files and batches are on the first upstream with a fixed address, wherever other requests go.
    A request that names a stored response or conversation goes to the upstream that has it. The
    proxy retries on another upstream only if the first cannot have begun the request: it was
    unreachable, or returned 503 (529) with Retry-After; and only if the whole body is in memory.

    `keyed`: the credentials belong to the gateway's keys and are not forwarded. `upstream_key` is
    sent to upstreams. Without it, only upstreams at loopback addresses get the caller's name, since
    others would not trust the gateway (`gateway.forwarding`). `timeout` is the limit of seconds
    between two pieces of a reply.

    It uses httpx's `transport` instead of its client, which keeps cookies and logs URLs with their
    queries, which may contain keys.
    """

    def __init__(
        self,
        upstreams: Upstreams,
        transport: Callable[[], httpx.AsyncBaseTransport],
        *,
        keyed: bool = False,
        upstream_key: str | None = None,
        timeout: float = 600.0,
    ) -> None:
        self._upstreams = upstreams
        self._transport = transport
        self._timeout = httpx.Timeout(timeout, connect=_CONNECT_TIMEOUT, pool=None).as_dict()
        self._withheld = _NOT_FORWARDED | (_CREDENTIALS if keyed or upstream_key else set())
        self._upstream_key = upstream_key
        self._keyed = keyed
        self._locations = Locations()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Forward the request; if the client disconnects, close the upstream's connection."""
        body = _Body(receive)
        await body.begin()
        forward = asyncio.create_task(self._forward(scope, body, send))
        gone = asyncio.create_task(body.until_gone())
        try:
            await asyncio.wait((forward, gone), return_when=asyncio.FIRST_COMPLETED)
        finally:
            finished = forward.done()
            for task in (forward, gone):
                task.cancel()
            await asyncio.wait((forward, gone))
        if finished and not forward.cancelled():
            with suppress(_ClientGoneError):
                forward.result()

    async def _forward(self, scope: Scope, body: _Body, send: Send) -> None:
        trace = trace_of(scope)
        only: str | None = None  # the name of the one upstream that may get the request
        if is_stored_on_server(scope["path"]):
            first = self._upstreams.home
            if first is None:
                text = "files and batches need an upstream with a fixed address"
                await self._fail(scope, send, 501, f"{text}, and all are looked up in DNS")
                return
            if self._keyed and not names_callers(first.url.host, self._upstream_key):
                text = "files and batches need an upstream that trusts the gateway's callers"
                await self._fail(scope, send, 501, f"{text}: set MODELPACK_UPSTREAM_KEY")
                return
            only = first.name
        elif len(self._upstreams.all) > 1 and (stored := stored_object(scope)) is not None:
            try:
                only = await self._holder(scope, stored)
            except _UnknownHolderError:
                text = f"an upstream that may have {stored} cannot be reached"
                await self._fail(scope, send, 503, text, retry_after=1)
                return
        prefix = prefix_key(document_in(scope)) if self._upstreams.by_prefix else None
        tried: list[str] = []
        while (upstream := self._upstreams.choose(tried, prefix, only=only)) is not None:
            tried.append(upstream.name)
            if trace:
                trace.upstream, trace.attempts = upstream.name, len(tried)
                trace.queue_s = trace.clock() - trace.started
            with upstream.busy():
                try:
                    request = self._request(scope, body, upstream)
                    response = await self._transport().handle_async_request(request)
                except _UNREACHED as error:
                    self._upstreams.failed(upstream, type(error).__name__)
                    if body.replayable:
                        continue
                    break
                except httpx.InvalidURL:
                    await self._fail(scope, send, 400, "the request path is not valid in a URL")
                    return
                except httpx.TimeoutException:
                    await self._fail(scope, send, 504, "the upstream did not respond in time")
                    return
                except httpx.HTTPError as error:
                    self._upstreams.failed(upstream, type(error).__name__)
                    await self._fail(
                        scope, send, 502, "the upstream closed the connection before its response"
                    )
                    return
                try:
                    if only is None and self._is_spared(response, body, tried):
                        self._upstreams.rests(upstream, response.headers["retry-after"])
                        continue
                    self._upstreams.answered(upstream)
                    await self._reply(scope, response, upstream, send)
                    return
                finally:
                    await response.aclose()
        await self._fail(scope, send, 503, "no upstream can be reached", retry_after=1)

    def _is_spared(self, response: httpx.Response, body: _Body, tried: list[str]) -> bool:
        busy = response.status_code in _BUSY and "retry-after" in response.headers
        others = any(upstream.name not in tried for upstream in self._upstreams.all)
        return busy and body.replayable and others

    async def _holder(self, scope: Scope, stored: str) -> str | None:
        """Return the name of the upstream that has a stored object, None if none has it.

        Raises `_UnknownHolderError` if none has it, and one cannot be asked.
        """
        upstreams = self._upstreams.all
        known = self._locations.get(stored)
        if known in [upstream.name for upstream in upstreams]:
            return known
        found = await asyncio.gather(*(self._has(scope, stored, each) for each in upstreams))
        for upstream, has in zip(upstreams, found, strict=True):
            if has:
                self._locations.put(stored, upstream.name)
                return upstream.name
        if None in found:
            raise _UnknownHolderError
        return None

    async def _has(self, scope: Scope, stored: str, upstream: Upstream) -> bool | None:
        """Return whether the upstream has an object of the caller, None if it does not say."""
        headers = [
            (name, value)
            for name, value in self._headers(scope, upstream)
            if name not in (b"content-type", b"accept")
        ]
        extensions = {"timeout": httpx.Timeout(_LOOKUP_TIMEOUT, pool=None).as_dict()}
        url = upstream.target(stored.encode(), b"")
        request = httpx.Request("GET", url, headers=headers, extensions=extensions)
        try:
            response = await self._transport().handle_async_request(request)
            await response.aclose()
        except httpx.HTTPError:
            return None
        unavailable = response.status_code >= 500 and response.status_code != 501
        return None if unavailable else response.is_success

    def _headers(self, scope: Scope, upstream: Upstream) -> list[Header]:
        headers = [(n, v) for n, v in _end_to_end(scope["headers"]) if n not in self._withheld]
        if names_callers(upstream.url.host, self._upstream_key):
            headers += caller_headers(caller_of(scope))
        # The gateway reads token counts in the response.
        headers.append((b"accept-encoding", b"identity"))
        if client := scope.get("client"):
            headers.append((b"x-forwarded-for", client[0].encode()))
        if self._upstream_key:
            headers.append((b"authorization", f"Bearer {self._upstream_key}".encode()))
        return headers

    def _request(self, scope: Scope, body: _Body, upstream: Upstream) -> httpx.Request:
        headers = self._headers(scope, upstream)
        content: bytes | AsyncIterator[bytes] | None = body.whole
        if scope["method"] not in _WITH_BODY:
            content = None
            if scope["method"] != "GET":
                headers.append((b"connection", b"close"))
        elif body.whole is None:
            content = body.pieces()
            headers += [(n, v) for n, v in scope["headers"] if n == b"content-length"]
        elif not body.whole and scope["method"] == "DELETE":
            content = None
        raw_path = scope.get("raw_path") or scope["path"].encode()
        return httpx.Request(
            scope["method"],
            upstream.target(raw_path, scope["query_string"]),
            headers=headers,
            content=content,
            extensions={"timeout": self._timeout},
        )

    async def _reply(
        self, scope: Scope, response: httpx.Response, upstream: Upstream, send: Send
    ) -> None:
        headers = [
            (name.lower(), value)
            for name, value in _end_to_end(response.headers.raw)
            if name.lower() not in _NOT_RETURNED and not name.lower().startswith(b"access-control-")
        ]
        status = response.status_code
        await send({"type": "http.response.start", "status": status, "headers": headers})
        try:
            async for piece in response.aiter_raw():
                await send({"type": "http.response.body", "body": piece, "more_body": True})
        except httpx.HTTPError as error:
            self._upstreams.failed(upstream, type(error).__name__)
            media_type = response.headers.get("content-type", "").partition(";")[0].strip()
            ending = stream_error(
                family_in(scope), media_type, "the upstream closed the connection"
            )
            if trace := trace_of(scope):
                trace.finish = "error"
            if ending is None:
                return  # closing the connection shows that the response is incomplete
            await send({"type": "http.response.body", "body": ending, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _fail(
        self,
        scope: Scope,
        send: Send,
        status: int,
        message: str,
        *,
        retry_after: float | None = None,
    ) -> None:
        trace: Trace | None = trace_of(scope)
        if trace:
            trace.refused = "upstream"
        response = error_response(
            family_in(scope),
            status,
            message,
            code="upstream_error",
            headers=None if retry_after is None else retry_headers(retry_after),
            request_id=trace.id if trace else None,
        )
        await response(scope, _nothing, send)


class _UnknownHolderError(Exception):
    """No upstream that can be reached has the object, and others cannot be reached."""


class _ClientGoneError(Exception):
    """The client disconnected within its body."""


class _Body:
    """A request's body: `whole` if it arrived in one message, otherwise pieces, read once."""

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self._first = b""
        self._begun = False
        self._over = asyncio.Event()
        self.whole: bytes | None = None

    async def begin(self) -> None:
        """Read the first message, which says whether more follow."""
        message = await self._receive()
        self._first = message.get("body", b"")
        if not message.get("more_body", False):
            self.whole = self._first
            self._over.set()

    @property
    def replayable(self) -> bool:
        """Whether the body can be sent, possibly again."""
        return self.whole is not None or not self._begun

    async def pieces(self) -> AsyncIterator[bytes]:
        """Yield the pieces of the body. Raises `_ClientGoneError`."""
        self._begun = True
        yield self._first
        more = True
        while more:
            message = await self._receive()
            if message["type"] == "http.disconnect":
                raise _ClientGoneError
            more = message.get("more_body", False)
            if piece := message.get("body", b""):
                yield piece
        self._over.set()

    async def until_gone(self) -> None:
        """Return when the client has disconnected after its body."""
        await self._over.wait()
        while (await self._receive())["type"] != "http.disconnect":
            pass


def _end_to_end(headers: Iterable[Header]) -> list[Header]:
    """Return `headers` without those listed in the Connection header."""
    found = list(headers)
    named = {
        word.strip().lower()
        for name, value in found
        if name.lower() == b"connection"
        for word in value.split(b",")
    }
    return [(name, value) for name, value in found if name.lower() not in named]


async def _nothing() -> Message:
    return {"type": "http.disconnect"}
