"""Traces: what the engine knows of a request is added to the trace of whoever logs it."""

from __future__ import annotations

from starlette.types import ASGIApp, Receive, Scope, Send

from modelpack.gateway.traces import Trace, trace_of
from modelpack_engine.conversation.served import on_submit
from modelpack_engine.outputs import RequestEvent
from modelpack_engine.request_stream import RequestStream


class EngineTraces:
    """ASGI middleware: completes the trace in the scope, if there is one, when a request ends."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        trace = trace_of(scope) if scope["type"] == "http" else None
        if trace is None:
            await self._app(scope, receive, send)
            return
        streams: list[RequestStream] = []

        def submitted(model: str, stream: RequestStream) -> None:
            trace.model = model
            streams.append(stream)

        token = on_submit.set(submitted)
        try:
            await self._app(scope, receive, send)
        finally:
            on_submit.reset(token)
            if streams:
                complete(trace, streams)


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
