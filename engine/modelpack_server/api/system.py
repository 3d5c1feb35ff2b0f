"""Health, version, logs and metrics of the server itself."""

from __future__ import annotations

from contextlib import AsyncExitStack

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse, PlainTextResponse

import modelpack
from modelpack_server.api import metrics
from modelpack_server.api.logs import LogBuffer
from modelpack_server.api.problems import Problem, openai_shape
from modelpack_server.api.sse import LiveStream
from modelpack_server.pool.pool import ModelPool


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
        return openai_shape(Problem(503, why, code="not_ready", headers={"Retry-After": "1"}))

    @routes.get("/version")
    async def version() -> dict[str, str]:
        """Return the version of this program."""
        return {"version": modelpack.__version__}

    @routes.get("/metrics", response_model=None)
    async def read_metrics() -> Response:
        """Return the counters of all models, in Prometheus's text format."""
        return Response(metrics.render(pool.entries()), media_type=metrics.CONTENT_TYPE)

    @routes.get("/logs", response_model=None)
    async def read_logs(request: Request) -> Response:
        """Return the last lines of the log; with `follow`, also those that come."""
        follow = request.query_params.get("follow", "false").lower()
        if follow in ("", "1", "true"):
            return LiveStream(logs.follow(), AsyncExitStack(), media_type="text/plain")
        return PlainTextResponse(logs.text())

    return routes
