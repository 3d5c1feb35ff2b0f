"""The routes /api/tags, show, ps, delete, copy and version."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta
from typing import Any

from fastapi import APIRouter, Response

from modelpack.artifacts.reference import Reference, is_model_id
from modelpack.errors import NotFoundError
from modelpack_server.api.ollama.bodies import CopyBody, ModelBody, ShowBody
from modelpack_server.api.ollama.model_card import (
    describe,
    details,
    digest_of,
    modified_at,
)
from modelpack_server.api.ollama.ndjson import JsonRoute, find, missing, shown, timestamp
from modelpack_server.pool.catalogue import StoredModel
from modelpack_server.pool.entry import ModelState, RunningModel
from modelpack_server.pool.pool import ModelPool

#: The version of Ollama whose API this is: clients ask for features by it.
VERSION = "0.20.0"

# Seconds that are for ever, as Go counts them: 2 ** 63 - 1 nanoseconds.
_FOREVER = (2**63 - 1) // 10**9


def router(pool: ModelPool) -> APIRouter:
    """Return the routes."""
    routes = APIRouter(tags=["Ollama"], route_class=JsonRoute)

    @routes.get("/api/version")
    @routes.head("/api/version", include_in_schema=False)
    async def version() -> dict[str, str]:
        """Return the version of Ollama whose API this is."""
        return {"version": VERSION}

    @routes.get("/api/tags")
    @routes.head("/api/tags", include_in_schema=False)
    async def tags() -> dict[str, Any]:
        """List the stored models, each under all its names."""
        models, store = await pool.stored(), pool.catalogue.store
        named = [(name, model) for model in models for name in model.names or (model.key,)]
        named += (await pool.aliases()).items()
        named = list(dict(named).items())

        def listed() -> list[dict[str, Any]]:
            found = [_tag(name, model, modified_at(store, model)) for name, model in named]
            return sorted(found, key=lambda tag: str(tag["modified_at"]), reverse=True)

        return {"models": await asyncio.to_thread(listed)}

    @routes.post("/api/show")
    async def show(body: ShowBody) -> dict[str, Any]:
        """Tell what there is to know about a stored model."""
        found = await find(pool, body.model)
        return await asyncio.to_thread(describe, pool.catalogue.store, found, verbose=body.verbose)

    @routes.get("/api/ps")
    async def ps() -> dict[str, Any]:
        """List the loaded models."""
        loaded = [model for model in pool.running() if model.state is ModelState.READY]
        clock, on_gpu = pool.clock(), _on_gpu() if loaded else False
        return {"models": [_running(model, clock, on_gpu) for model in loaded]}

    @routes.delete("/api/delete", response_model=None)
    async def delete(body: ModelBody) -> Response:
        """Delete a name, and with its last name the model; 404 if there is none."""
        found = await find(pool, body.model)
        if len(found.names) <= 1:
            await pool.unload([body.model])
        name = body.model
        if not is_model_id(name.strip()):
            name = str(Reference.parse(name))
        try:
            await asyncio.to_thread(pool.catalogue.store.remove, name)
        except NotFoundError:  # somebody else was quicker
            raise missing(body.model) from None
        return Response(status_code=200)

    @routes.post("/api/copy", response_model=None)
    async def copy(body: CopyBody) -> Response:
        """Give a model another name."""
        found = await find(pool, body.source)
        target = Reference.parse(body.destination)
        await asyncio.to_thread(pool.catalogue.store.tag, found.key, target)
        return Response(status_code=200)

    return routes


def _tag(name: str, model: StoredModel, modified: str) -> dict[str, Any]:
    return _named(name, model) | {"modified_at": modified}


def _named(name: str, model: StoredModel) -> dict[str, Any]:
    return {
        "name": shown(name),
        "model": shown(name),
        "size": model.size,
        "digest": digest_of(model),
        "details": details(model),
    }


def _running(model: RunningModel, clock: float, on_gpu: bool) -> dict[str, Any]:
    """Return a loaded model; one in use stays for its time once it no longer is."""
    now = datetime.now(UTC)
    left = model.keep_alive if model.expires_at is None else model.expires_at - clock
    expires = now + timedelta(seconds=min(left, _FOREVER))
    return _named(model.name, model.stored) | {
        "size": model.memory,
        "size_vram": model.memory if on_gpu else 0,
        "expires_at": timestamp(expires),
        "context_length": model.context_size or 0,
    }


def _on_gpu() -> bool:
    from modelpack_engine.runner.kv_cache_size import on_gpu

    return on_gpu()
