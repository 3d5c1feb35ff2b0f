"""Common parts of Ollama's routes: newline-delimited JSON, timestamps, model names."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from datetime import UTC, datetime
from typing import Any

from fastapi import Request, Response

from modelpack.errors import NotFoundError
from modelpack_server.api.bodies import BodyRoute
from modelpack_server.api.errors import problem_of
from modelpack_server.api.sse import dumps
from modelpack_server.gateway.families import Family
from modelpack_server.pool.catalogue import StoredModel
from modelpack_server.pool.pool import ModelPool

MEDIA_TYPE = "application/x-ndjson"


def line(value: Any) -> str:
    return dumps(value) + "\n"


def error_line(error: Exception) -> str:
    """Return the last line of a stream that failed."""
    return line(problem_of(error).body(Family.OLLAMA))


def now() -> str:
    """Return the current time in UTC as RFC 3339."""
    return timestamp(datetime.now(UTC))


def timestamp(time: datetime) -> str:
    """Return a time in UTC as RFC 3339."""
    return time.isoformat().replace("+00:00", "Z")


class JsonRoute(BodyRoute):
    """A route that parses bodies as JSON regardless of Content-Type: `curl -d` declares a form.

    Web pages can send such bodies without a CORS preflight, but `Origin` has been checked before.
    """

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        answer = super().get_route_handler()

        async def handle(request: Request) -> Response:
            headers = [pair for pair in request.scope["headers"] if pair[0] != b"content-type"]
            headers.append((b"content-type", b"application/json"))
            return await answer(Request({**request.scope, "headers": headers}, request.receive))

        return handle


def shown(name: str) -> str:
    """Return a name with its tag, `latest` by default."""
    has_tag = "@" in name or ":" in name.rpartition("/")[2]
    return name if has_tag else f"{name}:latest"


def missing(name: str) -> NotFoundError:
    """Return the error for a missing model, with the text that clients search for."""
    return NotFoundError(f"model '{name}' not found", hint="pull it first")


async def find(pool: ModelPool, name: str) -> StoredModel:
    """Return the stored model with this name; raise `NotFoundError`."""
    try:
        return await pool.find(name)
    except NotFoundError:
        raise missing(name) from None
