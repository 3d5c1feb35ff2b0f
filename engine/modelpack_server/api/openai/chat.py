"""POST /v1/chat/completions."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from typing import Any

from fastapi import APIRouter, Request, Response

from modelpack_engine.worker.cancelling import in_thread
from modelpack_server.api.answering import answer
from modelpack_server.api.large_json import call, large_response
from modelpack_server.api.openai.chat_replies import ChunkWriter, WholeChoice
from modelpack_server.api.openai.messages import template_messages
from modelpack_server.api.openai.replies import Envelope, total_usage
from modelpack_server.api.openai.requests import ChatRequest
from modelpack_server.api.openai.response_format import constraint_of
from modelpack_server.api.openai.tools import tools_of
from modelpack_server.api.paths import add_route
from modelpack_server.api.preloading import preloadable
from modelpack_server.api.sse import DONE
from modelpack_server.api.vocabulary import Vocabulary
from modelpack_server.conversation.chat import ChatStream, start_chat
from modelpack_server.conversation.served import ServedModel
from modelpack_server.conversation.spec import ChatSpec
from modelpack_server.pool.pool import ModelPool


def router(pool: ModelPool) -> APIRouter:
    """Return the route and its aliases."""
    routes = APIRouter(tags=["OpenAI"], route_class=preloadable(pool))

    async def create_chat_completion(body: ChatRequest, request: Request) -> Response:
        """Answer a conversation, as a whole or as server-sent events."""
        body.check()

        async def start(model: ServedModel) -> ChatStream:
            preset = request.headers.get(_PRESET)
            return await start_chat(model, await in_thread(spec_of, body, model, preset))

        return await answer(
            request,
            pool,
            body.model,
            start,
            lambda model, stream: whole(body, model, stream),
            (lambda model, stream: events(body, model, stream)) if body.stream else None,
            keep_alive=body.keep_alive,
        )

    add_route(routes, "/chat/completions", create_chat_completion, bare=True)
    return routes


_PRESET = "x-modelpack-preset"


def spec_of(body: ChatRequest, model: ServedModel, preset: str | None = None) -> ChatSpec:
    """Return what a request asks for, in nobody's words; raises `RequestError`."""
    tools, choice = tools_of(body)
    given = body.given()
    if body.logprobs:
        given["logprobs"] = body.top_logprobs or 0
    options = dict(body.chat_template_kwargs or {})
    reasoning = body.enable_thinking
    if body.reasoning_effort is not None:
        options.setdefault("reasoning_effort", body.reasoning_effort)
        if reasoning is None:
            reasoning = body.reasoning_effort != "none"
    if reasoning is None and isinstance(options.get("enable_thinking"), bool):
        reasoning = options["enable_thinking"]
    return ChatSpec(
        messages=template_messages(body.messages),
        params=model.sampling_params(given, preset=body.preset or preset),
        max_tokens=body.token_limit or model.default("max_tokens"),
        n=body.n,
        tools=tools,
        tool_choice=choice,
        parallel_tool_calls=body.parallel_tool_calls and not body.is_legacy,
        constraint=constraint_of(body.response_format),
        template_options=options,
        reasoning=reasoning,
        reasoning_budget=body.thinking_token_budget,
    )


async def whole(
    body: ChatRequest, model: ServedModel, stream: ChatStream
) -> dict[str, Any] | Response:
    """Return the response once all choices have ended."""
    choices = [WholeChoice() for _ in range(body.n)]
    async for delta in stream:
        choices[delta.index].add(delta)
    if body.logprobs:
        words = Vocabulary(model.tokenizer)
        return await large_response(lambda: _joined(body, words, choices))
    return _joined(body, None, choices)


def _joined(
    body: ChatRequest, words: Vocabulary | None, choices: Sequence[WholeChoice]
) -> dict[str, Any]:
    bodies = [choice.json(i, words, legacy=body.is_legacy) for i, choice in enumerate(choices)]
    usages = [choice.usage for choice in choices if choice.usage is not None]
    return Envelope("chatcmpl", "chat.completion", body.model).body(bodies, total_usage(usages))


async def events(
    body: ChatRequest, model: ServedModel, stream: ChatStream
) -> AsyncGenerator[str, None]:
    """Yield the response piece by piece: the role, the parts, why it ended, the token counts."""
    envelope = Envelope(
        "chatcmpl", "chat.completion", body.model, chunk_kind="chat.completion.chunk"
    )
    words = Vocabulary(model.tokenizer) if body.logprobs else None
    writer = ChunkWriter(envelope, words, include_usage=body.include_usage, legacy=body.is_legacy)
    yield "".join(writer.role(index) for index in range(body.n))
    usages = []
    async for delta in stream:
        text = await call(body.logprobs, writer.events, delta)
        if delta.usage is not None:
            usages.append(delta.usage)
            if len(usages) == body.n:
                text += (writer.usage(usages) if body.include_usage else "") + DONE
        yield text
