"""The OpenAPI document: what FastAPI makes of the routes, with the errors that we really give."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from starlette.types import ASGIApp, Receive, Scope, Send

import modelpack
from modelpack.http.listener import GRACE, AppServer
from modelpack_server.api import anthropic, management, model_runner, ollama, openai, page, system
from modelpack_server.api import errors as problems
from modelpack_server.api import traces as cancellation
from modelpack_server.api.anthropic import errors as anthropic_errors
from modelpack_server.api.bodies import MAX_BODY_BYTES, BodyLimit
from modelpack_server.api.errors import Failures, Shape
from modelpack_server.api.system import LogBuffer
from modelpack_server.api.traces import EngineTraces
from modelpack_server.gateway.caller import caller_of
from modelpack_server.gateway.protection import CanonicalPath
from modelpack_server.pool.names import acting_for
from modelpack_server.pool.pool import ModelPool

_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}


@dataclass(frozen=True, slots=True)
class Errors:
    """What errors look like: on which paths, the schema, its name and the type of the body."""

    fits: Callable[[str], bool]
    name: str
    schema: Mapping[str, Any]
    media_type: str = "application/json"


_OPENAI = Errors(lambda path: True, "Error", _ERROR)


def describe(app: FastAPI, families: Sequence[Errors] = ()) -> None:
    """Have `app` show the document without FastAPI's own 422, which is a 400 here.

    `families` are those whose errors look different from OpenAI's.
    """
    make = app.openapi

    def openapi() -> dict[str, Any]:
        made = app.openapi_schema is not None
        document = make()
        if made:
            return document
        parts = document.setdefault("components", {}).setdefault("schemas", {})
        for name in ("HTTPValidationError", "ValidationError"):
            parts.pop(name, None)
        parts |= {errors.name: errors.schema for errors in (*families, _OPENAI)}
        for path, operations in document["paths"].items():
            errors = next(errors for errors in (*families, _OPENAI) if errors.fits(path))
            schema = {"$ref": f"#/components/schemas/{errors.name}"}
            for operation in operations.values():
                if operation["responses"].pop("422", None) is not None:
                    content = {errors.media_type: {"schema": schema}}
                    refused = {"description": "The request is wrong", "content": content}
                    operation["responses"]["400"] = refused
        return document

    app.openapi = openapi  # type: ignore[method-assign]


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


# Families whose errors look different: (whether a path is theirs, what their errors look like).
_SHAPES: Sequence[tuple[Callable[[str], bool], Shape]] = (
    (model_runner.is_ours, model_runner.text_shape),
    (ollama.is_ours, ollama.shape),
    (anthropic_errors.is_ours, anthropic_errors.anthropic_shape),
)

# Where models are sent: as large as they are.
_UPLOADS = ("/models/load", "/api/blobs/")
# Those whose records GET /logs shows.
_LOGGERS = ("modelpack", "modelpack_engine", "modelpack_server")


def create_app(
    pool: ModelPool,
    *,
    max_body_bytes: int = MAX_BODY_BYTES,
    request_templates: bool = False,
    share_prefix_cache: bool = False,
) -> FastAPI:
    """Return the application over `pool`, which it starts and closes (ASGI's lifespan protocol).

    `request_templates` lets admins send chat templates with their requests. With
    `share_prefix_cache`, prompts of all API keys share prefixes in the KV cache.
    """
    logs = LogBuffer()
    running = cancellation.RunningRequests()
    records = model_runner.Records()

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        loggers = [logging.getLogger(name) for name in _LOGGERS]
        for logger in loggers:
            logger.addHandler(logs)
        await pool.start()
        try:
            yield
        finally:
            await pool.close()
            for logger in loggers:
                logger.removeHandler(logs)

    app = FastAPI(
        title="Modelpack", version=modelpack.__version__, lifespan=lifespan,
        docs_url="/docs", openapi_url="/openapi.json", redirect_slashes=False,
    )  # fmt: skip
    problems.install(app, _SHAPES)

    app.add_api_route("/", page.root, methods=["GET", "HEAD"], include_in_schema=False)

    app.include_router(system.router(pool, logs))
    app.include_router(management.router(pool))
    app.include_router(cancellation.router(running))
    app.include_router(anthropic.router(pool))
    app.include_router(openai.router(pool))
    app.include_router(ollama.router(pool, request_templates=request_templates))
    app.include_router(model_runner.router(pool, records))

    describe(
        app,
        [
            Errors(anthropic_errors.is_ours, "AnthropicError", anthropic_errors.ERROR_SCHEMA),
            Errors(ollama.is_ours, "OllamaError", ollama.ERROR_SCHEMA),
            Errors(model_runner.is_ours, "TextError", {"type": "string"}, "text/plain"),
        ],
    )
    app.add_middleware(
        BodyLimit,
        limit=max_body_bytes,
        shape_of=lambda path: problems.shape_of(path, _SHAPES),
        is_unlimited=lambda path: path.startswith(_UPLOADS),
    )
    app.add_middleware(EngineTraces, running=running, share_prefix_cache=share_prefix_cache)
    app.add_middleware(model_runner.Recording, pool=pool, records=records)
    app.add_middleware(CanonicalPath)
    app.add_middleware(Callers)
    # The last is the outermost: whatever fails below is an answer.
    app.add_middleware(
        Failures, respond=lambda request, error: problems.respond(request, error, _SHAPES)
    )
    return app


class ModelServer(AppServer):
    """Serves a pool.

    The socket answers while models are loaded: /health says 503 until those that are pinned are.
    `wrap` puts an application before this one; bodies larger than `max_body_bytes` are refused.
    `request_templates` lets admins send chat templates with their requests.
    `share_prefix_cache`: prompts of all API keys share prefixes in the KV cache.
    """

    def __init__(
        self,
        make_pool: Callable[[], ModelPool],
        *,
        address: str = "127.0.0.1:12434",
        allow_remote: bool = False,
        grace: int = GRACE,
        max_body_bytes: int = MAX_BODY_BYTES,
        request_templates: bool = False,
        share_prefix_cache: bool = False,
        wrap: Callable[[ASGIApp], ASGIApp] = lambda app: app,
        tls: tuple[Path, Path] | None = None,
    ) -> None:
        """Raises `UsageError` for an address that is none, or not loopback unless allowed."""
        super().__init__(
            lambda: wrap(
                create_app(
                    make_pool(),
                    max_body_bytes=max_body_bytes,
                    request_templates=request_templates,
                    share_prefix_cache=share_prefix_cache,
                )
            ),
            address,
            name="model server",
            allow_remote=allow_remote,
            grace=grace,
            lifespan=True,
            tls=tls,
        )
