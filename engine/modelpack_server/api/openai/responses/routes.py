"""The routes below /v1/responses, and truncation of conversations longer than the context."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import AsyncExitStack, contextmanager
from dataclasses import replace
from functools import partial
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request, Response
from fastapi.responses import JSONResponse
from starlette.background import BackgroundTask
from starlette.exceptions import HTTPException

from modelpack_engine.errors import ContextLengthError, RequestError
from modelpack_server.api.bodies import call, compute, large_response
from modelpack_server.api.errors import problem_of
from modelpack_server.api.model_use import (
    PRESET_HEADER,
    answer,
    check_generates,
    preloadable,
    seconds_of,
    unless_gone,
)
from modelpack_server.api.openai.requests import Order, PageLimit
from modelpack_server.api.openai.responses.background import (
    BackgroundResponse,
    BackgroundResponses,
)
from modelpack_server.api.openai.responses.conversations import (
    PREFIXES,
    check_new,
    conversation_routes,
    found_conversation,
    page,
)
from modelpack_server.api.openai.responses.memory import Remembered, ResponseMemory
from modelpack_server.api.openai.responses.replies import Reply
from modelpack_server.api.openai.responses.requests import (
    InputRequest,
    Item,
    ResponseRequest,
    Toolbox,
    items_of,
    template_messages,
    toolbox_of,
)
from modelpack_server.api.paths import add_route
from modelpack_server.api.sse import LiveStream
from modelpack_server.api.vocabulary import Vocabulary
from modelpack_server.conversation.chat import ChatStream, count_prompt, start_chat
from modelpack_server.conversation.pictures import picture_reader
from modelpack_server.conversation.prompt import fit_turns
from modelpack_server.conversation.served_model import ServedModel
from modelpack_server.conversation.spec import ChatSpec
from modelpack_server.gateway.caller import caller_of
from modelpack_server.pool.pool import ModelPool

# The tokens reserved for the reply if the request has no limit, but at most 1/_PART of the context.
_ROOM = 1024
_PART = 4


async def fitted(model: ServedModel, spec: ChatSpec) -> ChatSpec:
    """Return `spec` without the oldest turns that exceed the context; instructions stay.

    A turn begins with a user message, so that no tool result loses its call. The last turn stays.
    """
    context = model.max_model_len
    most = context - min(spec.max_tokens or _ROOM, context // _PART)
    if await _fits(model, spec, most):
        return spec
    messages = list(spec.messages)
    head = 1 if messages[0]["role"] == "system" else 0
    starts = [i for i in range(head, len(messages)) if messages[i]["role"] == "user"]
    if not starts:
        return spec
    low, high = 0, len(starts) - 1
    while low < high:
        middle = (low + high) // 2
        shorter = replace(spec, messages=messages[:head] + messages[starts[middle] :])
        if await _fits(model, shorter, most):
            high = middle
        else:
            low = middle + 1
    return replace(spec, messages=messages[:head] + messages[starts[low] :])


async def _fits(model: ServedModel, spec: ChatSpec, most: int) -> bool:
    try:
        return await count_prompt(model, spec) <= most
    except ContextLengthError:
        return False


# The names of these fields in this API.
_PARAMS = {"messages": "input", "response_format": "text.format"}


def router(pool: ModelPool, background: BackgroundResponses) -> APIRouter:
    """Return the routes of responses and conversations."""
    routes = APIRouter(tags=["OpenAI"], route_class=preloadable(pool))
    kept = ResponseMemory()

    def find(request: Request, name: str) -> Remembered:
        """Return a running or stored response; raise a 404 if the caller has none with this id."""
        owner = caller_of(request.scope).owner
        running = background.find(owner, name)
        found = running.remembered() if running is not None else kept.find(owner, name)
        if found is None:
            raise _unknown(name)
        return found

    def earlier_turns(owner: str | None, name: str | None) -> tuple[Item, ...]:
        if name is None:
            return ()
        found, why = kept.find(owner, name), "it may have expired"
        if found is None and (running := background.find(owner, name)) is not None:
            found = running.remembered() if running.reply.has_ended else None
            why = "it has not ended"
        if found is None:
            raise RequestError(
                f"no such response: {name!r}; {why}",
                param="previous_response_id",
                hint="send the conversation as input",
            )
        return found.conversation

    async def conversation(
        body: InputRequest, owner: str | None
    ) -> tuple[tuple[Item, ...], list[Item]]:
        """Return the items of earlier turns, and those of the request."""
        found = None
        if body.conversation_id is not None:
            found = found_conversation(kept, owner, body.conversation_id)
            earlier = found.items
        else:
            earlier = earlier_turns(owner, body.previous_response_id)
        own = await compute(items_of, body.input, partial(kept.item, owner))
        if not earlier and not own:
            raise RequestError("input is empty", param="input")
        if found is not None:
            await compute(check_new, earlier, own, "input")
        return earlier, own

    async def count_input_tokens(body: InputRequest, request: Request) -> dict[str, Any]:
        """Return the number of prompt tokens of a request, including earlier turns and tools."""
        body.check_input()
        earlier, own = await conversation(body, caller_of(request.scope).owner)

        async def count() -> int:
            async with pool.lease(body.model) as model:
                check_generates(model, body.model)
                with _own_words():
                    toolbox = toolbox_of(body.tools, body.tool_choice)
                    spec = await compute(spec_of, body, toolbox, model, [*earlier, *own])
                    if body.truncation == "auto":
                        spec = await fitted(model, spec)
                    return await count_prompt(model, spec)

        counted = await unless_gone(request, count())
        return {"object": "response.input_tokens", "input_tokens": counted}

    async def create_response(body: ResponseRequest, request: Request) -> Response:
        """Reply with one JSON object or with events; store the response unless `store` is false."""
        body.check()
        owner = caller_of(request.scope).owner
        await compute(body.check_repeated)
        earlier, own = await conversation(body, owner)
        preset = body.preset or request.headers.get(PRESET_HEADER)
        reply = Reply(body)

        def remember() -> None:
            if body.store:
                kept.add(owner, reply.json(), earlier, own)

        def extend() -> None:
            """Append to the conversation, which the client may have deleted."""
            if body.conversation_id is not None:
                kept.extend(owner, body.conversation_id, (*own, *reply.output))

        def complete() -> None:
            extend()
            remember()

        async def start(model: ServedModel) -> ChatStream:
            words = Vocabulary(model.tokenizer) if body.wants_logprobs else None
            with _own_words():
                toolbox = toolbox_of(body.tools, body.tool_choice)
                spec = await compute(spec_of, body, toolbox, model, [*earlier, *own], preset)
                reply.start(spec.params, words, toolbox.namespaces)
                if body.truncation == "auto":
                    spec = await fitted(model, spec)
                return await start_chat(model, spec)

        async def whole(_: ServedModel, stream: ChatStream) -> dict[str, Any] | Response:
            with _own_words():
                async for delta in stream:
                    await call(body.wants_logprobs, reply.take, delta)
            await compute(complete)
            return await large_response(reply.json) if body.wants_logprobs else reply.json()

        async def events(_: ServedModel, stream: ChatStream) -> AsyncGenerator[str, None]:
            yield "".join(reply.begin())
            with _own_words():
                async for delta in stream:
                    texts = await call(body.wants_logprobs, reply.take, delta)
                    if delta.finish is not None:
                        await compute(complete)  # before the client can refer to it
                    yield "".join(texts)

        def failure(error: Exception) -> str:
            texts = reply.fail(problem_of(error))
            remember()
            return "".join(texts)

        if not body.background:
            return await answer(request, pool, body, start, whole, events, failure=failure)

        seconds = seconds_of(body.keep_alive)
        with _own_words():  # errors that need no model
            toolbox_of(body.tools, body.tool_choice)
            body.constraint()
        await pool.find(body.model)

        async def generate(response: BackgroundResponse, emit: Callable[[list[str]], None]) -> None:
            async with pool.lease(body.model, keep_alive=seconds) as model:
                check_generates(model, body.model)
                stream = await start(model)
                try:
                    emit(reply.progress())
                    async for delta in stream:
                        with response.uninterrupted():
                            texts = await call(body.wants_logprobs, reply.take, delta)
                            if delta.finish is not None:
                                await compute(extend)  # before the client can refer to it
                            emit(texts)
                finally:
                    stream.abort()

        async def store(response: BackgroundResponse) -> None:
            await compute(kept.add, owner, reply.json(), earlier, own, response.events)
            if response.is_deleted:
                kept.remove(owner, reply.id)

        running = background.start(
            owner, reply, (*earlier, *own), generate, store, keeps_events=body.stream
        )
        # The request lasts as long as the response, for its key's limits and its trace.
        ended = BackgroundTask(running.until_end)
        if running.events is None:
            return JSONResponse(reply.json(), background=ended)
        return LiveStream(running.events.read(0), AsyncExitStack(), background=ended)

    async def retrieve_response(
        name: str,
        request: Request,
        stream: bool = False,
        starting_after: Annotated[int, Query(ge=0)] | None = None,
    ) -> Any:
        """Return a running or stored response, or its events after number `starting_after`."""
        found = find(request, name)
        if not stream:
            return found.response
        if found.events is None:
            raise RequestError(
                "cannot stream the response: it was not created with background and stream",
                param="stream",
            )
        number = 0 if starting_after is None else starting_after + 1
        found.events.check_kept(number)
        return LiveStream(found.events.read(number), AsyncExitStack())

    async def delete_response(name: str, request: Request) -> dict[str, Any]:
        """Delete a stored response, or cancel and delete a running one."""
        owner = caller_of(request.scope).owner
        running = background.find(owner, name)
        if running is not None:
            running.is_deleted = True
            running.cancel()
        elif not kept.remove(owner, name):
            raise _unknown(name)
        return {"id": name, "object": "response.deleted", "deleted": True}

    async def cancel_response(name: str, request: Request) -> dict[str, Any]:
        """Cancel a background response and return it; return one that has ended unchanged."""
        running = background.find(caller_of(request.scope).owner, name)
        if running is not None:
            running.cancel()
            await running.until_end()
            return running.reply.json()
        found = find(request, name).response
        if not found["background"]:
            raise RequestError(
                "cannot cancel the response: it was not created with background",
                param="response_id",
            )
        return found

    async def list_input_items(
        name: str,
        request: Request,
        limit: PageLimit = 20,
        order: Order = "desc",
        after: str | None = None,
    ) -> dict[str, Any]:
        """List the input items of a response with those of earlier turns, one page per request."""
        return page(find(request, name).inputs, limit, order, after)

    for tail, endpoint, method in (
        ("/responses", create_response, "POST"),
        ("/responses/input_tokens", count_input_tokens, "POST"),
        ("/responses/{name}", retrieve_response, "GET"),
        ("/responses/{name}", delete_response, "DELETE"),
        ("/responses/{name}/cancel", cancel_response, "POST"),
        ("/responses/{name}/input_items", list_input_items, "GET"),
    ):
        add_route(routes, tail, endpoint, methods=[method], bare=True, prefixes=PREFIXES)
    routes.routes.extend(conversation_routes(kept).routes)
    return routes


def spec_of(
    body: InputRequest,
    toolbox: Toolbox,
    model: ServedModel,
    items: Sequence[Item],
    preset: str | None = None,
) -> ChatSpec:
    """Return the API-neutral form of a request; raises `RequestError`."""
    given, limit = {}, None
    if isinstance(body, ResponseRequest):
        given, limit = body.given(), body.max_output_tokens or body.max_tokens
        if body.wants_logprobs:
            given["logprobs"] = body.top_logprobs or 0
    options = dict(body.chat_template_kwargs)
    if body.effort is not None:
        options.setdefault("reasoning_effort", body.effort)
    num_own = len(body.input) if isinstance(body.input, list) else int(bool(body.input))
    messages = template_messages(
        body.instructions, items, picture_reader(model), len(items) - num_own
    )
    return ChatSpec(
        messages=fit_turns(messages, model.tokenizer.chat_template),
        params=model.sampling_params(given, preset=preset),
        max_tokens=limit or model.default("max_tokens"),
        tools=toolbox.tools,
        tool_choice=toolbox.choice,
        parallel_tool_calls=body.parallel_tool_calls,
        constraint=body.constraint(),
        template_options=options,
        reasoning=body.effort != "none" if body.effort is not None else None,
    )


@contextmanager
def _own_words() -> Iterator[None]:
    """Translate field names in errors to those of this API."""
    try:
        yield
    except RequestError as error:
        first, dot, rest = (error.param or "").partition(".")
        error.param = (_PARAMS.get(first, first) + dot + rest.removeprefix("json_schema.")) or None
        raise


def _unknown(name: str) -> HTTPException:
    return HTTPException(404, f"no such response: {name!r}; it may have expired")
