"""Engine metrics in request traces, and the route POST /v1/requests/{id}/cancel.

The id is X-Request-ID, which clients may choose and every response has. A cancelled request
returns its output so far with the finish reason "stop". Source: vllm-mlx has the same route.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from fastapi import APIRouter, Request
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Receive, Scope, Send

from modelpack_engine.async_engine import RequestStream
from modelpack_engine.core.block_manager import cache_salt
from modelpack_server.api.console import RequestHistory
from modelpack_server.api.media_urls import MediaUrls
from modelpack_server.conversation.served_model import RequestContext, request_context
from modelpack_server.gateway.caller import background_of, caller_of
from modelpack_server.gateway.traces import Trace, trace_of


@dataclass(eq=False, slots=True)
class RunningRequest:
    """A running request; `owner` is the owner of its API key (None: the server has no keys)."""

    owner: str | None = None
    model: str | None = None
    streams: list[RequestStream] = field(default_factory=list)
    cancelled: bool = False

    def submitted(self, model: str, stream: RequestStream) -> None:
        """Record a stream that the request runs in an engine."""
        self.model = model
        self.streams.append(stream)
        if self.cancelled:
            stream.cancel()

    def cancel(self) -> None:
        """Abort the streams of the request, and those that it submits later."""
        self.cancelled = True
        for stream in self.streams:
            stream.cancel()


class RunningRequests:
    """The running requests by id; several may have the same id."""

    def __init__(self) -> None:
        self._running: dict[str, list[RunningRequest]] = {}

    def begin(self, request_id: str, owner: str | None = None) -> RunningRequest:
        request = RunningRequest(owner)
        self._running.setdefault(request_id, []).append(request)
        return request

    def end(self, request_id: str, request: RunningRequest) -> None:
        same = self._running[request_id]
        same.remove(request)
        if not same:
            del self._running[request_id]

    def find(self, request_id: str, owner: str | None = None) -> list[RunningRequest]:
        """Return an owner's requests with this id that have reached an engine."""
        return [r for r in self._running.get(request_id, ()) if r.owner == owner and r.streams]


def router(running: RunningRequests) -> APIRouter:
    routes = APIRouter(tags=["server"])

    @routes.post("/v1/requests/{request_id}/cancel")
    @routes.post("/engines/v1/requests/{request_id}/cancel", include_in_schema=False)
    @routes.delete("/v1/requests/{request_id}")
    @routes.delete("/engines/v1/requests/{request_id}", include_in_schema=False)
    async def cancel(request_id: str, request: Request) -> dict[str, Any]:
        """Cancel the request with this X-Request-ID; its memory is free after one step."""
        found = running.find(request_id, caller_of(request.scope).owner)
        if not found:
            raise HTTPException(404, f"no such running request: {request_id!r}")
        for one in found:
            one.cancel()
        model = next((one.model for one in found if one.model), None)
        return {"object": "request.cancel", "id": request_id, "cancelled": True, "model": model}

    return routes


class EngineTraces:
    """ASGI middleware that completes the trace in the scope, if any, when a request ends.

    It records running requests in `running`, and all in `history`. Prompts of different owners
    share no prefixes in KV caches unless `share_prefix_cache` is set: response times would reveal
    the prompts of others. `media_urls` fetches the pictures in URLs.
    """

    def __init__(
        self,
        app: ASGIApp,
        running: RunningRequests,
        history: RequestHistory,
        *,
        share_prefix_cache: bool = False,
        media_urls: MediaUrls | None = None,
    ) -> None:
        self._app = app
        self._running = running
        self._history = history
        self._share_prefix_cache = share_prefix_cache
        self._media_urls = media_urls

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        trace = trace_of(scope)
        name = trace.id if trace is not None else Headers(scope=scope).get("x-request-id", "")
        if trace is not None:
            self._history.add(trace)
        owner = caller_of(scope).owner
        running = self._running.begin(name, owner)

        def submitted(model: str, stream: RequestStream) -> None:
            if trace is not None:
                trace.model, trace.counts_known = model, True
            running.submitted(model, stream)

        salt = cache_salt(owner=None if self._share_prefix_cache else owner)
        background = background_of(scope) is not None
        context = RequestContext(salt, submitted, background, self._media_urls)
        token = request_context.set(context)
        try:
            await self._app(scope, receive, send)
        finally:
            request_context.reset(token)
            self._running.end(name, running)
            if trace is not None and running.streams:
                complete(trace, running.streams)


def complete(trace: Trace, streams: list[RequestStream]) -> None:
    """Add the timing and token counts of a request's streams to its trace."""
    finals = [event for stream in streams for event in stream.finals]
    trace.prompt_tokens = sum(stream.prompt_tokens for stream in streams)
    trace.completion_tokens = sum(stream.num_tokens for stream in streams)
    usages = [stream.finals[0].usage for stream in streams if stream.finals]
    trace.cached_tokens = sum(usage.cached_tokens for usage in usages if usage is not None)
    timings = [event.timing for event in finals if event.timing is not None]
    queued = [t.scheduled - t.arrived for t in timings if t.scheduled is not None]
    firsts = [t.first_token for t in timings if t.first_token is not None]
    if queued:
        trace.queue_s = max(queued)
    if firsts:
        trace.first_token_at = min(firsts)
        trace.last_token_at = max(t.finished for t in timings)
    if finals and trace.finish is None:
        trace.finish = str(finals[-1].finish_reason)
