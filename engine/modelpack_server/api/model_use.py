"""Acquire a model for a request, respond with its output, and handle `X-Preload-Only`.

Source of the header: Docker Model Runner (pkg/inference/scheduling/http_handler.go); its command
line sends it with an empty list of messages.
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
from modelpack_engine.speech.async_transcriber import AsyncTranscriber
from modelpack_server.api.bodies import BodyRoute, read_json
from modelpack_server.api.errors import ClientGoneError
from modelpack_server.api.sse import LiveStream, gone, openai_error
from modelpack_server.conversation.served_model import ServedModel
from modelpack_server.pool.pool import ModelPool
from modelpack_server.pool.settings import parse_keep_alive

#: The request header that names a preset.
PRESET_HEADER = "x-modelpack-preset"
_PRELOAD_HEADER = "x-preload-only"


def preloadable(pool: ModelPool) -> type[BodyRoute]:
    """Return a route class that handles `X-Preload-Only` before parsing the body."""

    class PreloadRoute(BodyRoute):
        def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
            answer = super().get_route_handler()

            async def handle(request: Request) -> Response:
                if request.headers.get(_PRELOAD_HEADER, "").lower() != "true":
                    return await answer(request)
                await pool.preload(await _model_named(request))
                return Response(status_code=200)

            return handle

    return PreloadRoute


async def _model_named(request: Request) -> str:
    body = await read_json(request)
    name = body.get("model") if isinstance(body, dict) else None
    if not isinstance(name, str) or not name:
        raise RequestError("model is required", param="model")
    return name


T = TypeVar("T")


class Abortable(Protocol):
    def abort(self) -> None:
        """End the request; does nothing if it has ended."""


S = TypeVar("S", bound=Abortable)


class Generation(Protocol):
    """The common fields of the bodies that ask for text."""

    @property
    def model(self) -> str: ...

    @property
    def stream(self) -> bool: ...

    @property
    def keep_alive(self) -> str | float | None: ...


async def answer(
    request: Request,
    pool: ModelPool,
    body: Generation,
    start: Callable[[ServedModel], Awaitable[S]],
    whole: Callable[[ServedModel, S], Coroutine[Any, Any, Any]],
    pieces: Callable[[ServedModel, S], AsyncGenerator[str, None]],
    *,
    media_type: str = "text/event-stream",
    failure: Callable[[Exception], str] = openai_error,
) -> Response:
    """Respond with the JSON or the response that `whole` returns, or stream `pieces`.

    `start` submits the request to the engine of the model, which is leased until the response ends.
    `media_type` and `failure` describe the stream. Raises what `start` and `ModelPool.lease` raise.
    """
    seconds = seconds_of(body.keep_alive)
    async with AsyncExitStack() as opened:

        async def begin() -> tuple[ServedModel, S]:
            model = await opened.enter_async_context(pool.lease(body.model, keep_alive=seconds))
            check_generates(model, body.model)
            return model, await start(model)

        model, stream = await unless_gone(request, begin())
        opened.callback(stream.abort)
        if not body.stream:
            made = await unless_gone(request, whole(model, stream))
            return made if isinstance(made, Response) else JSONResponse(made)
        return LiveStream(
            pieces(model, stream), opened.pop_all(), media_type=media_type, failure=failure
        )
    raise AssertionError("unreachable: the exit stack suppresses no exception")


def check_generates(model: ServedModel, name: str) -> None:
    """Raise `RequestError` for a model that generates no text; the hint names the right route.

    `name` is the model's name in the request.
    """
    if isinstance(model.engine, AsyncTranscriber):
        raise RequestError(
            f"{name} transcribes sound and answers no prompts",
            param="model",
            hint="use it with /v1/audio/transcriptions",
        )
    if not isinstance(model.engine, AsyncEmbedder):
        return
    ranks = model.engine.ranks_pairs
    raise RequestError(
        f"{name} {'ranks documents' if ranks else 'computes embeddings'} and generates no text",
        param="model",
        hint=f"use it with {'/v1/rerank or /v1/score' if ranks else '/v1/embeddings'}",
    )


def check_transcribes(model: ServedModel, name: str) -> AsyncTranscriber:
    """Return the engine of a speech-to-text model; raise `RequestError` for another model."""
    if isinstance(model.engine, AsyncTranscriber):
        return model.engine
    raise RequestError(
        f"{name} is not a speech-to-text model",
        param="model",
        hint="GET /v1/models lists those that have the capability transcription",
    )


def seconds_of(keep_alive: str | float | None) -> float | None:
    """Return `keep_alive` in seconds; raises `RequestError`."""
    try:
        return None if keep_alive is None else parse_keep_alive(keep_alive)
    except UsageError as error:
        raise RequestError(str(error), param="keep_alive") from None


async def unless_gone(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """Return the result of `work`; cancel it if the client disconnects.

    Raises `ClientGoneError` in that case.
    """
    worker = asyncio.ensure_future(work)
    watcher = asyncio.ensure_future(gone(request.receive))
    try:
        await asyncio.wait({worker, watcher}, return_when=asyncio.FIRST_COMPLETED)
        if worker.done():
            return worker.result()
        raise ClientGoneError("the client disconnected")
    finally:
        for task in (worker, watcher):
            task.cancel()
        await asyncio.gather(worker, watcher, return_exceptions=True)


async def with_embedding_model(
    request: Request,
    pool: ModelPool,
    name: str,
    work: Callable[[AsyncEmbedder], Awaitable[T]],
    *,
    keep_alive: str | float | None = None,
) -> T:
    """Return the result of `work` for the model `name`; cancel it if the client disconnects.

    Raises `RequestError` for a model that generates text, and what `ModelPool.lease` raises.
    """
    seconds = None if keep_alive is None else parse_keep_alive(keep_alive)

    async def run() -> T:
        async with pool.lease(name, keep_alive=seconds) as served:
            if isinstance(served.engine, AsyncTranscriber):
                check_generates(served, name)
            if not isinstance(served.engine, AsyncEmbedder):
                raise RequestError(
                    f"{name} generates text; it is not an embedding model",
                    param="model",
                    hint="if the model can compute embeddings too, set its mode to embedding",
                )
            return await work(served.engine)

    return await unless_gone(request, run())
