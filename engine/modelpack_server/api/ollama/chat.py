"""The route POST /api/chat, and its common parts with /api/generate: options, thinking, images."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from modelpack_engine.errors import BusyError, RequestError
from modelpack_engine.request import SamplingParams
from modelpack_server.api.bodies import call, compute, large_response, written
from modelpack_server.api.model_use import answer, seconds_of, unless_gone
from modelpack_server.api.ollama import ndjson, replies
from modelpack_server.api.ollama.bodies import (
    Call,
    ChatBody,
    ChatMessage,
    OfferedTool,
    TextBody,
)
from modelpack_server.api.ollama.ndjson import JsonRoute, find
from modelpack_server.api.ollama.replies import Clock, Pieces, Reader, Writer
from modelpack_server.api.sse import dumps
from modelpack_server.api.vocabulary import Vocabulary
from modelpack_server.conversation.chat import ChatStream, start_chat
from modelpack_server.conversation.pictures import PictureReader, picture_reader
from modelpack_server.conversation.served_model import ServedModel
from modelpack_server.conversation.spec import ChatSpec
from modelpack_server.pool.entry import ModelState
from modelpack_server.pool.model_defaults import parse_options
from modelpack_server.pool.pool import ModelPool
from modelpack_server.pool.settings import ModelSettings, preset_named
from modelpack_server.structured_output import Constraint
from modelpack_server.tool_parsers.parts import Tool, check_names

_EFFORTS = ("minimal", "low", "medium", "high", "max")


def sampling(body: TextBody, model: ServedModel) -> tuple[SamplingParams, int | None]:
    """Return the sampling parameters and the token limit; raises `RequestError`."""
    given = dict(parse_options(body.options).sampling)
    if body.logprobs:
        given["logprobs"] = body.top_logprobs
    limit = given.pop("max_tokens", None)
    if limit is None and "num_predict" not in body.options:
        limit = model.default("max_tokens")
    return model.sampling_params(given), limit


def constraint_of(body: TextBody) -> Constraint | None:
    """Return the constraint of `format`, or None; raises `RequestError`."""
    match body.format:
        case None | "":
            return None
        case "json":
            return Constraint("json_object", "")
        case dict():
            return Constraint("json_schema", body.format)
    raise RequestError(f"format is {body.format!r}, expected json or a JSON schema", param="format")


def common_spec(
    body: TextBody, model: ServedModel, messages: list[dict[str, Any]], **own: Any
) -> ChatSpec:
    """Return the API-neutral form of a request with `own` fields; raises `RequestError`."""
    params, limit = sampling(body, model)
    think = body.think
    if isinstance(think, str) and think not in _EFFORTS:
        raise RequestError(
            f"think is {think!r}, expected true, false, low, medium or high", param="think"
        )
    if think and model.format.reasoning is None:
        raise RequestError(f"{body.model!r} does not support thinking", param="think")
    return ChatSpec(
        messages=messages,
        params=params,
        max_tokens=limit,
        constraint=constraint_of(body),
        template_options={"reasoning_effort": think} if isinstance(think, str) else {},
        reasoning=bool(think) if think is not None else None,
        **own,
    )


def with_images(
    text: str, images: list[Any], model: str, pictures: PictureReader | None
) -> str | list[dict[str, Any]]:
    """Return the content of a message, whose `images` may be sounds, as in Ollama.

    Raises `RequestError` for images without `pictures`.
    """
    if not images:
        return text
    if pictures is None:
        raise RequestError(f"{model!r} does not support images: text only", param="images")
    parts = [pictures.media(image, f"images[{i}]") for i, image in enumerate(images)]
    return [*parts, {"type": "text", "text": text}]


async def fit_context(pool: ModelPool, body: TextBody) -> None:
    """Configure the model for a context of `num_ctx` tokens if its default context is smaller.

    The context never shrinks, an operator's setting has priority, and a model in use keeps its
    context: prompts that do not fit are then refused. The engine reduces a context that exceeds the
    model's or the memory.
    """
    asked = parse_options(body.options).context_size
    if asked is None:
        return
    stored = await pool.find(body.model)
    settings = await pool.settings(body.model)
    fields = settings.engine_fields()
    if settings.context_size or fields.get("max_model_len"):
        return
    preset = preset_named(settings.preset).context_size if settings.preset else None
    limit = fields.get("default_model_len") or preset or stored.context_size
    if limit is None or limit >= asked:
        return
    own = pool.configured().get(stored.key, ModelSettings())
    larger = replace(own, engine={**own.engine, "default_model_len": asked})
    with suppress(BusyError):
        await pool.configure(body.model, larger)


#: Returns further fields of the last line.
Extra = Callable[[ChatStream, Reader], dict[str, Any]]


async def reply(
    request: Request,
    pool: ModelPool,
    body: TextBody,
    form: replies.Body,
    start: Callable[[ServedModel], Awaitable[ChatStream]],
    extra: Extra = lambda stream, reader: {},
) -> Response:
    """Respond with the stream that `start` returns; `form` names its fields.

    Raises what `answer` raises.
    """
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
        request, pool, body, begin, whole, lines,
        media_type=ndjson.MEDIA_TYPE, failure=ndjson.error_line,
    )  # fmt: skip


async def load_or_unload(
    request: Request, pool: ModelPool, body: TextBody, form: replies.Body
) -> Response:
    """Handle a request without a prompt: load its model, or unload it if `keep_alive` is 0."""
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
    """Unload a model; a model in use is unloaded when its last request ends."""
    key = (await pool.find(name)).key
    running = next((model for model in pool.running() if model.stored.key == key), None)
    if running is None:
        return
    if running.state is ModelState.READY and running.users:
        async with pool.lease(name, keep_alive=0.0):
            return
    await pool.unload([name])


def router(pool: ModelPool) -> APIRouter:
    routes = APIRouter(tags=["Ollama"], route_class=JsonRoute)

    @routes.post("/api/chat", response_model=None)
    async def chat(body: ChatBody, request: Request) -> Response:
        """Reply to a conversation, with lines or one object; without messages, load the model."""
        if not body.messages:
            return await load_or_unload(request, pool, body, replies.message)

        async def start(model: ServedModel) -> ChatStream:
            return await start_chat(model, await compute(spec_of, body, model))

        return await reply(request, pool, body, replies.message, start)

    return routes


def spec_of(body: ChatBody, model: ServedModel) -> ChatSpec:
    """Return the API-neutral form of a request; raises `RequestError`."""
    messages = template_messages(body.messages, body.model, picture_reader(model))
    tools = tuple(map(_tool, body.tools))
    check_names(tools)
    return common_spec(body, model, messages, tools=tools)


def template_messages(
    messages: Sequence[ChatMessage], model: str, pictures: PictureReader | None = None
) -> list[dict[str, Any]]:
    """Return messages in the form that chat templates expect.

    Calls in Ollama's API may lack ids. A result then belongs to an earlier call of the same tool,
    or to the first call without a result. Images come before the text of their message. Raises
    `RequestError` for images without `pictures`.
    """
    found = []
    waiting = _Waiting()
    numbers = iter(range(sum(len(message.tool_calls) for message in messages)))
    for message in messages:
        content = with_images(message.content, message.images, model, pictures)
        role = "system" if message.role == "developer" else message.role
        plain: dict[str, Any] = {"role": role, "content": content}
        if role == "assistant":
            if message.thinking:
                plain["reasoning_content"] = message.thinking
            if message.tool_calls:
                calls = [_call(call, f"call_{next(numbers)}") for call in message.tool_calls]
                waiting = _Waiting(calls)
                plain["tool_calls"] = calls
        elif role == "tool":
            plain |= waiting.answered(message)
        found.append(plain)
    return found


def _call(call: Call, own_id: str) -> dict[str, Any]:
    arguments = call.function.arguments
    if not isinstance(arguments, str):
        arguments = json.dumps(arguments, ensure_ascii=False)
    function = {"name": call.function.name, "arguments": arguments}
    return {"id": call.id or own_id, "type": "function", "function": function}


class _Waiting:
    """Calls without a result, in their order."""

    def __init__(self, calls: Sequence[Mapping[str, Any]] = ()) -> None:
        self._names = {call["id"]: call["function"]["name"] for call in calls}
        self._ids: dict[str, deque[str]] = {}  # by name
        for call_id, name in self._names.items():
            self._ids.setdefault(name, deque()).append(call_id)

    def answered(self, message: ChatMessage) -> dict[str, str]:
        """Remove and return the call that a tool's result belongs to."""
        call_id: str | None = message.tool_call_id
        if call_id not in self._names:
            call_id = self._first(message.tool_name) or next(iter(self._names), None)
        if call_id is None:
            found = {"tool_call_id": message.tool_call_id or "call_0"}
            return found | ({"name": message.tool_name} if message.tool_name else {})
        name = self._names.pop(call_id)
        return {"tool_call_id": call_id, "name": message.tool_name or name}

    def _first(self, name: str | None) -> str | None:
        """Return the id of the first call of a tool without a result."""
        ids = self._ids.get(name or "", deque())
        while ids and ids[0] not in self._names:
            ids.popleft()
        return ids[0] if ids else None


def _tool(offered: OfferedTool) -> Tool:
    function = offered.function
    parameters = {"type": "object", "properties": {}} | {
        key: value for key, value in function.parameters.items() if value is not None
    }
    return Tool(function.name, function.description, parameters, False)
