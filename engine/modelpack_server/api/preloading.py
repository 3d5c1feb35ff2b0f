"""X-Preload-Only: a request that has its model loaded and wants no answer.

Source: Docker Model Runner (pkg/inference/scheduling/http_handler.go); its command line sends it
with an empty list of messages.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request, Response

from modelpack_engine.errors import RequestError
from modelpack_server.api.json_bodies import BodyRoute, read_json
from modelpack_server.pool.pool import ModelPool

_HEADER = "x-preload-only"


def preloadable(pool: ModelPool) -> type[BodyRoute]:
    """Return a class of routes that look for the header before anything else."""

    class PreloadRoute(BodyRoute):
        def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
            answer = super().get_route_handler()

            async def handle(request: Request) -> Response:
                if request.headers.get(_HEADER, "").lower() != "true":
                    return await answer(request)
                await pool.preload(await _model_named(request))
                return Response(status_code=200)

            return handle

    return PreloadRoute


async def _model_named(request: Request) -> str:
    body = await read_json(request)
    name = body.get("model") if isinstance(body, dict) else None
    if not isinstance(name, str) or not name:
        raise RequestError("model is missing", param="model")
    return name
