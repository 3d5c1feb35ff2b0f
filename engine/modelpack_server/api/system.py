"""The operator's routes: /health, /version, /metrics, /logs, and /pool to list, unload and
configure models.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections import deque
from collections.abc import AsyncGenerator, Iterable, Iterator, Sequence
from contextlib import AsyncExitStack
from datetime import UTC, datetime, timedelta
from itertools import accumulate
from typing import Annotated, Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse, PlainTextResponse
from prometheus_client import (
    CONTENT_TYPE_PLAIN_0_0_4,
    Metric,
    generate_latest,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from pydantic import ConfigDict, Field, StrictBool, StrictStr

import modelpack
from modelpack_engine.core.metrics import Histogram, Meter
from modelpack_engine.errors import RequestError
from modelpack_engine.outputs import EngineStats
from modelpack_server.api.bodies import Body, BodyRoute
from modelpack_server.api.errors import Problem
from modelpack_server.api.sse import LiveStream
from modelpack_server.pool.entry import Entry, RunningModel
from modelpack_server.pool.pool import ModelPool
from modelpack_server.pool.settings import ModelSettings, parse_keep_alive, show_keep_alive

_LINES = 2000
_WAITING = 10_000


class LogBuffer(logging.Handler):
    """A logging handler that keeps the last lines and passes new ones to followers."""

    def __init__(self, lines: int = _LINES) -> None:
        super().__init__()
        self.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        self._lines: deque[str] = deque(maxlen=lines)
        self._followers: dict[asyncio.Queue[str], asyncio.AbstractEventLoop] = {}

    def emit(self, record: logging.LogRecord) -> None:
        """Keep the formatted record and pass it to the followers."""
        try:
            line = self.format(record) + "\n"
        except (TypeError, ValueError):  # the arguments do not match the message
            self.handleError(record)
            return
        self._lines.append(line)
        for queue, loop in list(self._followers.items()):
            if not loop.is_closed():
                loop.call_soon_threadsafe(_put, queue, line)

    def text(self) -> str:
        """Return the kept lines."""
        return "".join(self._lines)

    async def follow(self) -> AsyncGenerator[str, None]:
        """Yield the kept lines, then each new line, without end."""
        queue: asyncio.Queue[str] = asyncio.Queue(_WAITING)
        self._followers[queue] = asyncio.get_running_loop()
        try:
            yield self.text()
            while True:
                yield await queue.get()
        finally:
            self._followers.pop(queue, None)


def _put(queue: asyncio.Queue[str], line: str) -> None:
    if not queue.full():  # a slow follower misses lines
        queue.put_nowait(line)


_LABELS = ("model_name", "engine")
_Family = type[CounterMetricFamily] | type[GaugeMetricFamily]

_SERIES = (
    ("num_requests_running", GaugeMetricFamily, "Requests that are being computed", "num_running"),
    ("num_requests_waiting", GaugeMetricFamily, "Requests that wait", "num_waiting"),
    ("num_preemptions_total", CounterMetricFamily, "Preemptions", "num_preemptions"),
    ("prompt_tokens_total", CounterMetricFamily, "Prompt tokens", "prompt_tokens"),
    ("generation_tokens_total", CounterMetricFamily, "Generated tokens", "generated_tokens"),
    ("prefix_cache_queries_total", CounterMetricFamily, "Prompt tokens looked up", "prompt_tokens"),
    ("prefix_cache_hits_total", CounterMetricFamily, "Prompt tokens found cached", "cached_tokens"),
    ("spec_decode_num_drafts_total", CounterMetricFamily, "Proposals verified", "num_proposals"),
    (
        "spec_decode_num_draft_tokens_total",
        CounterMetricFamily,
        "Tokens proposed",
        "proposed_tokens",
    ),
    (
        "spec_decode_num_accepted_tokens_total",
        CounterMetricFamily,
        "Tokens proposed that were right",
        "accepted_tokens",
    ),
)

_OFFLOAD_SERIES = (
    ("restores_total", CounterMetricFamily, "Requests that got offloaded blocks", "restores"),
    ("restored_tokens_total", CounterMetricFamily, "Tokens of restored blocks", "restored_tokens"),
    ("memory_hits_total", CounterMetricFamily, "Blocks restored from memory", "memory_hits"),
    ("disk_hits_total", CounterMetricFamily, "Blocks restored from disk", "disk_hits"),
    ("saved_bytes_total", CounterMetricFamily, "Bytes copied off the device", "saved_bytes"),
    ("restored_bytes_total", CounterMetricFamily, "Bytes copied back", "restored_bytes"),
    (
        "dropped_files_total",
        CounterMetricFamily,
        "Damaged files that were removed",
        "dropped_files",
    ),
    ("memory_bytes", GaugeMetricFamily, "Bytes of blocks in host memory", "memory_bytes"),
    ("disk_bytes", GaugeMetricFamily, "Bytes of blocks on disk", "disk_bytes"),
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
        """Yield the metric families."""
        models = self._models
        for name, kind, text, field in _SERIES:
            values = [(labels, getattr(stats, field)) for labels, stats, _ in models]
            yield _family(kind, f"vllm:{name}", text, values)
        for name in ("kv_cache_usage_perc", "gpu_cache_usage_perc"):
            values = [(labels, _used(stats)) for labels, stats, _ in models]
            yield _family(GaugeMetricFamily, f"vllm:{name}", "Share of KV blocks in use", values)
        yield _family(
            CounterMetricFamily, "vllm:request_success_total", "Requests that ended",
            [((*labels, reason), count)
             for labels, _, meter in models for reason, count in meter.finished.items()],
            "finished_reason",
        )  # fmt: skip
        yield _family(
            GaugeMetricFamily, "vllm:cache_config_info", "The KV cache",
            [((*labels, str(stats.blocks_total)), 1) for labels, stats, _ in models],
            "num_gpu_blocks",
        )  # fmt: skip
        for name in models[0][2].histograms:
            histograms = [(labels, meter.histograms[name]) for labels, _, meter in models]
            yield _histogram(name, histograms)
        values = [(labels, stats.num_steps) for labels, stats, _ in models]
        yield _family(
            CounterMetricFamily, "modelpack:engine_steps_total", "Steps of the engine", values
        )
        for name, kind, text, field in _OFFLOAD_SERIES:
            values = [(labels, getattr(stats.offload, field)) for labels, stats, _ in models]
            yield _family(kind, f"modelpack:kv_offload_{name}", text, values)


def _family(
    kind: _Family, name: str, text: str, values: Sequence[tuple[Sequence[str], float]], *more: str
) -> Metric:
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


def _used(stats: EngineStats) -> float:
    return stats.blocks_used / stats.blocks_total if stats.blocks_total else 0.0


def router(pool: ModelPool, logs: LogBuffer) -> APIRouter:
    """Return the routes /health, /version, /metrics and /logs."""
    routes = APIRouter(tags=["server"])

    @routes.get("/health", response_model=None)
    @routes.get("/ping", response_model=None, include_in_schema=False)
    @routes.get("/v1/health", response_model=None, include_in_schema=False)
    async def health() -> Response:
        """Return 200 if all models named at start are loaded, else 503."""
        ready, why = pool.readiness()
        if ready:
            return JSONResponse({"status": "ok"})
        return Problem(503, why, code="not_ready", headers={"Retry-After": "1"}).response()

    @routes.get("/version")
    async def version() -> dict[str, str]:
        """Return the version of this program."""
        return {"version": modelpack.__version__}

    @routes.get("/metrics", response_model=None)
    async def read_metrics() -> Response:
        """Return the counters of all models, in Prometheus's text format."""
        metrics = ModelMetrics(pool.entries())
        # In a thread, since it takes 2.4 ms for each model (one CPU core).
        content = await asyncio.to_thread(generate_latest, metrics)
        return Response(content, media_type=CONTENT_TYPE_PLAIN_0_0_4)

    @routes.get("/logs", response_model=None)
    async def read_logs(request: Request) -> Response:
        """Return the last lines of the log; with `follow`, also new lines as they arrive."""
        follow = request.query_params.get("follow", "false").lower()
        if follow in ("", "1", "true"):
            return LiveStream(logs.follow(), AsyncExitStack(), media_type="text/plain")
        return PlainTextResponse(logs.text())

    return routes


