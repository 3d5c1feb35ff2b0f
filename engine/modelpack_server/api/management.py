"""The routes below /pool: list, unload and configure models. The command line uses them."""

from __future__ import annotations

import math
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any

from fastapi import APIRouter
from pydantic import ConfigDict, Field, StrictBool, StrictStr

from modelpack_engine.errors import RequestError
from modelpack_server.api.bodies import Body, BodyRoute
from modelpack_server.pool.entry import RunningModel
from modelpack_server.pool.pool import ModelPool
from modelpack_server.pool.settings import ModelSettings, parse_keep_alive, show_keep_alive


class UnloadRequest(Body):
    """Which models to unload; `wait` lets requests under way end first, for a while."""

    model_config = ConfigDict(extra="forbid")
    models: list[StrictStr] = []
    all: StrictBool = False
    wait: StrictBool = True


class ConfigureRequest(Body):
    """How a model is to run from now on; what is left out is as the server has it."""

    model_config = ConfigDict(extra="forbid")
    model: Annotated[StrictStr, Field(min_length=1)]
    context_size: Annotated[int, Field(gt=1, le=1 << 31)] | None = None
    preset: StrictStr | None = None
    runtime_flags: list[StrictStr] = []
    keep_alive: StrictStr | float | None = None


def router(pool: ModelPool) -> APIRouter:
    """Return the routes."""
    routes = APIRouter(prefix="/pool", tags=["pool"], route_class=BodyRoute)

    @routes.get("")
    async def running() -> dict[str, Any]:
        """List the models that are loaded, being loaded or being unloaded."""
        now = pool.clock()
        return {"models": [_shown(model, now) for model in pool.running()], "memory": pool.memory}

    @routes.post("/unload")
    async def unload(body: UnloadRequest) -> dict[str, Any]:
        """Unload models; requests that use them fail once they have waited for long enough."""
        if body.all == bool(body.models):
            raise RequestError("models or all is required", param="models")
        grace = None if body.wait else 0.0
        return {"unloaded": await pool.unload(None if body.all else body.models, grace=grace)}

    @routes.post("/configure")
    async def configure(body: ConfigureRequest) -> dict[str, Any]:
        """Set a model up: it is loaded anew when it is next used. 409 while it is in use."""
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
