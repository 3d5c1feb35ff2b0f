"""Middleware that traces each request, the request log, and OpenTelemetry spans."""

from __future__ import annotations

import asyncio
import logging
import os
import re
import time
import uuid
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from modelpack.errors import UsageError
from modelpack_server.gateway.caller import put_entry
from modelpack_server.gateway.families import family_of
from modelpack_server.gateway.traces import Trace, put_trace
from modelpack_server.gateway.usage import ReplyReader

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SpanExporter

#: One INFO record for each request except probes and the page, with `Trace.line()` as its message
#: and `Trace.to_json()` as its attribute `request`.
REQUEST_LOG = logging.getLogger("modelpack.requests")
_LOG = logging.getLogger("modelpack_server.gateway")

_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
_METADATA = re.compile(r"[ -~]{1,128}")  # printable ASCII
_BLOCK = 64 * 1024  # bytes of a reply processed before other requests may run
_UNLOGGED = frozenset((
    "/health", "/v1/health", "/ping", "/metrics", "/", "/favicon.ico", "/docs", "/redoc",
    "/openapi.json",
))  # fmt: skip
_HEADERS = {
    "caller": "x-modelpack-caller",
    "stack": "x-modelpack-stack",
    "user": "x-modelpack-user",
}


class Traced:
    """The outermost ASGI middleware: it handles X-Request-ID and makes a `Trace` of each request.

    It keeps a client's valid id, and otherwise creates one. The application gets the id in the
    request headers, and the client in the response headers, also in `request-id` for Anthropic's
    clients.
    """

    def __init__(
        self,
        app: ASGIApp,
        report: Callable[[Trace], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._app = app
        self._report = report
        self._clock = clock

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            put_entry(scope, self)
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = MutableHeaders(scope=scope)
        trace = self._trace(scope, headers)
        headers["x-request-id"] = trace.id
        put_trace(scope, trace)
        reader: ReplyReader | None = None
        complete = False

        async def observed(message: Message) -> None:
            nonlocal reader, complete
            if message["type"] == "http.response.start":
                sent = MutableHeaders(scope=message)
                sent["x-request-id"] = sent["request-id"] = trace.id
                trace.status = message["status"]
                # Stored responses repeat the usage of the request that made them.
                if trace.method == "POST" and not trace.path.endswith("/cancel"):
                    reader = ReplyReader(trace, media_type_of(sent))
            elif message["type"] == "http.response.body":
                if reader is not None:
                    body = message.get("body", b"")
                    if len(body) <= _BLOCK:
                        reader.feed(body, self._clock())
                    else:
                        await _feed(reader, body, self._clock())
                complete = complete or not message.get("more_body", False)
            await send(message)

        try:
            await self._app(scope, receive, observed)
        except Exception:
            trace.status = trace.status or 500
            raise
        finally:
            trace.ended = self._clock()
            if not complete:
                trace.finish = trace.finish or "abort"
                trace.status = trace.status or 499  # the client disconnected
            self._tell(trace)

    def _trace(self, scope: Scope, headers: Headers) -> Trace:
        given = headers.get("x-request-id", "")
        trace = Trace(
            id=given if _ID.fullmatch(given) else f"req_{uuid.uuid4().hex}",
            method=scope["method"],
            path=scope["path"],
            family=family_of(scope["path"], headers),
            started=self._clock(),
            clock=self._clock,
        )
        for field, name in _HEADERS.items():
            value = headers.get(name, "")
            if _METADATA.fullmatch(value):
                setattr(trace, field, value)
        return trace

    def _tell(self, trace: Trace) -> None:
        try:
            self._report(trace)
        except Exception:  # noqa: BLE001 - an error in a report must not fail the request
            _LOG.exception("cannot report a request")


async def _feed(reader: ReplyReader, body: bytes, now: float) -> None:
    reader.feed(body[:_BLOCK], now)
    for at in range(_BLOCK, len(body), _BLOCK):
        await asyncio.sleep(0)
        reader.feed(body[at : at + _BLOCK], now)


def log_request(trace: Trace) -> None:
    """Log a trace as one line of JSON; probes and the parts of pages only at level DEBUG."""
    read = trace.method in ("GET", "HEAD") and not trace.refused
    level = logging.DEBUG if read and trace.path in _UNLOGGED else logging.INFO
    REQUEST_LOG.log(level, "%s", trace.line(), extra={"request": trace.to_json()})


def media_type_of(headers: Headers) -> str:
    """Return the media type in Content-Type, in lower case and without parameters."""
    return headers.get("content-type", "").partition(";")[0].strip().lower()


#: OpenTelemetry's variables for the collector. Its other variables apply too.
ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")


def default_report(environ: Mapping[str, str] = os.environ) -> Callable[[Trace], None]:
    """Return the function that logs traces, and exports spans if a collector is configured.

    Raises `UsageError` for a collector without the extra `otel`.
    """
    if not any(environ.get(name) for name in ENDPOINTS):
        return log_request
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    except ImportError:
        raise UsageError(
            f"{ENDPOINTS[1]} is set, but OpenTelemetry is not installed",
            hint="run pip install 'modelpack[otel]', or unset it",
        ) from None
    export = span_report(OTLPSpanExporter())

    def report(trace: Trace) -> None:
        log_request(trace)
        export(trace)

    return report


def span_report(
    exporter: SpanExporter, on_provider: Callable[[TracerProvider], None] | None = None
) -> Callable[[Trace], None]:
    """Return a function that exports each trace as a span, in the exporter's own thread.

    `on_provider` is called with the provider, which can be flushed.
    """
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor
    from opentelemetry.trace import SpanKind, Status, StatusCode

    resource = Resource.create({"service.name": os.environ.get("OTEL_SERVICE_NAME", "modelpack")})
    provider = TracerProvider(resource=resource)
    provider.add_span_processor(BatchSpanProcessor(exporter))
    tracer = provider.get_tracer("modelpack")

    def report(trace: Trace) -> None:
        end = time.time_ns()
        seconds = 0.0 if trace.ended is None else trace.ended - trace.started
        span = tracer.start_span(
            f"{trace.method} {trace.path[:256]}",
            kind=SpanKind.SERVER,
            start_time=end - round(seconds * 1e9),
            attributes=attributes(trace),
        )
        if trace.status is not None and trace.status >= 500:
            span.set_status(Status(StatusCode.ERROR))
        span.end(end)

    if on_provider is not None:
        on_provider(provider)
    return report


def attributes(trace: Trace) -> dict[str, Any]:
    """Return the span attributes of a trace, without unknown values."""
    known = {
        "http.request.method": trace.method,
        "url.path": trace.path[:256],
        "http.response.status_code": trace.status,
        "gen_ai.request.model": trace.model,
        "gen_ai.usage.input_tokens": trace.prompt_tokens,
        "gen_ai.usage.output_tokens": trace.completion_tokens,
        "gen_ai.response.finish_reasons": None if trace.finish is None else [trace.finish],
        "gen_ai.server.time_to_first_token": trace.ttft,
        "gen_ai.server.time_per_output_token": trace.tpot,
        "modelpack.request.id": trace.id,
        "modelpack.family": str(trace.family),
        "modelpack.queue_time": trace.queue_s,
        "modelpack.cached_tokens": trace.cached_tokens,
        "modelpack.key": trace.key,
        "modelpack.caller": trace.caller,
        "modelpack.stack": trace.stack,
        "modelpack.user": trace.user,
        "modelpack.upstream": trace.upstream,
        "modelpack.refused": trace.refused,
    }
    return {name: value for name, value in known.items() if value is not None}
