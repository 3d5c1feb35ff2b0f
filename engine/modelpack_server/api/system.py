"""The operator's routes: /health, /version, /logs, and /pool to list, unload and configure."""

from __future__ import annotations

import asyncio
import logging
import math
from collections import deque
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse, PlainTextResponse
from pydantic import ConfigDict, Field, StrictBool, StrictStr

import modelpack
from modelpack_engine.errors import RequestError
from modelpack_server.api.bodies import Body, BodyRoute
from modelpack_server.api.errors import Problem
from modelpack_server.api.metrics import add_metrics
from modelpack_server.api.sse import LiveStream
from modelpack_server.pool.entry import RunningModel
from modelpack_server.pool.pool import ModelPool
from modelpack_server.pool.settings import ModelSettings, parse_keep_alive, show_keep_alive

_LINES = 2000
_WAITING = 10_000


class LogBuffer(logging.Handler):
    """A logging handler that keeps the last lines and passes new ones to followers."""

    def __init__(self, lines: int = _LINES) -> None:
        super().__init__()
        self.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        self._lines: deque[str] = deque(maxlen=lines)
        self._followers: dict[asyncio.Queue[str], asyncio.AbstractEventLoop] = {}

    def emit(self, record: logging.LogRecord) -> None:
        """Keep the formatted record and pass it to the followers."""
        try:
            line = self.format(record) + "\n"
        except (TypeError, ValueError):  # the arguments do not match the message
            self.handleError(record)
            return
        self._lines.append(line)
        for queue, loop in list(self._followers.items()):
            if not loop.is_closed():
                loop.call_soon_threadsafe(_put, queue, line)

    def text(self) -> str:
        """Return the kept lines."""
        return "".join(self._lines)

    async def follow(self) -> AsyncGenerator[str, None]:
        """Yield the kept lines, then each new line, without end."""
        queue: asyncio.Queue[str] = asyncio.Queue(_WAITING)
        self._followers[queue] = asyncio.get_running_loop()
        try:
            yield self.text()
            while True:
                yield await queue.get()
        finally:
            self._followers.pop(queue, None)


def _put(queue: asyncio.Queue[str], line: str) -> None:
    if not queue.full():  # a slow follower misses lines
        queue.put_nowait(line)


def router(pool: ModelPool, logs: LogBuffer) -> APIRouter:
    """Return the routes /health, /version, /metrics and /logs."""
    routes = APIRouter(tags=["server"])

    @routes.get("/health", response_model=None)
    @routes.get("/ping", response_model=None, include_in_schema=False)
    @routes.get("/v1/health", response_model=None, include_in_schema=False)
    async def health() -> Response:
        """Return 200 if all models named at start are loaded, else 503."""
        ready, why = pool.readiness()
        if ready:
            return JSONResponse({"status": "ok"})
        return Problem(503, why, code="not_ready", headers={"Retry-After": "1"}).response()

    @routes.get("/version")
    async def version() -> dict[str, str]:
        """Return the version of this program."""
        return {"version": modelpack.__version__}

    add_metrics(routes, pool)

    @routes.get("/logs", response_model=None)
    async def read_logs(request: Request) -> Response:
        """Return the last lines of the log; with `follow`, also new lines as they arrive."""
        follow = request.query_params.get("follow", "false").lower()
        if follow in ("", "1", "true"):
            return LiveStream(logs.follow(), AsyncExitStack(), media_type="text/plain")
        return PlainTextResponse(logs.text())

    return routes


class UnloadRequest(Body):
    """Which models to unload; with `wait`, running requests get some time to finish."""

    model_config = ConfigDict(extra="forbid")
    models: list[StrictStr] = []
    all: StrictBool = False
    wait: StrictBool = True


class ConfigureRequest(Body):
    """New settings of a model; missing fields have the server's defaults."""

    model_config = ConfigDict(extra="forbid")
    model: Annotated[StrictStr, Field(min_length=1)]
    context_size: Annotated[int, Field(gt=1, le=1 << 31)] | None = None
    preset: StrictStr | None = None
    runtime_flags: list[StrictStr] = []
    keep_alive: StrictStr | float | None = None


def pool_router(pool: ModelPool) -> APIRouter:
    """Return the routes below /pool."""
    routes = APIRouter(prefix="/pool", tags=["pool"], route_class=BodyRoute)

    @routes.get("")
    async def running() -> dict[str, Any]:
        """List the models that are loaded, loading or unloading."""
        now = pool.clock()
        return {"models": [_shown(model, now) for model in pool.running()], "memory": pool.memory}

    @routes.post("/unload")
    async def unload(body: UnloadRequest) -> dict[str, Any]:
        """Unload models; their running requests fail after the grace period."""
        if body.all == bool(body.models):
            raise RequestError("models or all is required", param="models")
        grace = None if body.wait else 0.0
        return {"unloaded": await pool.unload(None if body.all else body.models, grace=grace)}

    @routes.post("/configure")
    async def configure(body: ConfigureRequest) -> dict[str, Any]:
        """Configure a model, which is reloaded on its next use. 409 while it is in use."""
        kept = body.keep_alive
        settings = ModelSettings(
            context_size=body.context_size,
            preset=body.preset,
            runtime_flags=tuple(body.runtime_flags),
            keep_alive=None if kept is None else parse_keep_alive(kept),
        )
        await pool.configure(body.model, settings)
        return _settings(await pool.settings(body.model))

    return routes


def _shown(model: RunningModel, clock: float) -> dict[str, Any]:
    now = datetime.now(UTC)

    def at(time: float | None) -> str | None:
        if time is None or time == math.inf:
            return None
        return (now + timedelta(seconds=time - clock)).isoformat(timespec="seconds")

    return {
        "name": model.name,
        "names": model.stored.names,
        "digest": model.stored.key,
        "state": str(model.state),
        "users": model.users,
        "last_used": at(model.last_used),
        "expires_at": at(model.expires_at),
        "keep_alive": show_keep_alive(model.keep_alive),
        "pinned": model.pinned,
        "memory": model.memory,
        "context_size": model.context_size,
        "settings": _settings(model.settings),
    }


def _settings(settings: ModelSettings) -> dict[str, Any]:
    kept = settings.keep_alive
    return {
        "context_size": settings.context_size,
        "preset": settings.preset,
        "runtime_flags": settings.runtime_flags,
        "keep_alive": None if kept is None else show_keep_alive(kept),
    }
