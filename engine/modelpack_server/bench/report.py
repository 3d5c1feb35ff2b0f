"""Latencies and rates of a run, with the names of vLLM's benchmarks."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

PERCENTILES = (50, 90, 99)


@dataclass(slots=True)
class Record:
    """One request: the time when it was due and the arrival times of its tokens.

    Times are in seconds since the start of the run. `num_tokens` is the number of tokens that the
    server reports, since several tokens may arrive at one time; None means one token for each time.
    `error` says why the response is incomplete.
    """

    label: str
    due: float
    prompt_tokens: int
    token_times: list[float] = field(default_factory=list)
    cached_tokens: int = 0
    num_tokens: int | None = None
    error: str = ""

    @property
    def output_tokens(self) -> int:
        """The number of generated tokens."""
        return len(self.token_times) if self.num_tokens is None else self.num_tokens

    @property
    def ttft(self) -> float:
        """Seconds from the due time to the first token."""
        return self.token_times[0] - self.due

    @property
    def gaps(self) -> list[float]:
        """Seconds between one token and the next (ITL)."""
        return [b - a for a, b in zip(self.token_times, self.token_times[1:], strict=False)]

    @property
    def tpot(self) -> float | None:
        """Seconds per token after the first; None for a single token."""
        count = self.output_tokens - 1
        seconds = self.token_times[-1] - self.token_times[0]
        return seconds / count if count > 0 and len(self.token_times) > 1 else None


@dataclass(frozen=True, slots=True)
class Report:
    """The figures of a run; durations are in seconds.

    Failed requests count only in `requests` and, by message, in `errors`.
    """

    workload: str
    duration: float
    requests: int
    prompt_tokens: int
    output_tokens: int
    cached_tokens: int
    ttft: Mapping[str, float]
    tpot: Mapping[str, float]
    itl: Mapping[str, float]
    e2el: Mapping[str, float]
    errors: Mapping[str, int] = field(default_factory=dict)
    extra: Mapping[str, Any] = field(default_factory=dict)

    @property
    def failed(self) -> int:
        """The number of requests without a complete response."""
        return sum(self.errors.values())

    @property
    def output_rate(self) -> float:
        """Generated tokens per second."""
        return self.output_tokens / self.duration

    @property
    def total_rate(self) -> float:
        """Tokens of prompts and responses per second."""
        return (self.prompt_tokens + self.output_tokens) / self.duration

    @property
    def request_rate(self) -> float:
        """Complete responses per second."""
        return (self.requests - self.failed) / self.duration

    def to_json(self) -> dict[str, Any]:
        """Return all figures, rates included."""
        return {
            "workload": self.workload,
            "duration_s": round(self.duration, 4),
            "requests": self.requests,
            "errors": dict(self.errors),
            "requests_per_s": round(self.request_rate, 3),
            "prompt_tokens": self.prompt_tokens,
            "output_tokens": self.output_tokens,
            "output_tokens_per_s": round(self.output_rate, 2),
            "total_tokens_per_s": round(self.total_rate, 2),
            "cached_share": round(self.cached_tokens / max(1, self.prompt_tokens), 4),
            "ttft_s": _rounded(self.ttft),
            "tpot_s": _rounded(self.tpot),
            "itl_s": _rounded(self.itl),
            "e2el_s": _rounded(self.e2el),
            **self.extra,
        }


def percentile(values: Sequence[float], percent: float) -> float:
    """Return the percentile of `values` by the nearest-rank method."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(percent / 100 * len(ordered)) - 1)]


def summary(values: Iterable[float]) -> dict[str, float]:
    """Return mean and percentiles; empty without values."""
    values = list(values)
    if not values:
        return {}
    found = {f"p{percent}": percentile(values, percent) for percent in PERCENTILES}
    return {"mean": sum(values) / len(values), **found}


def make_report(
    workload: str, records: Sequence[Record], duration: float, extra: Mapping[str, Any]
) -> Report:
    """Return the figures of a run; sessions with a label also get separate latencies."""
    requests = len(records)
    errors = Counter(record.error for record in records if record.error)
    records = [record for record in records if not record.error]
    labelled: dict[str, Any] = {}
    labels = {record.label for record in records} - {""}
    for label in sorted(labels):
        some = [record for record in records if record.label == label]
        labelled[label] = {
            "ttft_s": _rounded(summary(r.ttft for r in some)),
            "tpot_s": _rounded(summary(t for r in some if (t := r.tpot) is not None)),
            "itl_s": _rounded(summary(gap for r in some for gap in r.gaps)),
        }
    return Report(
        workload=workload,
        duration=duration,
        requests=requests,
        prompt_tokens=sum(record.prompt_tokens for record in records),
        output_tokens=sum(record.output_tokens for record in records),
        cached_tokens=sum(record.cached_tokens for record in records),
        ttft=summary(record.ttft for record in records),
        tpot=summary(t for record in records if (t := record.tpot) is not None),
        itl=summary(gap for record in records for gap in record.gaps),
        e2el=summary(record.token_times[-1] - record.due for record in records),
        errors=dict(errors.most_common()),
        extra={**extra, **({"labels": labelled} if labelled else {})},
    )


def _rounded(values: Mapping[str, float]) -> dict[str, float]:
    return {name: round(value, 6) for name, value in values.items()}
