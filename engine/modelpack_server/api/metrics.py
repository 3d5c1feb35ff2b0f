"""/metrics of a model server, by prometheus-client: counters of all models, by vLLM's names."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate

from fastapi import APIRouter, Response
from prometheus_client import CONTENT_TYPE_PLAIN_0_0_4, Metric, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily

from modelpack_engine.core.metrics import Histogram, Meter
from modelpack_engine.outputs import EngineStats
from modelpack_server.pool.entry import Entry
from modelpack_server.pool.pool import ModelPool

_LABELS = ("model_name", "engine")

# Name (a counter's ends with _total), help and field of each series.
_SERIES = (
    ("num_requests_running", "Requests that are being computed", "num_running"),
    ("num_requests_waiting", "Requests that wait", "num_waiting"),
    ("num_preemptions_total", "Preemptions", "num_preemptions"),
    ("prompt_tokens_total", "Prompt tokens", "prompt_tokens"),
    ("generation_tokens_total", "Generated tokens", "generated_tokens"),
    ("prefix_cache_queries_total", "Prompt tokens looked up", "prompt_tokens"),
    ("prefix_cache_hits_total", "Prompt tokens found cached", "cached_tokens"),
    ("spec_decode_num_drafts_total", "Proposals verified", "num_proposals"),
    ("spec_decode_num_draft_tokens_total", "Tokens proposed", "proposed_tokens"),
    ("spec_decode_num_accepted_tokens_total", "Tokens proposed that were right", "accepted_tokens"),
)
_OFFLOAD_SERIES = (
    ("restores_total", "Requests that got offloaded blocks", "restores"),
    ("restored_tokens_total", "Tokens of restored blocks", "restored_tokens"),
    ("memory_hits_total", "Blocks restored from memory", "memory_hits"),
    ("disk_hits_total", "Blocks restored from disk", "disk_hits"),
    ("saved_bytes_total", "Bytes copied off the device", "saved_bytes"),
    ("restored_bytes_total", "Bytes copied back", "restored_bytes"),
    ("dropped_files_total", "Damaged files that were removed", "dropped_files"),
    ("memory_bytes", "Bytes of blocks in host memory", "memory_bytes"),
    ("disk_bytes", "Bytes of blocks on disk", "disk_bytes"),
)


class ModelMetrics:
    """Collector of the metrics of all models, by vLLM's names; `model_name` labels the model.

    It reads the counters of `entries` when it is created, so `collect` may run in another thread.
    Before the first model exists, each family has one series of zeros without a name, so that
    dashboards find it.
    """

    def __init__(self, entries: Iterable[Entry]) -> None:
        self._models = [((entry.name, "0"), entry.stats(), entry.meter) for entry in entries]
        if not self._models:
            self._models = [(("", "0"), EngineStats(), Meter())]

    def collect(self) -> Iterator[Metric]:
        models = self._models
        for name, text, field in _SERIES:
            values = [(labels, getattr(stats, field)) for labels, stats, _ in models]
            yield _family(f"vllm:{name}", text, values)
        for name in ("kv_cache_usage_perc", "gpu_cache_usage_perc"):
            used = [(labels, s.blocks_used / (s.blocks_total or 1)) for labels, s, _ in models]
            yield _family(f"vllm:{name}", "Share of KV blocks in use", used)
        yield _family(
            "vllm:request_success_total", "Requests that ended",
            [((*labels, reason), count)
             for labels, _, meter in models for reason, count in meter.finished.items()],
            "finished_reason",
        )  # fmt: skip
        yield _family(
            "vllm:cache_config_info", "The KV cache",
            [((*labels, str(stats.blocks_total)), 1) for labels, stats, _ in models],
            "num_gpu_blocks",
        )  # fmt: skip
        for name in models[0][2].histograms:
            histograms = [(labels, meter.histograms[name]) for labels, _, meter in models]
            yield _histogram(name, histograms)
        values = [(labels, stats.num_steps) for labels, stats, _ in models]
        yield _family("modelpack:engine_steps_total", "Steps of the engine", values)
        for name, text, field in _OFFLOAD_SERIES:
            values = [(labels, getattr(stats.offload, field)) for labels, stats, _ in models]
            yield _family(f"modelpack:kv_offload_{name}", text, values)


def _family(
    name: str, text: str, values: Sequence[tuple[Sequence[str], float]], *more: str
) -> Metric:
    kind = CounterMetricFamily if name.endswith("_total") else GaugeMetricFamily
    family = kind(name, f"{text}.", labels=(*_LABELS, *more))
    for labels, value in values:
        family.add_metric(labels, value)
    return family


def _histogram(name: str, models: Sequence[tuple[Sequence[str], Histogram]]) -> Metric:
    family = HistogramMetricFamily(f"vllm:{name}", f"{models[0][1].help}.", labels=_LABELS)
    for labels, histogram in models:
        bounds = (*(str(float(bound)) for bound in histogram.bounds), "+Inf")
        buckets = list(zip(bounds, accumulate(histogram.counts), strict=True))
        family.add_metric(labels, buckets, histogram.total)
    return family


def add_metrics(routes: APIRouter, pool: ModelPool) -> None:
    """Add the route /metrics."""

    @routes.get("/metrics", response_model=None)
    async def read_metrics() -> Response:
        """Return the counters of all models, in Prometheus's text format."""
        metrics = ModelMetrics(pool.entries())
        # In a thread, since it takes 2.4 ms for each model (one CPU core).
        content = await asyncio.to_thread(generate_latest, metrics)
        return Response(content, media_type=CONTENT_TYPE_PLAIN_0_0_4)
