"""Route prefixes of the OpenAI and Anthropic APIs: each route exists under several paths.

Source of the prefixes: Docker Model Runner serves `/v1`, `/engines/v1` and `/engines/{backend}/v1`;
mlx-lm's server has no prefix.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from fastapi import APIRouter, Depends
from starlette.exceptions import HTTPException

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
    places = ["/v1", "/engines/v1", *prefixes, *([""] if bare else []), "/engines/{backend}/v1"]
    for place in places:
        router.add_api_route(
            place + tail,
            endpoint,
            methods=list(methods),
            response_model=None,
            include_in_schema=place == "/v1",
            openapi_extra=extra,
            dependencies=[Depends(check_backend)] if "{backend}" in place else None,
        )
