"""The routes below /v1/batches: create, list, read and cancel batches (`batch_runner`)."""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import APIRouter, Request
from pydantic import StrictStr

from modelpack_engine.errors import RequestError
from modelpack_server.api.bodies import BodyRoute, SparseBody
from modelpack_server.api.openai.batch_input import ENDPOINTS
from modelpack_server.api.openai.batch_runner import BatchRunner
from modelpack_server.api.openai.files import expiry
from modelpack_server.api.openai.requests import Metadata, PageLimit
from modelpack_server.api.openai.stored_batches import Sender
from modelpack_server.api.openai.stored_files import KEPT_FOR, page
from modelpack_server.api.paths import add_route
from modelpack_server.gateway.caller import caller_of, key_name_of
from modelpack_server.gateway.forwarding import CALLER_HEADERS

# The headers by which limits and logs name the caller of a request.
_TRACED = frozenset((b"x-modelpack-caller", b"x-modelpack-stack", b"x-modelpack-user"))


class BatchRequest(SparseBody):
    """The body of POST /v1/batches."""

    input_file_id: StrictStr
    endpoint: StrictStr
    completion_window: StrictStr
    metadata: Metadata | None = None
    output_expires_after: dict[str, Any] | None = None

    def check(self) -> None:
        """Raise `RequestError` for values that are not supported."""
        if self.endpoint not in ENDPOINTS:
            raise RequestError(
                f"endpoint is {self.endpoint[:100]!r}, expected one of {', '.join(ENDPOINTS)}",
                param="endpoint",
            )
        if self.completion_window != "24h":
            raise RequestError(
                f"completion_window is {self.completion_window[:100]!r}, expected 24h",
                param="completion_window",
            )

    @property
    def output_seconds(self) -> float:
        """The seconds for which the output is kept; raises `RequestError`."""
        policy, name = self.output_expires_after, "output_expires_after"
        if policy is None:
            return KEPT_FOR
        return expiry(policy.get("anchor"), policy.get("seconds"), name)


def router(runner: BatchRunner) -> APIRouter:
    routes = APIRouter(tags=["OpenAI"], route_class=BodyRoute)

    async def create_batch(body: BatchRequest, request: Request) -> dict[str, Any]:
        """Run the requests in an uploaded file in the background."""
        body.check()
        seconds = body.output_seconds
        owner = caller_of(request.scope).owner
        file = await asyncio.to_thread(runner.files.find, owner, body.input_file_id)
        if file.purpose != "batch":
            raise RequestError(
                f"the purpose of {file.id} is {file.purpose}, expected batch",
                param="input_file_id",
            )
        headers = [
            [name.decode("latin-1"), value.decode("latin-1")]
            for name, value in request.scope["headers"]
            if name in CALLER_HEADERS or (name in _TRACED and len(value) <= 128)
        ]  # fmt: skip
        client = request.client.host if request.client is not None else ""
        sender = Sender(owner, key_name_of(request.scope), headers, client)
        batch = await runner.create(
            sender, file, endpoint=body.endpoint, metadata=body.metadata, output_seconds=seconds
        )
        return batch.json()

    async def list_batches(
        request: Request,
        after: str | None = None,
        limit: PageLimit = 20,
    ) -> dict[str, Any]:
        """List the batches of the API key, the newest first."""
        return page(await runner.list(caller_of(request.scope).owner), after, limit)

    async def retrieve_batch(batch_id: str, request: Request) -> dict[str, Any]:
        """Return a batch."""
        return (await runner.find(caller_of(request.scope).owner, batch_id)).json()

    async def cancel_batch(batch_id: str, request: Request) -> dict[str, Any]:
        """Cancel a batch; the requests that have ended keep their replies."""
        return (await runner.cancel(caller_of(request.scope).owner, batch_id)).json()

    add_route(routes, "/batches", create_batch)
    add_route(routes, "/batches", list_batches, methods=["GET"])
    add_route(routes, "/batches/{batch_id}", retrieve_batch, methods=["GET"])
    add_route(routes, "/batches/{batch_id}/cancel", cancel_batch)
    return routes
