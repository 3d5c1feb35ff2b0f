"""The operator's view of requests and models, which the console shows: routes below /pool.

Only callers who may manage models reach these routes. Prompts and replies are shown only by a
server that was started with `--show-content`.
"""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Any, Final

from fastapi import APIRouter
from starlette.exceptions import HTTPException

from modelpack.artifacts.model import Model
from modelpack.operations.lint import model_subject
from modelpack.operations.lookup import stored_model, with_projectors
from modelpack.store.layout import LayoutStore
from modelpack_server.api.model_runner.names import find_stored
from modelpack_server.api.model_runner.records import Records
from modelpack_server.gateway.checks import Route, route_of
from modelpack_server.gateway.traces import Trace
from modelpack_server.pool.pool import ModelPool

#: The number of requests that a server remembers.
KEPT_REQUESTS: Final = 200
_MAX_CARD = 256 * 1024  # bytes


class RequestHistory:
    """The traces of the latest requests that use models, running ones included."""

    def __init__(self) -> None:
        self._traces: deque[Trace] = deque(maxlen=KEPT_REQUESTS)

    def add(self, trace: Trace) -> None:
        """Remember the trace of a request that begins, if the request uses a model."""
        route = route_of(trace.method, trace.path)
        is_inference = route in (Route.INFERENCE, Route.SPEECH)
        if is_inference and not trace.path.endswith(("/show", "/count_tokens")):
            self._traces.append(trace)

    def to_json(self) -> list[dict[str, Any]]:
        """Return what the request log says of each request, the newest first."""
        return [
            trace.to_json()
            | {"running": trace.ended is None, "age_s": round(trace.clock() - trace.started, 6)}
            for trace in reversed(self._traces)
        ]


def router(
    pool: ModelPool, history: RequestHistory, records: Records, *, show_content: bool
) -> APIRouter:
    """Return the routes; `show_content` shows the prompts and replies of all API keys."""
    routes = APIRouter(prefix="/pool", tags=["pool"])

    @routes.get("/requests")
    async def requests() -> dict[str, Any]:
        """List the latest requests of all API keys, the newest first, without their content."""
        return {"requests": history.to_json(), "content": show_content}

    @routes.get("/requests/{request_id}")
    async def request(request_id: str) -> dict[str, Any]:
        """Return the prompt and the reply of a recent request, as /engines/requests does."""
        if not show_content:
            raise HTTPException(
                403, "this server does not show content: start it with --show-content"
            )
        record = records.find(request_id)
        if record is None:
            raise HTTPException(404, f"no content is kept of request {request_id!r}")
        return await asyncio.to_thread(record.to_json)

    @routes.get("/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        """Return the files of a stored model, its card, and what is attached to it."""
        return await asyncio.to_thread(model_details, pool.catalogue.store, name)

    return routes


def model_details(store: LayoutStore, name: str) -> dict[str, Any]:
    """Return the JSON value of a stored model; raises `NotFoundError`."""
    _, found = find_stored(store, name)
    model = with_projectors(store, stored_model(store, str(found.digest)))
    return {
        "digest": str(model.digest),
        "names": [str(reference) for reference in found.references],
        "size": model.manifest.total_size,
        "files": [
            {
                "file": file.filepath,
                "role": str(file.role),
                "media_type": file.media_type,
                "size": file.descriptor.size,
                "digest": str(file.descriptor.digest),
            }
            for file in model.files()
        ],
        "card": _card(store, model),
        "attached": [
            {
                "artifact_type": attached.artifact_type or attached.media_type,
                "digest": str(attached.digest),
                "size": attached.size,
            }
            for attached in store.referrers(model.digest)
        ],
    }


def _card(store: LayoutStore, model: Model) -> str:
    """Return the model's README, or ""."""
    readme = model_subject(model, store, ()).file("readme.md")
    if readme is None:
        return ""
    return readme.read(min(readme.size, _MAX_CARD)).decode(errors="replace")
