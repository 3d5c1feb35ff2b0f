"""The gateway's Prometheus metrics: its finished requests and the state of its upstreams."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Histogram, Metric, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

from modelpack_server.gateway.traces import Trace

# vLLM's buckets, so that one dashboard can show both.
_TTFT_BUCKETS = (
    .001, .005, .01, .02, .04, .06, .08, .1, .25, .5, .75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160,
    640, 2560,
)  # fmt: skip
_DURATION_BUCKETS = (
    .3, .5, .8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680,
)  # fmt: skip

UpstreamRow = tuple[str, bool, int, int]  # name, healthy, running requests, failures


class GatewayMetrics:
    """The metrics of one gateway, in its own registry.

    The values of labels are bounded: key names come from the keys file, never from clients.
    """

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._requests = self._counter(
            "requests", "Requests that ended.", "family", "key", "status"
        )
        self._refusals = self._counter("refusals", "Requests refused.", "reason")
        self._tokens = self._counter("tokens", "Tokens that passed by.", "key", "kind")
        self._ttft = self._histogram(
            "time_to_first_token_seconds", "From arrival to the first token.", _TTFT_BUCKETS
        )
        self._duration = self._histogram(
            "request_seconds", "From arrival to the end.", _DURATION_BUCKETS
        )

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"modelpack_gateway_{name}", text, labels, registry=self._registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        full = f"modelpack_gateway_{name}"
        return Histogram(full, text, buckets=buckets, registry=self._registry)

    def observe(self, trace: Trace) -> None:
        """Count a finished request."""
        key = trace.key or ""
        self._requests.labels(str(trace.family), key, str(trace.status)).inc()
        if trace.refused:
            self._refusals.labels(trace.refused).inc()
        for kind, count in (
            ("prompt", trace.prompt_tokens),
            ("completion", trace.completion_tokens or trace.counted_tokens),
        ):
            if count:
                self._tokens.labels(key, kind).inc(count)
        if trace.ttft is not None:
            self._ttft.observe(trace.ttft)
        if trace.ended is not None:
            self._duration.observe(trace.ended - trace.started)

    def render(self, upstreams: Iterable[UpstreamRow] = ()) -> bytes:
        """Return all metrics in Prometheus's text format 0.0.4."""
        return generate_latest(_Scrape(self._registry, tuple(upstreams)))


@dataclass(frozen=True, slots=True)
class _Scrape:
    """The collector of one response to GET /metrics."""

    registry: CollectorRegistry
    upstreams: tuple[UpstreamRow, ...]

    def collect(self) -> Iterator[Metric]:
        for metric in self.registry.collect():
            # prometheus-client adds the creation time of each series, which we do not expose.
            metric.samples = [s for s in metric.samples if not s.name.endswith("_created")]
            yield metric
        prefix, labels = "modelpack_gateway_upstream", ("upstream",)
        healthy = GaugeMetricFamily(f"{prefix}_healthy", "1: it answers.", labels=labels)
        running = GaugeMetricFamily(f"{prefix}_running", "Requests under way.", labels=labels)
        failures = CounterMetricFamily(f"{prefix}_failures", "Failures.", labels=labels)
        for name, is_healthy, requests, failed in self.upstreams:
            healthy.add_metric((name,), is_healthy)
            running.add_metric((name,), requests)
            failures.add_metric((name,), failed)
        yield from (healthy, running, failures)
