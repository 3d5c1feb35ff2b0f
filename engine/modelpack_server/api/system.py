"""The routes /health, /version, /metrics and /logs."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import AsyncGenerator, Iterable
from contextlib import AsyncExitStack

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse, PlainTextResponse

import modelpack
from modelpack_engine.core.metrics import Histogram, Meter
from modelpack_engine.outputs import EngineStats
from modelpack_server.api.errors import Problem
from modelpack_server.api.sse import LiveStream
from modelpack_server.pool.entry import Entry
from modelpack_server.pool.pool import ModelPool

_LINES = 2000
_WAITING = 10_000


class LogBuffer(logging.Handler):
    """A handler that keeps the last lines and passes new ones to whoever follows."""

    def __init__(self, lines: int = _LINES) -> None:
        super().__init__()
        self.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        self._lines: deque[str] = deque(maxlen=lines)
        self._followers: dict[asyncio.Queue[str], asyncio.AbstractEventLoop] = {}

    def emit(self, record: logging.LogRecord) -> None:
        """Keep a record."""
        try:
            line = self.format(record) + "\n"
        except (TypeError, ValueError):  # a message and arguments that do not fit
            self.handleError(record)
            return
        self._lines.append(line)
        for queue, loop in list(self._followers.items()):
            if not loop.is_closed():
                loop.call_soon_threadsafe(_put, queue, line)

    def text(self) -> str:
        """Return the lines that are kept."""
        return "".join(self._lines)

    async def follow(self) -> AsyncGenerator[str, None]:
        """Yield the lines that are kept, then each one as it comes, for ever."""
        queue: asyncio.Queue[str] = asyncio.Queue(_WAITING)
        self._followers[queue] = asyncio.get_running_loop()
        try:
            yield self.text()
            while True:
                yield await queue.get()
        finally:
            self._followers.pop(queue, None)


def _put(queue: asyncio.Queue[str], line: str) -> None:
    if not queue.full():  # who reads too slowly misses lines
        queue.put_nowait(line)


CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_SERIES = (
    ("num_requests_running", "gauge", "Requests that are being computed", "num_running"),
    ("num_requests_waiting", "gauge", "Requests that wait", "num_waiting"),
    ("num_preemptions_total", "counter", "Preemptions", "num_preemptions"),
    ("prompt_tokens_total", "counter", "Prompt tokens", "prompt_tokens"),
    ("generation_tokens_total", "counter", "Generated tokens", "generated_tokens"),
    ("prefix_cache_queries_total", "counter", "Prompt tokens looked up", "prompt_tokens"),
    ("prefix_cache_hits_total", "counter", "Prompt tokens found cached", "cached_tokens"),
    ("spec_decode_num_drafts_total", "counter", "Proposals verified", "num_proposals"),
    ("spec_decode_num_draft_tokens_total", "counter", "Tokens proposed", "proposed_tokens"),
    (
        "spec_decode_num_accepted_tokens_total",
        "counter",
        "Tokens proposed that were right",
        "accepted_tokens",
    ),
)

_OFFLOAD_SERIES = (
    ("restores_total", "counter", "Requests that got offloaded blocks", "restores"),
    ("restored_tokens_total", "counter", "Tokens of restored blocks", "restored_tokens"),
    ("memory_hits_total", "counter", "Blocks restored from memory", "memory_hits"),
    ("disk_hits_total", "counter", "Blocks restored from disk", "disk_hits"),
    ("saved_bytes_total", "counter", "Bytes copied off the device", "saved_bytes"),
    ("restored_bytes_total", "counter", "Bytes copied back", "restored_bytes"),
    ("dropped_files_total", "counter", "Damaged files that were removed", "dropped_files"),
    ("memory_bytes", "gauge", "Bytes of blocks in host memory", "memory_bytes"),
    ("disk_bytes", "gauge", "Bytes of blocks on disk", "disk_bytes"),
)


def render(entries: Iterable[Entry]) -> str:
    """Return the text; a model's name becomes the label `model_name`.

    All families are there before the first model is, at 0.
    """
    models = [(_label(e.name), e.stats(), e.meter) for e in entries]
    if not models:
        models = [(_label(""), EngineStats(), Meter())]
    lines: list[str] = []
    for name, kind, text, field in _SERIES:
        values = [(label, float(getattr(stats, field))) for label, stats, _ in models]
        lines += _family(f"vllm:{name}", kind, text, values)
    for name in ("kv_cache_usage_perc", "gpu_cache_usage_perc"):
        values = [(label, _used(stats)) for label, stats, _ in models]
        lines += _family(f"vllm:{name}", "gauge", "Share of KV blocks in use", values)
    lines += _family(
        "vllm:request_success_total", "counter", "Requests that ended",
        [(f'{label},finished_reason="{reason}"', float(count))
         for label, _, meter in models for reason, count in meter.finished.items()],
    )  # fmt: skip
    lines += _family(
        "vllm:cache_config_info", "gauge", "The KV cache",
        [(f'{label},num_gpu_blocks="{stats.blocks_total}"', 1.0) for label, stats, _ in models],
    )  # fmt: skip
    for name in models[0][2].histograms:
        lines += _histogram(name, [(label, meter.histograms[name]) for label, _, meter in models])
    values = [(label, float(stats.num_steps)) for label, stats, _ in models]
    lines += _family("modelpack:engine_steps_total", "counter", "Steps of the engine", values)
    for name, kind, text, field in _OFFLOAD_SERIES:
        values = [(label, float(getattr(stats.offload, field))) for label, stats, _ in models]
        lines += _family(f"modelpack:kv_offload_{name}", kind, text, values)
    return "\n".join(lines) + "\n"


def _family(name: str, kind: str, text: str, values: list[tuple[str, float]]) -> list[str]:
    head = [f"# HELP {name} {text}.", f"# TYPE {name} {kind}"]
    return head + [f"{name}{{{label}}} {value:g}" for label, value in values]


def _histogram(name: str, models: list[tuple[str, Histogram]]) -> list[str]:
    name = f"vllm:{name}"
    lines = [f"# HELP {name} {models[0][1].help}.", f"# TYPE {name} histogram"]
    for label, histogram in models:
        count = 0
        for bound, number in zip(histogram.bounds, histogram.counts, strict=False):
            count += number
            lines.append(f'{name}_bucket{{{label},le="{float(bound)}"}} {count}')
        count += histogram.counts[-1]
        lines.append(f'{name}_bucket{{{label},le="+Inf"}} {count}')
        lines.append(f"{name}_sum{{{label}}} {histogram.total:g}")
        lines.append(f"{name}_count{{{label}}} {count}")
    return lines


def _label(name: str) -> str:
    escaped = name.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
    return f'model_name="{escaped}",engine="0"'


def _used(stats: EngineStats) -> float:
    return stats.blocks_used / stats.blocks_total if stats.blocks_total else 0.0


def router(pool: ModelPool, logs: LogBuffer) -> APIRouter:
    """Return the routes."""
    routes = APIRouter(tags=["server"])

    @routes.get("/health", response_model=None)
    @routes.get("/ping", response_model=None, include_in_schema=False)
    @routes.get("/v1/health", response_model=None, include_in_schema=False)
    async def health() -> Response:
        """Say 200 once all models that were named at the start are loaded, 503 before."""
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
        return Response(render(pool.entries()), media_type=CONTENT_TYPE)

    @routes.get("/logs", response_model=None)
    async def read_logs(request: Request) -> Response:
        """Return the last lines of the log; with `follow`, also those that come."""
        follow = request.query_params.get("follow", "false").lower()
        if follow in ("", "1", "true"):
            return LiveStream(logs.follow(), AsyncExitStack(), media_type="text/plain")
        return PlainTextResponse(logs.text())

    return routes
