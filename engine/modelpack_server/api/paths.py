"""Route prefixes of the OpenAI and Anthropic APIs: each route exists under several paths.

Source of the prefixes: Docker Model Runner serves `/v1`, `/engines/v1` and `/engines/{backend}/v1`;
mlx-lm's server has no prefix.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

from fastapi import APIRouter
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.routing import compile_path
from starlette.types import Receive, Scope, Send

#: The accepted backends in `/engines/{backend}/…`; all of them mean the one engine.
BACKENDS = ("llama.cpp", "vllm", "mlx", "modelpack")


def check_backend(backend: str) -> None:
    """Raise a 404 for a backend that does not exist."""
    if backend not in BACKENDS:
        raise HTTPException(404, f"backend not found: {backend!r}")


def add_route(
    router: APIRouter,
    tail: str,
    endpoint: Callable[..., Any],
    *,
    methods: Sequence[str] = ("POST",),
    bare: bool = False,
    prefixes: Sequence[str] = (),
    extra: dict[str, Any] | None = None,
) -> None:
    """Add the route `/v1` + `tail` and its aliases; `bare` adds one without a prefix.

    `prefixes` are additional prefixes. The OpenAPI document has only the `/v1` route, with the
    fields of `extra`.
    """
    router.add_api_route(
        f"/v1{tail}", endpoint, methods=list(methods), response_model=None, openapi_extra=extra
    )
    route = router.routes[-1]
    assert isinstance(route, APIRoute)
    aliases = ["/engines/v1", *prefixes, *([""] if bare else []), "/engines/{backend}/v1"]
    router.routes.extend(_alias(route, prefix, tail) for prefix in aliases)


def _alias(route: APIRoute, prefix: str, tail: str) -> APIRoute:
    """Return a route of another path with the same handler, which FastAPI takes long to build."""
    alias = copy.copy(route)
    alias.path, alias.include_in_schema = prefix + tail, False
    alias.path_regex, alias.path_format, alias.param_convertors = compile_path(alias.path)
    if "{backend}" in prefix:
        handle = route.app

        async def checked(scope: Scope, receive: Receive, send: Send) -> None:
            check_backend(scope["path_params"]["backend"])
            await handle(scope, receive, send)

        alias.app = checked
    return alias
