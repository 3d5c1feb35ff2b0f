"""Server-sent events, and streamed responses that end when the client disconnects."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, Callable
from contextlib import AsyncExitStack
from typing import Any

from starlette.background import BackgroundTask
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from modelpack.errors import ModelpackError
from modelpack_server.api.errors import problem_of
from modelpack_server.gateway.families import Family

DONE = "data: [DONE]\n\n"

# The seconds without an event after which the server sends a comment.
_PATIENCE = 15.0

_log = logging.getLogger(__name__)


def dumps(value: Any) -> str:
    """Return a value as compact JSON."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def event(value: Any, name: str = "", write: Callable[[Any], str] = dumps) -> str:
    """Return one event, named if `name` is given; `write` encodes the value as JSON."""
    head = f"event: {name}\n" if name else ""
    return f"{head}data: {write(value)}\n\n"


def error_event(family: Family) -> Callable[[Exception], str]:
    """Return the function that makes the last event of a failed stream in the shape of `family`."""
    name = "error" if family is Family.ANTHROPIC else ""
    return lambda error: event(problem_of(error).body(family), name)


openai_error = error_event(Family.OPENAI)


class LiveStream(Response):
    """A streamed response; closes `opened` at its end.

    If the client disconnects, the stream is cancelled. `failure` formats an error as the last
    event, since the status has been sent. `background` runs after the stream.
    """

    def __init__(
        self,
        pieces: AsyncGenerator[str, None],
        opened: AsyncExitStack,
        *,
        media_type: str = "text/event-stream",
        failure: Callable[[Exception], str] = openai_error,
        background: BackgroundTask | None = None,
    ) -> None:
        self.status_code = 200
        self.media_type = media_type
        self.background = background
        self.init_headers({"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        self._pieces = pieces
        self._opened = opened
        self._failure = failure
        self._sent = 0

    def init_headers(self, headers: Any = None) -> None:
        """Set the headers, without a length."""
        self.body = b""
        super().init_headers(headers)
        self.raw_headers = [h for h in self.raw_headers if h[0] != b"content-length"]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        writer = asyncio.ensure_future(self._write(send))
        watcher = asyncio.ensure_future(gone(receive))
        beats = asyncio.ensure_future(self._keep_alive(send))
        try:
            await asyncio.wait({writer, watcher}, return_when=asyncio.FIRST_COMPLETED)
            if writer.done():
                writer.result()
        finally:
            for task in (writer, watcher, beats):
                task.cancel()
            await asyncio.gather(writer, watcher, beats, return_exceptions=True)
            await self._pieces.aclose()
            await self._opened.aclose()
        if self.background is not None:
            await self.background()

    async def _keep_alive(self, send: Send) -> None:
        """Send a comment after each long pause: a prompt may take long, and proxies close idle
        connections.
        """
        while self.media_type == "text/event-stream":
            before = self._sent
            await asyncio.sleep(_PATIENCE)
            if 0 < self._sent == before:
                beat = b": keepalive\n\n"
                await send({"type": "http.response.body", "body": beat, "more_body": True})

    async def _write(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        self._sent, last = 1, ""
        try:
            async for piece in self._pieces:
                self._sent += 1
                await send(
                    {"type": "http.response.body", "body": piece.encode(), "more_body": True}
                )
        except ModelpackError as error:
            last = self._failure(error)
        except OSError:
            raise  # an error of the connection
        except Exception as error:  # noqa: BLE001 - report every error to the client
            _log.exception("a stream failed")
            last = self._failure(error)
        await send({"type": "http.response.body", "body": last.encode(), "more_body": False})


async def gone(receive: Receive) -> None:
    """Return when the client has disconnected."""
    while (await receive())["type"] != "http.disconnect":
        pass
