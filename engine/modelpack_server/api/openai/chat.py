"""The route POST /v1/chat/completions, and its responses and chunks."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from fastapi import APIRouter, Request, Response

from modelpack_engine.outputs import TokenLogprob
from modelpack_server.api.bodies import call, compute, large_response, written
from modelpack_server.api.model_use import PRESET_HEADER, answer, preloadable
from modelpack_server.api.openai.replies import Envelope, chat_logprobs, quoted, total_usage
from modelpack_server.api.openai.requests import (
    ChatRequest,
    constraint_of,
    template_messages,
    tools_of,
)
from modelpack_server.api.paths import add_route
from modelpack_server.api.sse import DONE
from modelpack_server.api.vocabulary import Vocabulary
from modelpack_server.conversation.chat import ChatStream, start_chat
from modelpack_server.conversation.pictures import picture_reader
from modelpack_server.conversation.served_model import ServedModel
from modelpack_server.conversation.spec import ChatDelta, ChatSpec, ChatUsage
from modelpack_server.pool.pool import ModelPool
from modelpack_server.tool_parsers.parts import Reasoning, Text, ToolArguments, ToolStart


@dataclass(slots=True)
class _Call:
    id: str
    name: str
    fragments: list[str] = field(default_factory=list)

    def json(self) -> dict[str, Any]:
        return {"id": self.id, "type": "function", "function": self.function()}

    def function(self) -> dict[str, str]:
        return {"name": self.name, "arguments": "".join(self.fragments)}


@dataclass(slots=True)
class WholeChoice:
    """One choice of a reply that is not streamed."""

    texts: list[str] = field(default_factory=list)
    reasoning: list[str] = field(default_factory=list)
    calls: list[_Call] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish: str | None = None
    usage: ChatUsage | None = None

    def add(self, delta: ChatDelta) -> None:
        for part in delta.parts:
            match part:
                case Text():
                    self.texts.append(part.text)
                case Reasoning():
                    self.reasoning.append(part.text)
                case ToolStart():
                    self.calls.append(_Call(part.id, part.name))
                case ToolArguments():
                    self.calls[-1].fragments.append(part.fragment)
        self.logprobs += delta.logprobs or ()
        if delta.finish is not None:
            self.finish = finish_reason(delta)
            self.usage = delta.usage

    def json(self, index: int, words: Vocabulary | None, *, legacy: bool) -> dict[str, Any]:
        """Return the choice object, with log-probabilities if `words` is given."""
        text = "".join(self.texts)
        silent = bool(self.calls or self.reasoning)
        message: dict[str, Any] = {
            "role": "assistant",
            "content": text if text or not silent else None,
            "refusal": None,
        }
        if self.reasoning:
            message["reasoning_content"] = "".join(self.reasoning)
        if self.calls and legacy:
            message["function_call"] = self.calls[0].function()
        elif self.calls:
            message["tool_calls"] = [call.json() for call in self.calls]
        return {
            "index": index,
            "message": message,
            "logprobs": chat_logprobs(self.logprobs, words) if words is not None else None,
            "finish_reason": _legacy(self.finish) if legacy else self.finish,
        }


class ChunkWriter:
    """Writes the events of a streamed reply."""

    def __init__(
        self, envelope: Envelope, words: Vocabulary | None, *, include_usage: bool, legacy: bool
    ) -> None:
        self._envelope = envelope
        self._words = words
        self._usage = "null" if include_usage else ""
        self._legacy = legacy

    def role(self, index: int) -> str:
        """Return the first event of a choice."""
        return self._chunk(index, '{"role":"assistant","content":"","refusal":null}')

    def events(self, delta: ChatDelta) -> str:
        """Return the events for a delta: one for each part, and one for the finish reason."""
        logprobs = "null"
        if self._words is not None and delta.logprobs:
            logprobs = written(chat_logprobs(delta.logprobs, self._words))
        if logprobs == "null" and delta.finish is None and len(delta.parts) == 1:
            return self._chunk(delta.index, self._delta(delta.parts[0]))
        events = []
        bodies = [self._delta(part) for part in delta.parts]
        if not bodies and logprobs != "null":
            bodies = ['{"content":""}']
        for body in bodies:
            events.append(self._chunk(delta.index, body, logprobs))
            logprobs = "null"
        if delta.finish is not None:
            reason = _legacy(finish_reason(delta)) if self._legacy else finish_reason(delta)
            events.append(self._chunk(delta.index, "{}", finish=f'"{reason}"'))
        return "".join(events)

    def usage(self, usages: list[ChatUsage]) -> str:
        """Return the event with the token counts."""
        return self._envelope.chunk("", json.dumps(total_usage(usages)))

    def _delta(self, part: Text | Reasoning | ToolStart | ToolArguments) -> str:
        match part:
            case Text():
                return f'{{"content":{quoted(part.text)}}}'
            case Reasoning():
                return f'{{"reasoning_content":{quoted(part.text)}}}'
            case ToolStart() if self._legacy:
                return f'{{"function_call":{{"name":{quoted(part.name)},"arguments":""}}}}'
            case ToolArguments() if self._legacy:
                return f'{{"function_call":{{"arguments":{quoted(part.fragment)}}}}}'
            case ToolStart():
                return (
                    f'{{"tool_calls":[{{"index":{part.index},"id":{quoted(part.id)},'
                    f'"type":"function","function":{{"name":{quoted(part.name)},'
                    '"arguments":""}}]}'
                )
            case ToolArguments():
                return (
                    f'{{"tool_calls":[{{"index":{part.index},'
                    f'"function":{{"arguments":{quoted(part.fragment)}}}}}]}}'
                )

    def _chunk(self, index: int, delta: str, logprobs: str = "null", finish: str = "null") -> str:
        return self._envelope.chunk(
            f'{{"index":{index},"delta":{delta},"logprobs":{logprobs},"finish_reason":{finish}}}',
            self._usage,
        )


def finish_reason(delta: ChatDelta) -> str:
    """Return the API's finish reason of a choice."""
    return "stop" if delta.finish in (None, "abort") else str(delta.finish)


def _legacy(reason: str | None) -> str | None:
    return "function_call" if reason == "tool_calls" else reason


def router(pool: ModelPool) -> APIRouter:
    routes = APIRouter(tags=["OpenAI"], route_class=preloadable(pool))

    async def create_chat_completion(body: ChatRequest, request: Request) -> Response:
        """Reply to a conversation, with one JSON object or with server-sent events."""
        body.check()

        async def start(model: ServedModel) -> ChatStream:
            preset = request.headers.get(PRESET_HEADER)
            return await start_chat(model, await compute(spec_of, body, model, preset))

        return await answer(request, pool, body, start, partial(whole, body), partial(events, body))

    add_route(routes, "/chat/completions", create_chat_completion, bare=True)
    return routes


def spec_of(body: ChatRequest, model: ServedModel, preset: str | None = None) -> ChatSpec:
    """Return the API-neutral form of a request; raises `RequestError`."""
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
        messages=template_messages(body.messages, picture_reader(model)),
        params=model.sampling_params(given, preset=body.preset or preset),
        max_tokens=body.max_completion_tokens or body.max_tokens or model.default("max_tokens"),
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
    """Return the response after all choices have ended."""
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
    """Yield the stream events: roles, parts, finish reasons, token counts."""
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
