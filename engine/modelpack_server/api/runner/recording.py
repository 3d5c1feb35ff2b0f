"""Recording: requests for text are kept as they pass, a few of each model and not for long."""

from __future__ import annotations

import asyncio
import json
import re
import time
from contextlib import suppress
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from modelpack.errors import ModelpackError
from modelpack_server.api.runner.joining import without_media
from modelpack_server.api.runner.records import Record, Records
from modelpack_server.gateway.caller import caller_of
from modelpack_server.gateway.json_bodies import BodyError, document_in, in_worker, parse
from modelpack_server.pool.pool import ModelPool

_PATHS = re.compile(
    r".*/(?:v1/(?:chat/completions|completions|embeddings|messages)|responses|rerank|score"
    r"|api/(?:chat|generate|embed|embeddings))\Z"
)
# Characters of a request or a reply that are kept.
_KEPT = 256 * 1024
_ORIGINS = (("/messages", "anthropic/messages"), ("/api/", "ollama/completion"))


class Recording:
    """ASGI middleware: puts requests for text into `records`, with what was answered."""

    def __init__(self, app: ASGIApp, *, pool: ModelPool, records: Records) -> None:
        self._app = app
        self._pool = pool
        self._records = records

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST" or not _PATHS.match(scope["path"]):
            await self._app(scope, receive, send)
            return
        asked: list[bytes] = []
        said: list[bytes] = []
        room = _KEPT
        status = 0
        headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
        began = time.time()

        async def listen() -> Message:
            message = await receive()
            if message["type"] == "http.request":
                asked.append(message.get("body", b""))
            return message

        async def tell(message: Message) -> None:
            nonlocal room, status
            if message["type"] == "http.response.start":
                status = message["status"]
            elif room > 0 and (body := message.get("body")):
                said.append(body)
                room -= len(body)
            await send(message)

        try:
            await self._app(scope, listen, tell)
        finally:
            if b"x-preload-only" not in headers:
                await self._keep(scope, headers, b"".join(asked), b"".join(said), status, began)

    async def _keep(
        self,
        scope: Scope,
        headers: dict[bytes, str],
        asked: bytes,
        said: bytes,
        status: int,
        began: float,
    ) -> None:
        document = document_in(scope)
        if document is None and len(asked) <= _KEPT:
            with suppress(BodyError):
                document = (await in_worker(len(asked), lambda: parse(asked))).value
        name = document.get("model") if isinstance(document, dict) else None
        name = name if isinstance(name, str) else ""
        request, response, error = await asyncio.to_thread(_read, asked, document, said, status)
        try:
            key = (await self._pool.find(name)).key
        except ModelpackError:
            return
        path = scope["path"]
        self._records.add(
            Record(
                id=f"{key}_{int(began * 1e9)}",
                key=key,
                model=name,
                method=scope["method"],
                url=path,
                request=request,
                response=response,
                error=error,
                timestamp=int(began),
                status_code=status or 408,  # the client left before there was one
                user_agent=headers.get(b"user-agent", ""),
                origin=next((origin for part, origin in _ORIGINS if part in path), ""),
                owner=caller_of(scope).owner,
            )
        )


def _read(asked: bytes, document: Any, said: bytes, status: int) -> tuple[str, str, str]:
    """Return the request, the reply as it was sent and the error.

    A large request is cut, and kept with the media in it: to write it again takes long.
    """
    if len(asked) > _KEPT:
        text = asked[:_KEPT].decode(errors="replace")
    else:
        text = json.dumps(without_media(document), ensure_ascii=False)[:_KEPT]
    reply = said.decode(errors="replace")[:_KEPT]
    if status >= 400:
        return text, "", _as_json(reply)
    return text, reply, ""


def _as_json(error: str) -> str:
    try:
        json.loads(error)
    except ValueError:
        return json.dumps({"error": error})
    return error
