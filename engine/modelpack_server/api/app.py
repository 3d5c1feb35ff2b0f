"""The application: all APIs over one pool of models."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager

from fastapi import FastAPI

import modelpack
from modelpack_server.api import (
    anthropic,
    cancelling,
    management,
    ollama,
    openai,
    page,
    problems,
    runner,
    system,
)
from modelpack_server.api.anthropic import errors as anthropic_errors
from modelpack_server.api.bodies import MAX_BODY_BYTES, BodyLimit
from modelpack_server.api.callers import Callers
from modelpack_server.api.failures import Failures
from modelpack_server.api.logs import LogBuffer
from modelpack_server.api.problems import Shape
from modelpack_server.api.schema import Errors, describe
from modelpack_server.api.traces import EngineTraces
from modelpack_server.gateway.paths import CanonicalPath
from modelpack_server.pool.pool import ModelPool

# Families whose errors look different: (whether a path is theirs, what their errors look like).
_SHAPES: Sequence[tuple[Callable[[str], bool], Shape]] = (
    (runner.is_ours, runner.text_shape),
    (ollama.is_ours, ollama.shape),
    (anthropic_errors.is_ours, anthropic_errors.anthropic_shape),
)

# Where models are sent: as large as they are.
_UPLOADS = ("/models/load", "/api/blobs/")


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
    running = cancelling.RunningRequests()
    records = runner.Records()

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        loggers = [logging.getLogger(name) for name in ("modelpack", "modelpack_engine")]
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
    app.include_router(cancelling.router(running))
    app.include_router(anthropic.router(pool))
    app.include_router(openai.router(pool))
    app.include_router(ollama.router(pool, request_templates=request_templates))
    app.include_router(runner.router(pool, records))

    describe(
        app,
        [
            Errors(anthropic_errors.is_ours, "AnthropicError", anthropic_errors.ERROR_SCHEMA),
            Errors(ollama.is_ours, "OllamaError", ollama.ERROR_SCHEMA),
            Errors(runner.is_ours, "TextError", {"type": "string"}, "text/plain"),
        ],
    )
    app.add_middleware(
        BodyLimit,
        limit=max_body_bytes,
        shape_of=lambda path: problems.shape_of(path, _SHAPES),
        is_unlimited=lambda path: path.startswith(_UPLOADS),
    )
    app.add_middleware(EngineTraces, running=running, share_prefix_cache=share_prefix_cache)
    app.add_middleware(runner.Recording, pool=pool, records=records)
    app.add_middleware(CanonicalPath)
    app.add_middleware(Callers)
    # The last is the outermost: whatever fails below is an answer.
    app.add_middleware(
        Failures, respond=lambda request, error: problems.respond(request, error, _SHAPES)
    )
    return app
