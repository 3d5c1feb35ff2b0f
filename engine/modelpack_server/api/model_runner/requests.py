"""The route GET /engines/requests: recent requests and responses, and new ones as they arrive."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterable, Mapping
from contextlib import AsyncExitStack
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request, Response
from fastapi.responses import JSONResponse

from modelpack_server.api.model_runner.answers import TextRoute
from modelpack_server.api.model_runner.records import Record, Records
from modelpack_server.api.model_runner.settings import config_shown
from modelpack_server.api.sse import LiveStream, event
from modelpack_server.gateway.caller import caller_of
from modelpack_server.pool.pool import ModelPool


def router(pool: ModelPool, records: Records) -> APIRouter:
    """Return the route."""
    routes = APIRouter(prefix="/engines", tags=["Docker Model Runner"], route_class=TextRoute)

    @routes.get("/requests", response_model=None)
    async def requests(
        request: Request,
        model: Annotated[str, Query()] = "",
        include_existing: Annotated[str, Query()] = "",
    ) -> Response:
        """Return the last requests of each model, of the API key that asks; as server-sent events
        those that come, after those that were where `include_existing` is true.
        """
        key = (await pool.find(model)).key if model else None
        owner = caller_of(request.scope).owner
        kept = records.kept(key, owner)
        if request.headers.get("accept") != "text/event-stream":
            groups = await asyncio.to_thread(lambda: [_group(pool, *g) for g in kept.items()])
            return JSONResponse(groups)
        old = kept if include_existing == "true" else {}
        coming = records.follow(key, owner)
        return LiveStream(_events(pool, old, coming), AsyncExitStack())

    return routes


async def _events(
    pool: ModelPool,
    old: Mapping[str, list[Record]],
    coming: AsyncGenerator[Record, None],
) -> AsyncGenerator[str, None]:
    # The first step of `coming` is what subscribes it: nothing is missed from here on.
    following = asyncio.ensure_future(anext(coming))
    await asyncio.sleep(0)
    try:
        for key, group in old.items():
            for record in group:
                yield event([_group(pool, key, [record])], "existing_request")
        yield event({"status": "connected"}, "connected")
        while True:
            record = await following
            following = asyncio.ensure_future(anext(coming))
            yield event([_group(pool, record.key, [record])], "new_request")
    finally:
        following.cancel()
        await asyncio.gather(following, return_exceptions=True)
        await coming.aclose()


def _group(pool: ModelPool, key: str, records: Iterable[Record]) -> dict[str, Any]:
    shown = [record.to_json() for record in records]
    settings = pool.configured().get(key)
    config = {} if settings is None else config_shown(settings)
    return {"count": len(shown), "model": key, "config": config, "records": shown}
