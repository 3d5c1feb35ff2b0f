"""Traces: what the engine knows of a request is added to the trace of whoever logs it.

What runs in an engine is noted too, so that it can be cancelled by its request's id.
"""

from __future__ import annotations

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from modelpack_engine.outputs import RequestEvent
from modelpack_engine.prefix_hash import cache_salt
from modelpack_engine.request_stream import RequestStream
from modelpack_server.api.cancelling import RunningRequests
from modelpack_server.conversation.served import RequestContext, request_context
from modelpack_server.gateway.caller import caller_of
from modelpack_server.gateway.traces import Trace, trace_of


class EngineTraces:
    """ASGI middleware: completes the trace in the scope, if there is one, when a request ends.

    `running` is told of every request while it is answered. Prompts of different owners share no
    prefixes in KV caches, lest one learns what another asked, unless `share_prefix_cache` is set.
    """

    def __init__(
        self, app: ASGIApp, running: RunningRequests, *, share_prefix_cache: bool = False
    ) -> None:
        self._app = app
        self._running = running
        self._share_prefix_cache = share_prefix_cache

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        trace = trace_of(scope)
        name = trace.id if trace is not None else Headers(scope=scope).get("x-request-id", "")
        owner = caller_of(scope).owner
        running = self._running.begin(name, owner)

        def submitted(model: str, stream: RequestStream) -> None:
            if trace is not None:
                trace.model = model
            running.submitted(model, stream)

        salt = cache_salt(owner=None if self._share_prefix_cache else owner)
        token = request_context.set(RequestContext(salt, submitted))
        try:
            await self._app(scope, receive, send)
        finally:
            request_context.reset(token)
            self._running.end(name, running)
            if trace is not None and running.streams:
                complete(trace, running.streams)


def complete(trace: Trace, streams: list[RequestStream]) -> None:
    """Put into a trace what the streams of its request tell."""
    finals = [event for stream in streams for event in stream.finals]
    trace.prompt_tokens = sum(stream.prompt_tokens for stream in streams)
    trace.completion_tokens = sum(stream.num_tokens for stream in streams)
    trace.cached_tokens = sum(_cached(stream) for stream in streams)
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


def _cached(stream: RequestStream) -> int:
    first: RequestEvent | None = stream.finals[0] if stream.finals else None
    return first.usage.cached_tokens if first is not None and first.usage is not None else 0
