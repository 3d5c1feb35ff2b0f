"""POST /v1/requests/{id}/cancel: ending a request from elsewhere, by the id of its reply.

The id is X-Request-ID, which clients may choose and every reply carries. A request that is ended so
is answered with what it has, its finish reason being "stop". Source: vllm-mlx has the same routes.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from fastapi import APIRouter, Request
from starlette.exceptions import HTTPException

from modelpack_engine.request_stream import RequestStream
from modelpack_server.gateway.caller import caller_of


@dataclass(eq=False, slots=True)
class RunningRequest:
    """A request that is being answered; `owner` is its caller's (None: no keys are asked for)."""

    owner: str | None = None
    model: str | None = None
    streams: list[RequestStream] = field(default_factory=list)
    cancelled: bool = False

    def submitted(self, model: str, stream: RequestStream) -> None:
        """Take note of what the request asks of an engine."""
        self.model = model
        self.streams.append(stream)
        if self.cancelled:
            stream.cancel()

    def cancel(self) -> None:
        """End it, and whatever else it asks for."""
        self.cancelled = True
        for stream in self.streams:
            stream.cancel()


class RunningRequests:
    """Those that are being answered, by id; several may have the same."""

    def __init__(self) -> None:
        self._running: dict[str, list[RunningRequest]] = {}

    def begin(self, request_id: str, owner: str | None = None) -> RunningRequest:
        """Take note of a request."""
        request = RunningRequest(owner)
        self._running.setdefault(request_id, []).append(request)
        return request

    def end(self, request_id: str, request: RunningRequest) -> None:
        """Forget it."""
        same = self._running[request_id]
        same.remove(request)
        if not same:
            del self._running[request_id]

    def find(self, request_id: str, owner: str | None = None) -> list[RunningRequest]:
        """Return an owner's requests with this id that have reached an engine."""
        return [r for r in self._running.get(request_id, ()) if r.owner == owner and r.streams]


def router(running: RunningRequests) -> APIRouter:
    """Return the routes."""
    routes = APIRouter(tags=["server"])

    @routes.post("/v1/requests/{request_id}/cancel")
    @routes.post("/engines/v1/requests/{request_id}/cancel", include_in_schema=False)
    @routes.delete("/v1/requests/{request_id}")
    @routes.delete("/engines/v1/requests/{request_id}", include_in_schema=False)
    async def cancel(request_id: str, request: Request) -> dict[str, Any]:
        """End a request; its memory is free within a step. The id is its X-Request-ID."""
        found = running.find(request_id, caller_of(request.scope).owner)
        if not found:
            raise HTTPException(404, f"no request {request_id!r} is being answered")
        for one in found:
            one.cancel()
        model = next((one.model for one in found if one.model), None)
        return {"object": "request.cancel", "id": request_id, "cancelled": True, "model": model}

    return routes
