"""The routes below /engines: which models are loaded, and how they are configured.

Source: Docker Model Runner, pkg/inference/scheduling.
"""

from __future__ import annotations

import asyncio
import logging
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query, Request, Response
from pydantic import StrictBool, StrictStr

import modelpack
from modelpack.errors import ModelpackError, NotFoundError
from modelpack.store.filesystem import bytes_used
from modelpack_engine.errors import BusyError, RequestError
from modelpack_server.api.bodies import Body
from modelpack_server.api.model_runner.answers import TextRoute, documented, read_body
from modelpack_server.api.model_runner.names import find_stored, name_shown
from modelpack_server.api.model_runner.settings import ConfigureRequest, config_shown
from modelpack_server.api.paths import check_backend
from modelpack_server.pool.entry import ModelState, RunningModel
from modelpack_server.pool.pool import ModelPool
from modelpack_server.pool.settings import ModelSettings, show_keep_alive

_log = logging.getLogger(__name__)

#: What the one engine is called as a backend.
BACKEND = "modelpack"
_NEVER = "0001-01-01T00:00:00Z"


class UnloadRequest(Body):
    """The body of POST /engines/unload; no backend is any."""

    all: StrictBool = False
    backend: StrictStr = ""
    models: list[StrictStr] | None = None


class BackendRequest(Body):
    """The body of POST /engines/install-backend and uninstall-backend."""

    backend: StrictStr = ""
    version: StrictStr = ""


def router(pool: ModelPool) -> APIRouter:
    """Return the routes."""
    routes = APIRouter(prefix="/engines", tags=["Docker Model Runner"], route_class=TextRoute)
    preloads: set[asyncio.Task[None]] = set()

    @routes.get("/status")
    async def status() -> dict[str, str]:
        """Say of each backend whether it runs."""
        return {BACKEND: f"Running: modelpack {modelpack.__version__}"}

    @routes.get("/ps")
    async def running() -> list[dict[str, Any]]:
        """List the models that are loaded or being loaded."""
        now = pool.clock()
        return [_shown(m, now) for m in pool.running() if m.state is not ModelState.UNLOADING]

    @routes.get("/df")
    async def disk_usage() -> dict[str, int]:
        """Return the bytes that the store takes; the engine keeps nothing beside the program."""
        size = await asyncio.to_thread(bytes_used, pool.catalogue.store.root)
        return {"models_disk_usage": size, "default_backend_disk_usage": 0}

    @routes.post("/unload", openapi_extra=documented(UnloadRequest))
    async def unload(request: Request) -> dict[str, int]:
        """Unload models that nobody uses; names that mean nothing count as not loaded."""
        body = await read_body(request, UnloadRequest)
        if body.backend:
            check_backend(body.backend)
        if body.all:
            return {"unloaded_runners": len(await pool.unload(idle_only=True))}
        keys = [key for name in body.models or () if (key := await _key(pool, name))]
        return {"unloaded_runners": len(await pool.unload(set(keys), idle_only=True))}

    async def configure(request: Request) -> Response:
        """Set a model up, and begin to load it; 409 while it is in use with other settings."""
        body = await read_body(request, ConfigureRequest)
        settings = body.settings()
        key = await _key(pool, body.model)
        if key is None:
            raise NotFoundError(f"no such model: {body.model!r}")
        try:
            await _configure(pool, key, settings)
        except BusyError as error:
            raise BusyError(f"runner already active: {error}") from error
        task = asyncio.create_task(_preload(pool, key))
        preloads.add(task)
        task.add_done_callback(preloads.discard)
        return Response(status_code=202)

    how: dict[str, Any] = {
        "methods": ["POST"], "response_model": None, "status_code": 202,
        "openapi_extra": documented(ConfigureRequest),
    }  # fmt: skip
    routes.add_api_route("/_configure", configure, **how)
    routes.add_api_route(
        "/{backend}/_configure", configure, **how,
        include_in_schema=False, dependencies=[Depends(check_backend)],
    )  # fmt: skip

    @routes.get("/_configure")
    async def configured(model: Annotated[str, Query()] = "") -> list[dict[str, Any]]:
        """Return how models were set up: all, or `model`."""
        key = await _key(pool, model) if model else None
        stored = {found.key: found for found in await pool.stored()}
        return [
            {
                "Backend": BACKEND,
                "Model": name_shown(stored[own].names[0]) if stored[own].names else "",
                "ModelID": own,
                "Mode": settings.mode,
                "Config": config_shown(settings),
            }
            for own, settings in pool.configured().items()
            if own in stored and (not model or own == key)
        ]

    @routes.post("/install-backend", response_model=None,
                 openapi_extra=documented(BackendRequest))  # fmt: skip
    async def install(request: Request) -> Response:
        """Do nothing: the engine is part of this program. 404 for another backend."""
        await _named_backend(request)
        return Response()

    @routes.post("/uninstall-backend", response_model=None,
                 openapi_extra=documented(BackendRequest))  # fmt: skip
    async def uninstall(request: Request) -> Response:
        """Unload the models that nobody uses; the engine itself is part of this program."""
        await _named_backend(request)
        await pool.unload(idle_only=True)
        return Response()

    return routes


async def _named_backend(request: Request) -> None:
    body = await read_body(request, BackendRequest)
    if not body.backend:
        raise RequestError("invalid request: backend is required", param="backend")
    check_backend(body.backend)


async def _key(pool: ModelPool, name: str) -> str | None:
    """Return the id of the model that a client calls `name`, None if there is none."""
    try:
        return (await pool.find(name)).key
    except NotFoundError:
        pass
    try:
        _, found = await asyncio.to_thread(find_stored, pool.catalogue.store, name)
    except NotFoundError:
        return None
    return str(found.digest)


async def _configure(pool: ModelPool, key: str, settings: ModelSettings) -> None:
    """Set a model up; while it is only being loaded, wait: that is nobody's use of it yet."""
    try:
        await pool.configure(key, settings)
    except BusyError:
        loading = {m.stored.key for m in pool.running() if m.state is ModelState.LOADING}
        if key not in loading:
            raise
        with suppress(ModelpackError):
            await pool.preload(key)
        await pool.configure(key, settings)


async def _preload(pool: ModelPool, key: str) -> None:
    try:
        await pool.preload(key)
    except Exception as error:  # noqa: BLE001 - nobody waits for it; whoever asks next is told
        _log.warning("the model %s could not be loaded ahead: %s", key, error)


def _shown(model: RunningModel, clock: float) -> dict[str, Any]:
    used = model.last_used
    shown: dict[str, Any] = {
        "backend_name": BACKEND,
        "model_name": name_shown(model.name),
        "mode": model.settings.mode,
        "last_used": _NEVER if used is None else _time(used - clock),
    }
    if model.users:
        shown["in_use"] = True
    if model.state is ModelState.LOADING:
        shown["loading"] = True
    return shown | {"keep_alive": show_keep_alive(model.keep_alive)}


def _time(seconds: float) -> str:
    when = datetime.now(UTC) + timedelta(seconds=seconds)
    return when.isoformat(timespec="microseconds").replace("+00:00", "Z")
