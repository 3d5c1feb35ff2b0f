"""Spans of requests, where OpenTelemetry is configured."""

from __future__ import annotations

import sys
from typing import Any

import pytest
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode

from modelpack.errors import UsageError
from modelpack_server.gateway import trace_spans
from modelpack_server.gateway.families import Family
from modelpack_server.gateway.trace_spans import log_request
from modelpack_server.gateway.traces import Trace

PATH = "/v1/chat/completions"


def traced(**known: Any) -> Trace:
    given: dict[str, Any] = {"id": "r1", "method": "POST", "path": PATH, "family": Family.OPENAI}
    return Trace(**{**given, "started": 10.0, "ended": 12.5, "status": 200, **known})


def exported(*traces: Trace) -> list[Any]:
    exporter, providers = InMemorySpanExporter(), list[Any]()
    report = trace_spans.span_report(exporter, providers.append)
    for trace in traces:
        report(trace)
    assert providers[0].force_flush()
    found = list(exporter.get_finished_spans())
    providers[0].shutdown()
    return found


def test_a_span_has_what_is_known() -> None:
    trace = traced(
        model="ai/m", prompt_tokens=7, completion_tokens=3, cached_tokens=2, key="ci",
        first_token_at=10.5, last_token_at=11.5, finish="stop", queue_s=0.25,
    )  # fmt: skip
    [span] = exported(trace)
    assert span.name == f"POST {PATH}"
    assert span.end_time - span.start_time == 2_500_000_000
    assert span.status.status_code is StatusCode.UNSET
    assert dict(span.attributes) == {
        "http.request.method": "POST",
        "url.path": PATH,
        "http.response.status_code": 200,
        "gen_ai.request.model": "ai/m",
        "gen_ai.usage.input_tokens": 7,
        "gen_ai.usage.output_tokens": 3,
        "gen_ai.response.finish_reasons": ("stop",),
        "gen_ai.server.time_to_first_token": 0.5,
        "gen_ai.server.time_per_output_token": 0.5,
        "modelpack.request.id": "r1",
        "modelpack.family": "openai",
        "modelpack.queue_time": 0.25,
        "modelpack.cached_tokens": 2,
        "modelpack.key": "ci",
    }


@pytest.mark.parametrize(("status", "code"), [(404, "UNSET"), (500, "ERROR"), (None, "UNSET")])
def test_server_errors_are_errors(status: int | None, code: str) -> None:
    [span] = exported(traced(status=status))
    assert span.status.status_code.name == code


def test_without_a_collector_requests_are_only_logged() -> None:
    assert trace_spans.default_report({}) is log_request
    assert trace_spans.default_report({trace_spans.ENDPOINTS[1]: ""}) is log_request


@pytest.mark.parametrize("name", trace_spans.ENDPOINTS)
def test_the_environment_names_a_collector(
    name: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    seen: list[Trace] = []
    monkeypatch.setattr(trace_spans, "span_report", lambda _: seen.append)
    report = trace_spans.default_report({name: "http://127.0.0.1:9"})
    trace = traced()
    with caplog.at_level("INFO", "modelpack"):
        report(trace)
    assert seen == [trace]
    assert '"id":"r1"' in caplog.text


def test_the_extra_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "opentelemetry.exporter.otlp.proto.http.trace_exporter"
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UsageError, match="OpenTelemetry is not installed"):
        trace_spans.default_report({trace_spans.ENDPOINTS[1]: "http://127.0.0.1:9"})
