"""Spans: each request's trace as OpenTelemetry has it, where an exporter is configured.

Attributes are those of OpenTelemetry's semantic conventions for HTTP and generative AI. Like the
log, spans hold no prompt, answer or secret.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from modelpack.errors import UsageError
from modelpack_server.gateway.observing import log_request
from modelpack_server.gateway.traces import Trace

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SpanExporter

#: OpenTelemetry's own names: where spans go. Its other variables hold as well.
ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")


def default_report(environ: Mapping[str, str] = os.environ) -> Callable[[Trace], None]:
    """Return what reports requests: the log, and spans too where the environment names a collector.

    Raises `UsageError` if it does, and the extra `otel` is not installed.
    """
    if not any(environ.get(name) for name in ENDPOINTS):
        return log_request
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    except ImportError:
        raise UsageError(
            f"{ENDPOINTS[1]} is set, and OpenTelemetry is not installed",
            hint="pip install 'modelpack[otel]', or unset it",
        ) from None
    export = span_report(OTLPSpanExporter())

    def report(trace: Trace) -> None:
        log_request(trace)
        export(trace)

    return report


def span_report(
    exporter: SpanExporter, on_provider: Callable[[TracerProvider], None] | None = None
) -> Callable[[Trace], None]:
    """Return what makes a span of each trace and hands it to `exporter` from a thread of its own.

    `on_provider` is told the provider, which can be flushed.
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
    """Return a trace's attributes; what is not known is left out."""
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
