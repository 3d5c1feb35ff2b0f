"""answer: what all requests for text have in common, whichever API they came by.

A model is leased, the request is started before anything is sent, so that what is wrong with it has
a status of its own; and when the client leaves, at whatever stage, its work is dropped.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine
from contextlib import AsyncExitStack
from typing import Any, Protocol, TypeVar

from fastapi import Request, Response
from fastapi.responses import JSONResponse

from modelpack.errors import UsageError
from modelpack_engine.embedding.async_embedder import AsyncEmbedder
from modelpack_engine.errors import RequestError
from modelpack_server.api.problems import ClientGoneError
from modelpack_server.api.sse import LiveStream, gone, openai_error
from modelpack_server.conversation.served import ServedModel
from modelpack_server.pool.keep_alive import parse_keep_alive
from modelpack_server.pool.pool import ModelPool

T = TypeVar("T")


class Abortable(Protocol):
    """What runs in an engine."""

    def abort(self) -> None:
        """End it; does nothing once it has ended."""


S = TypeVar("S", bound=Abortable)


async def answer(
    request: Request,
    pool: ModelPool,
    name: str,
    start: Callable[[ServedModel], Awaitable[S]],
    whole: Callable[[ServedModel, S], Coroutine[Any, Any, Any]],
    pieces: Callable[[ServedModel, S], AsyncGenerator[str, None]] | None,
    *,
    keep_alive: str | float | None = None,
    media_type: str = "text/event-stream",
    failure: Callable[[Exception], str] = openai_error,
) -> Response:
    """Answer with the JSON or the response that `whole` returns, or with the stream of `pieces`
    where it is given.

    `start` hands the request to the engine of the leased model `name`. `media_type` and `failure`
    are the stream's. Raises what `start` and `ModelPool.lease` do.
    """
    seconds = _seconds(keep_alive)
    async with AsyncExitStack() as opened:

        async def begin() -> tuple[ServedModel, S]:
            model = await opened.enter_async_context(pool.lease(name, keep_alive=seconds))
            check_generates(model, name)
            return model, await start(model)

        model, stream = await unless_gone(request, begin())
        opened.callback(stream.abort)
        if pieces is None:
            made = await unless_gone(request, whole(model, stream))
            return made if isinstance(made, Response) else JSONResponse(made)
        return LiveStream(
            pieces(model, stream), opened.pop_all(), media_type=media_type, failure=failure
        )
    raise AssertionError("the exit stack swallows nothing")


def check_generates(model: ServedModel, name: str) -> None:
    """Raise `RequestError`, saying what to use instead, for a model that generates no text.

    `name` is what the request calls the model.
    """
    if not isinstance(model.engine, AsyncEmbedder):
        return
    ranks = model.engine.ranks_pairs
    raise RequestError(
        f"{name} {'ranks documents' if ranks else 'gives embeddings'}, and generates no text",
        param="model",
        hint=f"use it with {'/v1/rerank or /v1/score' if ranks else '/v1/embeddings'}",
    )


def _seconds(keep_alive: str | float | None) -> float | None:
    try:
        return None if keep_alive is None else parse_keep_alive(keep_alive)
    except UsageError as error:
        raise RequestError(str(error), param="keep_alive") from None


async def unless_gone(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """Return what `work` returns; cancel it, and raise `ClientGoneError`, if the client leaves."""
    worker = asyncio.ensure_future(work)
    watcher = asyncio.ensure_future(gone(request.receive))
    try:
        await asyncio.wait({worker, watcher}, return_when=asyncio.FIRST_COMPLETED)
        if worker.done():
            return worker.result()
        raise ClientGoneError("the client has left")
    finally:
        for task in (worker, watcher):
            task.cancel()
        await asyncio.gather(worker, watcher, return_exceptions=True)
