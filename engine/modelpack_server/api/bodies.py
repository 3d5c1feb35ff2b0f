"""BodyLimit: request bodies that are too large are refused as they arrive."""

from __future__ import annotations

from collections.abc import Callable

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from modelpack_server.api.problems import Shape, problem_of

MAX_BODY_BYTES = 64 * 1024 * 1024


class BodyLimit:
    """ASGI middleware: 413 for a body above `limit` bytes, said or sent.

    Paths for which `is_unlimited` is true may send as much as they like: uploads of models.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        limit: int,
        shape_of: Callable[[str], Shape],
        is_unlimited: Callable[[str], bool] = lambda path: False,
    ) -> None:
        self._app = app
        self._limit = limit
        self._text = f"the body is larger than {limit} bytes"
        self._shape_of = shape_of
        self._is_unlimited = is_unlimited

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        path = scope["path"]
        if scope["method"] in ("GET", "HEAD", "DELETE") or self._is_unlimited(path):
            await self._app(scope, receive, send)
            return
        declared = dict(scope["headers"]).get(b"content-length", b"")
        if declared.isdigit() and int(declared) > self._limit:
            await self._refuse(path, scope, receive, send)
            return
        received = 0

        async def counted() -> Message:
            nonlocal received
            message = await receive()
            if message["type"] == "http.request":
                received += len(message.get("body", b""))
                if received > self._limit:  # frameworks let this kind pass, and answer with it
                    raise HTTPException(413, self._text)
            return message

        await self._app(scope, counted, send)

    async def _refuse(self, path: str, scope: Scope, receive: Receive, send: Send) -> None:
        problem = problem_of(HTTPException(413, self._text))
        await self._shape_of(path)(problem)(scope, receive, send)
