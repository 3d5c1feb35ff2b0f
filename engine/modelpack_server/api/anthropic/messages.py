"""The routes POST /v1/messages and /v1/messages/count_tokens."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Any

from fastapi import APIRouter, Request, Response

from modelpack_engine.errors import ContextLengthError
from modelpack_engine.worker.threads import in_thread
from modelpack_server.api.anthropic.history import template_messages
from modelpack_server.api.anthropic.replies import PING, Reply
from modelpack_server.api.anthropic.requests import MessagesRequest, PromptRequest, tools_of
from modelpack_server.api.model_use import answer, preloadable, unless_gone
from modelpack_server.api.paths import add_route
from modelpack_server.api.sse import error_event
from modelpack_server.conversation.chat import ChatStream, count_prompt, start_chat
from modelpack_server.conversation.served_model import ServedModel
from modelpack_server.conversation.spec import ChatSpec
from modelpack_server.conversation.turns import fit_turns
from modelpack_server.gateway.families import Family
from modelpack_server.pool.pool import ModelPool
from modelpack_server.structured_output import Constraint

_PRESET = "x-modelpack-preset"
_ANTHROPIC = ("/anthropic/v1",)


def router(pool: ModelPool) -> APIRouter:
    """Return the routes and their aliases."""
    routes = APIRouter(tags=["Anthropic"], route_class=preloadable(pool))

    async def create_message(body: MessagesRequest, request: Request) -> Response:
        """Answer a conversation, as a whole or as server-sent events."""
        body.check()
        preset = body.preset or request.headers.get(_PRESET)
        return await answer(
            request,
            pool,
            body.model,
            lambda model: start(body, model, preset),
            lambda model, stream: whole(body, model, stream),
            (lambda model, stream: events(body, model, stream)) if body.stream else None,
            keep_alive=body.keep_alive,
            failure=error_event(Family.ANTHROPIC),
        )

    async def count_message_tokens(body: PromptRequest, request: Request) -> dict[str, Any]:
        """Say how many tokens the prompt of these messages has, tools and all."""

        async def count() -> int:
            async with pool.lease(body.model) as model:
                return await count_prompt(model, await in_thread(spec_of, body, model))

        return {"input_tokens": await unless_gone(request, count())}

    add_route(routes, "/messages", create_message, prefixes=_ANTHROPIC)
    add_route(routes, "/messages/count_tokens", count_message_tokens, prefixes=_ANTHROPIC)
    return routes


def spec_of(body: PromptRequest, model: ServedModel, preset: str | None = None) -> ChatSpec:
    """Return what a request asks for, in nobody's words; raises `RequestError`."""
    messages = template_messages(body.system, body.messages)
    messages = fit_turns(messages, model.tokenizer.chat_template)
    tools, choice = tools_of(body.tools, body.tool_choice)
    last = messages[-1]
    continues = bool(last["role"] == "assistant" and last["content"] and not last.get("tool_calls"))
    thinking = body.thinking
    output = body.output_config
    wanted = (output.format if output is not None else None) or body.output_format
    options: dict[str, Any] = {}
    if output is not None and output.effort is not None:
        options["reasoning_effort"] = output.effort
    given = body.given() if isinstance(body, MessagesRequest) else {}
    return ChatSpec(
        messages=messages,
        params=model.sampling_params(given, preset=preset),
        max_tokens=body.max_tokens if isinstance(body, MessagesRequest) else None,
        tools=tools,
        tool_choice=choice,
        parallel_tool_calls=not (body.tool_choice and body.tool_choice.disable_parallel_tool_use),
        constraint=Constraint("json_schema", wanted.schema_) if wanted is not None else None,
        template_options=options,
        # Clients that say nothing of thinking expect that text comes first.
        reasoning=thinking is not None and thinking.type != "disabled" and not continues,
        reasoning_budget=thinking.budget_tokens if thinking is not None else None,
        continues=continues,
    )


async def start(body: MessagesRequest, model: ServedModel, preset: str | None) -> ChatStream:
    """Start the answer. Raises what `start_chat` does, in words that Anthropic's clients know."""
    spec = await in_thread(spec_of, body, model, preset)
    try:
        return await start_chat(model, spec)
    except ContextLengthError as error:
        most = model.max_model_len
        tokens = error.tokens or await count_prompt(model, spec)
        raise ContextLengthError(
            f"prompt is too long: {tokens} tokens > {most} maximum",
            param="messages",
            hint=error.hint,
        ) from None


async def whole(body: MessagesRequest, model: ServedModel, stream: ChatStream) -> dict[str, Any]:
    """Return the message once it is complete."""
    reply = _reply(body, model, stream)
    async for delta in stream:
        reply.take(delta)
    return reply.json()


async def events(
    body: MessagesRequest, model: ServedModel, stream: ChatStream
) -> AsyncGenerator[str, None]:
    """Yield the message piece by piece, block after block, in the API's order of events."""
    reply = _reply(body, model, stream)
    yield reply.begin() + PING
    async for delta in stream:
        yield reply.take(delta)


def _reply(body: MessagesRequest, model: ServedModel, stream: ChatStream) -> Reply:
    return Reply(
        body.model,
        stream.prompt_tokens,
        asked=body.max_tokens,
        limit=model.max_model_len - stream.prompt_tokens,
        show_thinking=body.thinking is None or body.thinking.display != "omitted",
    )
