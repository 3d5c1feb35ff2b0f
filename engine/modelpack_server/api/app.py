"""The ASGI application of all HTTP APIs, and the server that runs it.

`gateway.protect` adds API keys, limits on bodies and host checks: pass it as `wrap`.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Callable, Collection
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request, Response
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

import modelpack
from modelpack.http.listener import GRACE, LOGGERS, ON_STOP, AppServer
from modelpack_server.api import anthropic, console, model_runner, ollama, openai, page, system
from modelpack_server.api import traces as cancellation
from modelpack_server.api.errors import Failures, Problem, install, respond
from modelpack_server.api.media_urls import MediaUrls
from modelpack_server.api.openai.batch_runner import BatchRunner
from modelpack_server.api.openai.responses import BackgroundResponses
from modelpack_server.api.openai.stored_files import StoredFiles
from modelpack_server.api.page.reference import add_reference
from modelpack_server.api.system import LogBuffer
from modelpack_server.api.traces import EngineTraces
from modelpack_server.gateway.caller import caller_of, entry_of
from modelpack_server.gateway.families import ERROR_SCHEMAS, family_in, family_of
from modelpack_server.gateway.protection import CanonicalPath, Protection, protect
from modelpack_server.pool.names import acting_for
from modelpack_server.pool.pool import ModelPool


def _error_response(request: Request, problem: Problem) -> Response:
    """Return the response to a failed request in the shape of its API."""
    if model_runner.is_ours(request.url.path):
        return model_runner.text_response(problem)
    return problem.response(family_in(request.scope))


def describe_errors(app: FastAPI) -> None:
    """Make the OpenAPI document show the errors of each API instead of FastAPI's own 422."""
    make = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is not None:
            return app.openapi_schema
        document = make()
        schemas = document.setdefault("components", {}).setdefault("schemas", {})
        for name in ("HTTPValidationError", "ValidationError"):
            schemas.pop(name, None)
        schemas |= {"TextError": {"type": "string"}, **dict(ERROR_SCHEMAS.values())}
        for path, operations in document["paths"].items():
            name, media_type = ERROR_SCHEMAS[family_of(path, Headers())][0], "application/json"
            if model_runner.is_ours(path):
                name, media_type = "TextError", "text/plain"
            schema = {"$ref": f"#/components/schemas/{name}"}
            for operation in operations.values():
                if operation["responses"].pop("422", None) is not None:
                    content = {media_type: {"schema": schema}}
                    refused = {"description": "The request is invalid", "content": content}
                    operation["responses"]["400"] = refused
        return document

    app.openapi = openapi  # type: ignore[method-assign]


class Callers:
    """ASGI middleware that limits the pool's view to the models that the API key may use.

    At the start it tells `batches` where their requests enter.
    """

    def __init__(self, app: ASGIApp, batches: BatchRunner) -> None:
        self._app = app
        self._batches = batches

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            self._batches.enter(entry_of(scope), unprotected=scope["app"])
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        with acting_for(caller_of(scope)):
            await self._app(scope, receive, send)


def create_app(
    pool: ModelPool,
    *,
    request_templates: bool = False,
    share_prefix_cache: bool = False,
    show_content: bool = False,
    media_hosts: Collection[str] = (),
    state: Path | None = None,
) -> FastAPI:
    """Return the application over `pool`, which it starts and closes (ASGI's lifespan protocol).

    `request_templates` lets admins send chat templates with their requests. With
    `share_prefix_cache`, prompts of all API keys share prefixes in the KV cache. `show_content`
    shows admins the prompts and replies of all API keys. Files in URLs are fetched from
    `media_hosts` (`host` or `host:port`). `state` is the directory of uploaded files
    and batches; None: a temporary one. The requests of batches go through `protect`, if it wraps
    the application. Raises `UsageError` for an invalid host.
    """
    logs = LogBuffer()
    running = cancellation.RunningRequests()
    records = model_runner.Records()
    history = console.RequestHistory()
    background = BackgroundResponses()
    batches = BatchRunner(StoredFiles(state))

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[dict[str, Any]]:
        loggers = [logging.getLogger(name) for name in LOGGERS]
        for logger in loggers:
            logger.addHandler(logs)
        await pool.start()
        await batches.start()

        def begin_to_stop() -> None:
            background.close()
            batches.interrupt()

        try:
            yield {ON_STOP: begin_to_stop}
        finally:
            await batches.stop()
            await pool.close()
            for logger in loggers:
                logger.removeHandler(logs)

    app = FastAPI(
        title="Modelpack", version=modelpack.__version__, lifespan=lifespan,
        docs_url=None, redoc_url=None, openapi_url="/openapi.json", redirect_slashes=False,
    )  # fmt: skip
    install(app, _error_response)

    app.add_api_route("/", page.root, methods=["GET", "HEAD"], include_in_schema=False)
    add_reference(app)

    for part in (
        system.router(pool, logs),
        system.pool_router(pool),
        console.router(pool, history, records, show_content=show_content),
        cancellation.router(running),
        anthropic.router(pool),
        openai.router(pool, background, batches),
        ollama.router(pool, request_templates=request_templates),
        model_runner.router(pool, records),
    ):
        # `include_router` would build each route again, at the first request.
        app.routes.extend(part.routes)

    describe_errors(app)
    app.add_middleware(
        EngineTraces, running=running, history=history, share_prefix_cache=share_prefix_cache,
        media_urls=MediaUrls(media_hosts) if media_hosts else None,
    )  # fmt: skip
    app.add_middleware(model_runner.Recording, pool=pool, records=records)
    app.add_middleware(CanonicalPath)
    app.add_middleware(Callers, batches=batches)
    # The middleware added last is the outermost: it turns every exception into a response.
    app.add_middleware(
        Failures, respond=lambda request, error: respond(request, error, _error_response)
    )
    return app


class ModelServer(AppServer):
    """An HTTP server for a pool.

    It accepts requests while models are loading: /health returns 503 until the pinned models are
    loaded. `wrap` wraps the application in middleware; the default is `protect` without keys,
    which limits request bodies, and a replacement must limit them too. `create_app` describes
    `request_templates`, `share_prefix_cache`, `show_content`, `media_hosts` and `state`.
    """

    def __init__(
        self,
        make_pool: Callable[[], ModelPool],
        *,
        address: str = "127.0.0.1:12434",
        allow_remote: bool = False,
        grace: int = GRACE,
        drain: int = 0,
        request_templates: bool = False,
        share_prefix_cache: bool = False,
        show_content: bool = False,
        media_hosts: Collection[str] = (),
        state: Path | None = None,
        wrap: Callable[[ASGIApp], ASGIApp] = lambda app: protect(app, Protection()),
        tls: tuple[Path, Path] | None = None,
    ) -> None:
        """Raises `UsageError` for an invalid address, or one beyond loopback unless allowed."""

        def make() -> ASGIApp:
            app = create_app(
                make_pool(), request_templates=request_templates,
                share_prefix_cache=share_prefix_cache, show_content=show_content,
                media_hosts=media_hosts, state=state,
            )  # fmt: skip
            return wrap(app)

        super().__init__(
            make, address, name="model server",
            allow_remote=allow_remote, grace=grace, drain=drain, lifespan=True, tls=tls,
        )  # fmt: skip
