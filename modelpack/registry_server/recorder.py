"""RequestRecord: one request and its response, reported to a callback of the server's owner."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from modelpack.http.connection import body_size


@dataclass(frozen=True, slots=True)
class RequestRecord:
    """One finished request; `received` and `sent` are bytes of the bodies.

    `status` is None where the connection ended before an answer. Header names are lower case; of
    `authorization` only the scheme is told.
    """

    method: str
    path: str
    query: str
    status: int | None
    received: int
    sent: int
    headers: Mapping[str, str] = field(default_factory=dict, hash=False)


class Recorder:
    """ASGI middleware that calls back after each request, from the event loop's thread."""

    def __init__(self, app: ASGIApp, report: Callable[[RequestRecord], None]) -> None:
        self._app = app
        self._report = report

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status: int | None = None
        received = sent = 0

        async def counted_receive() -> Message:
            nonlocal received
            message = await receive()
            received += body_size(message)
            return message

        async def counted_send(message: Message) -> None:
            nonlocal status, sent
            status = message.get("status", status)
            await send(message)
            if scope["method"] != "HEAD":  # such a body is never sent
                sent += body_size(message)

        try:
            await self._app(scope, counted_receive, counted_send)
        finally:
            self._report(
                RequestRecord(
                    scope["method"],
                    scope["path"],
                    scope["query_string"].decode("latin-1"),
                    status,
                    received,
                    sent,
                    _shown(Headers(scope=scope)),
                )
            )


def _shown(headers: Headers) -> dict[str, str]:
    shown = dict(headers)
    if "authorization" in shown:
        shown["authorization"] = shown["authorization"].partition(" ")[0]
    return shown
