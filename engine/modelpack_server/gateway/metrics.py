"""The gateway's Prometheus metrics."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from modelpack_server.gateway.traces import Trace

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

# vLLM's, so that its boards can show these next to those.
_TTFT_BUCKETS = (
    .001, .005, .01, .02, .04, .06, .08, .1, .25, .5, .75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160,
    640, 2560,
)  # fmt: skip
_DURATION_BUCKETS = (
    .3, .5, .8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680,
)  # fmt: skip

Labels = tuple[tuple[str, str], ...]


class Histogram:
    """Counts values by upper bounds."""

    def __init__(self, bounds: Iterable[float]) -> None:
        self._counts = dict.fromkeys(bounds, 0)
        self._count = 0
        self._sum = 0.0

    def observe(self, value: float) -> None:
        """Count one value."""
        self._count += 1
        self._sum += value
        for bound in self._counts:
            if value <= bound:
                self._counts[bound] += 1

    def lines(self, name: str) -> list[str]:
        """Return its samples."""
        buckets = [f'{name}_bucket{{le="{bound:g}"}} {n}' for bound, n in self._counts.items()]
        return [
            *buckets,
            f'{name}_bucket{{le="+Inf"}} {self._count}',
            f"{name}_sum {self._sum:g}",
            f"{name}_count {self._count}",
        ]


class GatewayMetrics:
    """Adds up traces. Labels are bounded: names of keys come from the file, never from clients."""

    def __init__(self) -> None:
        self._requests: Counter[Labels] = Counter()
        self._refusals: Counter[Labels] = Counter()
        self._tokens: Counter[Labels] = Counter()
        self._ttft = Histogram(_TTFT_BUCKETS)
        self._duration = Histogram(_DURATION_BUCKETS)

    def observe(self, trace: Trace) -> None:
        """Count a request that has ended."""
        key = trace.key or ""
        status = str(trace.status)
        self._requests[("family", str(trace.family)), ("key", key), ("status", status)] += 1
        if trace.refused:
            self._refusals[(("reason", trace.refused),)] += 1
        for kind, count in (
            ("prompt", trace.prompt_tokens),
            ("completion", trace.completion_tokens or trace.counted_tokens),
        ):
            if count:
                self._tokens[("key", key), ("kind", kind)] += count
        if trace.ttft is not None:
            self._ttft.observe(trace.ttft)
        if trace.ended is not None:
            self._duration.observe(trace.ended - trace.started)

    def render(self, upstreams: Iterable[tuple[str, bool, int, int]] = ()) -> str:
        """Return the text; `upstreams` are (name, healthy, running, failures)."""
        rows = [((("upstream", name),), row) for name, *row in upstreams]
        series: list[tuple[str, str, str, Iterable[tuple[Labels, float]]]] = [
            ("requests_total", "counter", "Requests that ended", self._requests.items()),
            ("refusals_total", "counter", "Requests refused", self._refusals.items()),
            ("tokens_total", "counter", "Tokens that passed by", self._tokens.items()),
            ("upstream_healthy", "gauge", "1: it answers", [(n, r[0]) for n, r in rows]),
            ("upstream_running", "gauge", "Requests under way", [(n, r[1]) for n, r in rows]),
            ("upstream_failures_total", "counter", "Failures", [(n, r[2]) for n, r in rows]),
        ]
        lines: list[str] = []
        for name, kind, text, samples in series:
            full = f"modelpack_gateway_{name}"
            lines += [f"# HELP {full} {text}.", f"# TYPE {full} {kind}"]
            lines += [f"{full}{_labelled(labels)} {value:g}" for labels, value in samples]
        for name, text, histogram in (
            ("time_to_first_token_seconds", "From arrival to the first token", self._ttft),
            ("request_seconds", "From arrival to the end", self._duration),
        ):
            full = f"modelpack_gateway_{name}"
            lines += [f"# HELP {full} {text}.", f"# TYPE {full} histogram", *histogram.lines(full)]
        return "\n".join(lines) + "\n"


def _labelled(labels: Labels) -> str:
    def escaped(value: str) -> str:
        return value.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")

    return "{" + ",".join(f'{name}="{escaped(value)}"' for name, value in labels) + "}"
