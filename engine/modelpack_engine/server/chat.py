"""POST /v1/chat/completions."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from modelpack_engine.async_engine import RequestStream
from modelpack_engine.server.replies import (
    Choice,
    Envelope,
    chat_logprobs,
    finish_reason,
    total_usage,
)
from modelpack_engine.server.requests import ChatRequest
from modelpack_engine.server.serving import ServedModel


async def start(request: ChatRequest, served: ServedModel) -> RequestStream:
    """Render the conversation and hand it to the engine; raises before anything was answered."""
    request.check()
    token_ids = await served.chat_prompt(
        request.template_messages(), request.chat_template_kwargs or {}
    )
    logprobs = (request.top_logprobs or 0) if request.logprobs else None
    limit = served.token_limit(len(token_ids), request.token_limit)
    params = request.sampling_params(limit, logprobs)
    return await served.engine.submit(token_ids, params, n=request.n)


async def whole(request: ChatRequest, served: ServedModel, stream: RequestStream) -> dict[str, Any]:
    """Return the response once all choices have ended."""
    choices = [Choice() for _ in range(request.n)]
    async with stream:
        async for event in stream:
            choices[event.index].add(event)
    bodies = [
        {
            "index": i,
            "message": {"role": "assistant", "content": choice.text, "refusal": None},
            "logprobs": chat_logprobs(choice.logprobs, served.vocabulary)
            if request.logprobs
            else None,
            "finish_reason": choice.reason,
        }
        for i, choice in enumerate(choices)
    ]
    usages = [choice.usage for choice in choices if choice.usage]
    envelope = Envelope("chatcmpl", "chat.completion", request.model)
    return envelope.body(bodies, total_usage(usages, 1))


async def chunks(
    request: ChatRequest, served: ServedModel, stream: RequestStream
) -> AsyncIterator[dict[str, Any]]:
    """Yield the response piece by piece: the role, the text, why it ended, the token counts."""
    envelope = Envelope("chatcmpl", "chat.completion", request.model)
    more: dict[str, Any] = {"usage": None} if request.include_usage else {}
    usages = []

    def choice(index: int, delta: dict[str, Any], **rest: Any) -> dict[str, Any]:
        body = {"index": index, "delta": delta, "logprobs": None, "finish_reason": None} | rest
        return envelope.chunk([body], **more)

    async with stream:
        for index in range(request.n):
            yield choice(index, {"role": "assistant", "content": ""})
        async for event in stream:
            logprobs = None
            if request.logprobs and event.logprobs:
                logprobs = chat_logprobs(event.logprobs, served.vocabulary)
            if event.text or logprobs:
                yield choice(event.index, {"content": event.text}, logprobs=logprobs)
            if event.finished:
                yield choice(event.index, {}, finish_reason=finish_reason(event))
                if event.usage:
                    usages.append(event.usage)
    if request.include_usage:
        yield envelope.chunk([], usage=total_usage(usages, 1))
