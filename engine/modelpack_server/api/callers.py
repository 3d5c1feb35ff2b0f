"""Callers: the pool answers each request for the API key that it came with."""

from __future__ import annotations

from starlette.types import ASGIApp, Receive, Scope, Send

from modelpack_server.gateway.caller import caller_of
from modelpack_server.pool.access import acting_for


class Callers:
    """ASGI middleware: the pool shows a request only the models that its API key may use."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        with acting_for(caller_of(scope)):
            await self._app(scope, receive, send)
