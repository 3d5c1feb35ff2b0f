"""X-Preload-Only: a request that has its model loaded and wants no answer.

Source: Docker Model Runner (pkg/inference/scheduling/http_handler.go); its command line sends it
with an empty list of messages.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute

from modelpack_engine.errors import RequestError
from modelpack_engine.pool.pool import ModelPool

_HEADER = "x-preload-only"


def preloadable(pool: ModelPool) -> type[APIRoute]:
    """Return a class of routes that look for the header before anything else."""

    class PreloadRoute(APIRoute):
        def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
            answer = super().get_route_handler()

            async def handle(request: Request) -> Response:
                if request.headers.get(_HEADER, "").lower() != "true":
                    return await answer(request)
                await pool.preload(_model_named(await request.body()))
                return Response(status_code=200)

            return handle

    return PreloadRoute


def _model_named(raw: bytes) -> str:
    try:
        body = json.loads(raw)
    except ValueError as error:
        raise RequestValidationError(
            [{"loc": ("body",), "msg": f"JSON decode error: {error}", "type": "json_invalid"}]
        ) from error
    name = body.get("model") if isinstance(body, dict) else None
    if not isinstance(name, str) or not name:
        raise RequestError("model is missing", param="model")
    return name
