"""Models from and to registries, two at a time, with progress for the client."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace

from fastapi import Request, Response
from pydantic import ConfigDict, Field

from modelpack.errors import UsageError
from modelpack.model import Model
from modelpack.operations.find import inspect, stored_model
from modelpack.operations.pull import pull
from modelpack.operations.push import push
from modelpack.operations.remote import RemoteOptions
from modelpack.progress import ProgressCallback, Stop
from modelpack.reference import Reference, is_model_id
from modelpack.registry import Credential
from modelpack_server.api.answering import unless_gone
from modelpack_server.api.json_bodies import Body
from modelpack_server.api.runner.naming import find_stored
from modelpack_server.api.runner.progress import Lines, stream_progress
from modelpack_server.pool.pool import ModelPool

# As many as Docker Model Runner.
_AT_A_TIME = 2


class TransferRequest(Body):
    """The body of POST /models/create, and of a push, which names no model."""

    model_config = ConfigDict(populate_by_name=True)
    source: str = Field("", alias="from")
    bearer_token: str = Field("", alias="bearer-token")


@dataclass(frozen=True, slots=True)
class BearerToken:
    """A token that is sent as it is, to one registry only."""

    host: str
    token: str

    def credential(self, host: str) -> Credential | None:
        """Return the token for its host, nothing for others."""
        if host != self.host:
            return None
        return Credential(registry_token=self.token, source="the request")


class Transfers:
    """Pulls into, and pushes from, the store of a pool."""

    def __init__(self, pool: ModelPool) -> None:
        self._pool = pool
        self._limit = asyncio.Semaphore(_AT_A_TIME)

    async def pull(self, request: Request, body: TransferRequest) -> Response:
        """Pull a model; raises what `modelpack.pull` does as long as nothing was sent."""
        if not body.source:
            raise UsageError("from is missing: it names the model to pull")
        reference = Reference.parse(body.source)
        remote = _remote(self._pool, reference, body.bearer_token)
        store = self._pool.catalogue.store

        def work(lines: Lines, report: ProgressCallback, stop: Stop) -> str:
            found = inspect(str(reference), remote=remote, from_registry=True, stop=stop)
            lines.total = _total(found)
            pull(reference, store=store, remote=remote, progress=report, stop=stop)
            return "Model pulled successfully"

        async with AsyncExitStack() as opened:
            await unless_gone(request, opened.enter_async_context(self._limit))
            return await stream_progress(request, work, opened.pop_all(), mode="pull")
        raise AssertionError("the exit stack swallows nothing")

    async def push(self, request: Request, ref: str, body: TransferRequest) -> Response:
        """Push a model; raises what `modelpack.push` does as long as nothing was sent."""
        if is_model_id(ref):
            raise UsageError(f"{ref} is an id, and does not say where to push: tag it first")
        reference = Reference.parse(ref)
        remote = _remote(self._pool, reference, body.bearer_token)
        store = self._pool.catalogue.store
        name, stored = await asyncio.to_thread(find_stored, store, ref)
        where = reference if name == ref else Reference.parse(name)

        def work(lines: Lines, report: ProgressCallback, stop: Stop) -> str:
            lines.total = _total(stored_model(store, str(stored.digest)))
            push(name, to=where, store=store, remote=remote, progress=report, stop=stop)
            return "Model pushed successfully"

        async with AsyncExitStack() as opened:
            await unless_gone(request, opened.enter_async_context(self._limit))
            return await stream_progress(request, work, opened.pop_all(), mode="push")
        raise AssertionError("the exit stack swallows nothing")


def _remote(pool: ModelPool, reference: Reference, token: str) -> RemoteOptions:
    """Return how to reach the registry: as the server does, with the token of the request."""
    remote = pool.catalogue.remote
    if not token:
        return remote
    return replace(remote, credentials=BearerToken(reference.registry, token))


def _total(model: Model) -> int:
    return sum(blob.size for blob in model.manifest.unique_blobs)
