"""POST /api/pull and /api/push: models to and from registries, told as it goes on."""

from __future__ import annotations

from dataclasses import replace

from fastapi import APIRouter, Request, Response

from modelpack.operations.pull import pull
from modelpack.operations.push import push
from modelpack.operations.remote import RemoteOptions
from modelpack.progress import ProgressCallback, Stop
from modelpack.reference import Reference
from modelpack_server.api.ollama.bodies import TransferBody
from modelpack_server.api.ollama.jobs import Jobs
from modelpack_server.api.ollama.names import find
from modelpack_server.api.ollama.ndjson import JsonRoute
from modelpack_server.api.ollama.telling import Steps, tell
from modelpack_server.pool.pool import ModelPool

_PULL = Steps("pulling manifest", "pulling", ("verifying sha256 digest", "writing manifest"))
_PUSH = Steps("retrieving manifest", "pushing", ("pushing manifest",))


def router(pool: ModelPool) -> APIRouter:
    """Return the routes."""
    routes = APIRouter(tags=["Ollama"], route_class=JsonRoute)
    jobs = Jobs()

    @routes.post("/api/pull", response_model=None)
    async def pull_model(body: TransferBody, request: Request) -> Response:
        """Fetch a model; who asks for one that is being fetched waits for the same."""
        where, remote = Reference.parse(body.model), _remote(pool, body)
        store = pool.catalogue.store

        def work(report: ProgressCallback, stop: Stop) -> None:
            pull(where, store=store, remote=remote, progress=report, stop=stop)

        job = jobs.get(("pull", str(where), body.insecure), work)
        return await tell(request, job, _PULL, stream=body.stream)

    @routes.post("/api/push", response_model=None)
    async def push_model(body: TransferBody, request: Request) -> Response:
        """Send a model to the registry that its name says."""
        found = await find(pool, body.model)
        where, remote = Reference.parse(body.model), _remote(pool, body)
        store = pool.catalogue.store

        def work(report: ProgressCallback, stop: Stop) -> None:
            push(found.key, to=where, store=store, remote=remote, progress=report, stop=stop)

        job = jobs.get(("push", str(where), body.insecure), work)
        return await tell(request, job, _PUSH, stream=body.stream)

    return routes


def _remote(pool: ModelPool, body: TransferBody) -> RemoteOptions:
    """Return how to reach the registry: over plain HTTP if the request says so."""
    remote = pool.catalogue.remote
    return replace(remote, plain_http=True) if body.insecure else remote