class UnloadRequest(Body):
    """Which models to unload; with `wait`, running requests get some time to finish."""

    model_config = ConfigDict(extra="forbid")
    models: list[StrictStr] = []
    all: StrictBool = False
    wait: StrictBool = True


class ConfigureRequest(Body):
    """New settings of a model; missing fields have the server's defaults."""

    model_config = ConfigDict(extra="forbid")
    model: Annotated[StrictStr, Field(min_length=1)]
    context_size: Annotated[int, Field(gt=1, le=1 << 31)] | None = None
    preset: StrictStr | None = None
    runtime_flags: list[StrictStr] = []
    keep_alive: StrictStr | float | None = None


def pool_router(pool: ModelPool) -> APIRouter:
    """Return the routes below /pool."""
    routes = APIRouter(prefix="/pool", tags=["pool"], route_class=BodyRoute)

    @routes.get("")
    async def running() -> dict[str, Any]:
        """List the models that are loaded, loading or unloading."""
        now = pool.clock()
        return {"models": [_shown(model, now) for model in pool.running()], "memory": pool.memory}

    @routes.post("/unload")
    async def unload(body: UnloadRequest) -> dict[str, Any]:
        """Unload models; their running requests fail after the grace period."""
        if body.all == bool(body.models):
            raise RequestError("models or all is required", param="models")
        grace = None if body.wait else 0.0
        return {"unloaded": await pool.unload(None if body.all else body.models, grace=grace)}

    @routes.post("/configure")
    async def configure(body: ConfigureRequest) -> dict[str, Any]:
        """Configure a model, which is reloaded on its next use. 409 while it is in use."""
        kept = body.keep_alive
        settings = ModelSettings(
            context_size=body.context_size,
            preset=body.preset,
            runtime_flags=tuple(body.runtime_flags),
            keep_alive=None if kept is None else parse_keep_alive(kept),
        )
        await pool.configure(body.model, settings)
        return _settings(await pool.settings(body.model))

    return routes


def _shown(model: RunningModel, clock: float) -> dict[str, Any]:
    now = datetime.now(UTC)

    def at(time: float | None) -> str | None:
        if time is None or time == math.inf:
            return None
        return (now + timedelta(seconds=time - clock)).isoformat(timespec="seconds")

    return {
        "name": model.name,
        "names": model.stored.names,
        "digest": model.stored.key,
        "state": str(model.state),
        "users": model.users,
        "last_used": at(model.last_used),
        "expires_at": at(model.expires_at),
        "keep_alive": show_keep_alive(model.keep_alive),
        "pinned": model.pinned,
        "memory": model.memory,
        "context_size": model.context_size,
        "settings": _settings(model.settings),
    }


def _settings(settings: ModelSettings) -> dict[str, Any]:
    kept = settings.keep_alive
    return {
        "context_size": settings.context_size,
        "preset": settings.preset,
        "runtime_flags": settings.runtime_flags,
        "keep_alive": None if kept is None else show_keep_alive(kept),
    }
