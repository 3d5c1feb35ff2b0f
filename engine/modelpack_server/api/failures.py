"""Failures: the last net under a request, below which a connection would be cut."""

from __future__ import annotations

from collections.abc import Callable

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from modelpack_engine.panics import as_error


class Failures:
    """ASGI middleware: an exception that nobody expected is an answer, and the connection lives on.

    Starlette raises it again once it is answered, whereupon uvicorn closes the connection, and the
    client's next request on it fails. One in the middle of a reply is raised: nothing else would
    tell the client that the rest is missing. `respond` makes the answer.
    """

    def __init__(self, app: ASGIApp, *, respond: Callable[[Request, Exception], Response]) -> None:
        self._app = app
        self._respond = respond

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = False

        async def noticing(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            await self._app(scope, receive, noticing)
        except BaseException as error:
            failure = as_error(error, "the request")
            if started:
                raise
            await self._respond(Request(scope), failure)(scope, receive, send)
