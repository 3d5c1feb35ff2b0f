"""From a started answer to what is sent: as a whole, or line by line; and requests without one."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any

from fastapi import Request, Response
from fastapi.responses import JSONResponse

from modelpack.errors import UsageError
from modelpack_engine.errors import RequestError
from modelpack_server.api.answering import answer, unless_gone
from modelpack_server.api.large_json import call, large_response, written
from modelpack_server.api.ollama import ndjson, replies
from modelpack_server.api.ollama.asking import fit_context
from modelpack_server.api.ollama.bodies import KeepAlive, TextBody
from modelpack_server.api.ollama.names import find
from modelpack_server.api.ollama.replies import Clock, Pieces, Reader, Writer
from modelpack_server.api.sse import dumps
from modelpack_server.api.vocabulary import Vocabulary
from modelpack_server.conversation.chat import ChatStream
from modelpack_server.conversation.served import ServedModel
from modelpack_server.pool.entry import ModelState
from modelpack_server.pool.keep_alive import parse_keep_alive
from modelpack_server.pool.pool import ModelPool

#: What else the last line says.
Extra = Callable[[ChatStream, Reader], dict[str, Any]]


async def reply(
    request: Request,
    pool: ModelPool,
    body: TextBody,
    form: replies.Body,
    start: Callable[[ServedModel], Awaitable[ChatStream]],
    extra: Extra = lambda stream, reader: {},
) -> Response:
    """Answer with what `start` begins; `form` names its pieces. Raises what `answer` does."""
    clock = Clock()
    await find(pool, body.model)
    await fit_context(pool, body)

    async def begin(model: ServedModel) -> ChatStream:
        clock.model_is_there()
        return await start(model)

    def writer(model: ServedModel) -> Writer:
        return Writer(body.model, form, Vocabulary(model.tokenizer) if body.logprobs else None)

    async def whole(model: ServedModel, stream: ChatStream) -> dict[str, Any] | Response:
        reader, pieces = Reader(logprobs=body.logprobs), Pieces()
        async for delta in stream:
            pieces.add(reader.take(delta))
        ending = replies.counts(clock, reader) | extra(stream, reader)
        made = writer(model)
        if body.logprobs:
            return await large_response(lambda: made.write(pieces, ending))
        return made.write(pieces, ending)

    async def lines(model: ServedModel, stream: ChatStream) -> AsyncGenerator[str, None]:
        reader, made = Reader(logprobs=body.logprobs), writer(model)
        write = written if body.logprobs else dumps

        def line(pieces: Pieces, ending: dict[str, Any] | None = None) -> str:
            return write(made.write(pieces, ending)) + "\n"

        async for delta in stream:
            if pieces := reader.take(delta):
                yield await call(body.logprobs, line, pieces)
        ending = replies.counts(clock, reader) | extra(stream, reader)
        yield line(Pieces(), ending)

    return await answer(
        request, pool, body.model, begin, whole, lines if body.stream else None,
        keep_alive=body.keep_alive, media_type=ndjson.MEDIA_TYPE, failure=ndjson.error_line,
    )  # fmt: skip


async def load_or_unload(
    request: Request, pool: ModelPool, body: TextBody, form: replies.Body
) -> Response:
    """Answer a request that has nothing to answer: load its model, or unload it if it is to be
    kept for no time.
    """
    clock = Clock()
    await find(pool, body.model)
    reason = "unload" if seconds_of(body.keep_alive) == 0 else "load"
    if reason == "unload":
        await unload(pool, body.model)
    else:
        await fit_context(pool, body)
        kept = seconds_of(body.keep_alive)
        await unless_gone(request, pool.preload(body.model, keep_alive=kept))
        clock.model_is_there()
    return JSONResponse(replies.unanswered(body.model, form, reason, clock))


async def unload(pool: ModelPool, name: str) -> None:
    """Unload a model; one that is in use goes once it no longer is."""
    key = (await pool.find(name)).key
    running = next((model for model in pool.running() if model.stored.key == key), None)
    if running is None:
        return
    if running.state is ModelState.READY and running.users:
        async with pool.lease(name, keep_alive=0.0):
            return
    await pool.unload([name])


def seconds_of(keep_alive: KeepAlive | None) -> float | None:
    """Return how long a model is to be kept, in seconds; raises `RequestError`."""
    try:
        return None if keep_alive is None else parse_keep_alive(keep_alive)
    except UsageError as error:
        raise RequestError(str(error), param="keep_alive") from None
