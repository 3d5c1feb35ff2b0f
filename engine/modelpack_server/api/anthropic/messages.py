"""The routes POST /v1/messages and /v1/messages/count_tokens, their responses and events."""

from __future__ import annotations

import json
import uuid
from collections.abc import AsyncGenerator, Iterable
from functools import partial
from typing import Any

from fastapi import APIRouter, Request, Response

from modelpack_engine.errors import ContextLengthError
from modelpack_server.api.anthropic.requests import (
    MessagesRequest,
    PromptRequest,
    template_messages,
    tools_of,
)
from modelpack_server.api.bodies import compute
from modelpack_server.api.continuation import carry, fingerprint
from modelpack_server.api.model_use import PRESET_HEADER, answer, preloadable, unless_gone
from modelpack_server.api.paths import add_route
from modelpack_server.api.sse import error_event, event
from modelpack_server.conversation.chat import ChatStream, count_prompt, start_chat
from modelpack_server.conversation.pictures import picture_reader
from modelpack_server.conversation.prompt import fit_turns
from modelpack_server.conversation.served_model import ServedModel
from modelpack_server.conversation.spec import ChatDelta, ChatSpec, ChatUsage
from modelpack_server.gateway.families import Family
from modelpack_server.pool.pool import ModelPool
from modelpack_server.structured_output import Constraint
from modelpack_server.tool_parsers.history import complete_object
from modelpack_server.tool_parsers.parts import Part, Reasoning, Text, ToolArguments, ToolStart

Event = dict[str, Any]


class Blocks:
    """The content blocks of a reply: `take` and `end` return events, `content` the finished blocks.

    Whitespace before a text is held back, so that whitespace between thoughts and calls makes no
    text block. Without `show_thinking`, a thinking block contains its signature only.
    """

    def __init__(self, *, show_thinking: bool = True) -> None:
        self.content: list[dict[str, Any]] = []
        self._show_thinking = show_thinking
        self._open: dict[str, Any] | None = None
        self._pieces: list[str] = []
        self._space = ""

    def take(self, parts: Iterable[Part]) -> list[Event]:
        """Return the events for the next parts of the output."""
        events: list[Event] = []
        for part in parts:
            match part:
                case Text():
                    events += self._text(part.text)
                case Reasoning():
                    events += self._to("thinking", {"thinking": "", "signature": ""})
                    self._pieces.append(part.text)
                    if self._show_thinking:
                        events.append(self._delta("thinking_delta", "thinking", part.text))
                case ToolStart():
                    events += self._close()
                    events += self._to("tool_use", {"id": part.id, "name": part.name, "input": {}})
                case ToolArguments():
                    self._pieces.append(part.fragment)
                    events.append(self._delta("input_json_delta", "partial_json", part.fragment))
        return events

    def end(self) -> list[Event]:
        """Return the events that close the last block."""
        events: list[Event] = []
        if not self.content and self._open is None and self._space:
            events += self._say(self._space)  # a reply has at least one block
        return events + self._close()

    def _text(self, text: str) -> list[Event]:
        if self._open is None or self._open["type"] != "text":
            text = self._space + text
            if not text.strip():
                self._space = text
                return []
        return self._say(text)

    def _say(self, text: str) -> list[Event]:
        events = self._to("text", {"text": ""})
        self._pieces.append(text)
        return [*events, self._delta("text_delta", "text", text)]

    def _to(self, kind: str, fields: dict[str, Any]) -> list[Event]:
        """Open a block of this kind, unless the open block is of this kind."""
        if self._open is not None and self._open["type"] == kind:
            return []
        events = self._close()
        self._space = ""
        self._open = {"type": kind, **fields}
        return [
            *events,
            {
                "type": "content_block_start",
                "index": len(self.content),
                "content_block": dict(self._open),
            },
        ]

    def _close(self) -> list[Event]:
        block, index = self._open, len(self.content)
        if block is None:
            return []
        text = "".join(self._pieces)
        events: list[Event] = []
        if block["type"] == "text":
            block["text"] = text
        elif block["type"] == "tool_use":
            block["input"] = json.loads(complete_object(text or "{}"))
        else:
            block["signature"] = fingerprint(text) if self._show_thinking else carry(text)
            block["thinking"] = text if self._show_thinking else ""
            events.append(self._delta("signature_delta", "signature", block["signature"]))
        self.content.append(block)
        self._open, self._pieces = None, []
        return [*events, {"type": "content_block_stop", "index": index}]

    def _delta(self, kind: str, field: str, text: str) -> Event:
        return {
            "type": "content_block_delta",
            "index": len(self.content),
            "delta": {"type": kind, field: text},
        }


_STOP_REASONS = {"stop": "end_turn", "tool_calls": "tool_use", "length": "max_tokens"}

PING = event({"type": "ping"}, "ping")


class Reply:
    """One reply: takes deltas, and returns stream events or the whole message.

    `limit` is the number of tokens that fit into the context, `asked` the request's `max_tokens`.
    """

    def __init__(
        self, model: str, prompt_tokens: int, *, asked: int, limit: int, show_thinking: bool
    ) -> None:
        self._id = f"msg_{uuid.uuid4().hex[:24]}"
        self._model = model
        self._blocks = Blocks(show_thinking=show_thinking)
        self._prompt_tokens = prompt_tokens
        self._usage: dict[str, Any] = {}
        self._full = limit < asked
        self._stop_reason: str | None = None
        self._stop_sequence: str | None = None

    def begin(self, cached_tokens: int) -> str:
        """Return the events that begin the stream; call it before `take`."""
        self._usage = usage_json(ChatUsage(self._prompt_tokens, 0, cached_tokens))
        return event({"type": "message_start", "message": self.json()}, "message_start")

    def take(self, delta: ChatDelta) -> str:
        """Return the events for a delta, including the final events if the delta ends the reply."""
        events = self._blocks.take(delta.parts)
        if delta.finish is None:
            return _written(events)
        events += self._blocks.end()
        if delta.usage is not None:
            self._usage = usage_json(delta.usage)
        self._stop_sequence = delta.stop_sequence
        self._stop_reason = self._reason(delta)
        why = {"stop_reason": self._stop_reason, "stop_sequence": self._stop_sequence}
        events.append({"type": "message_delta", "delta": why, "usage": self._usage})
        events.append({"type": "message_stop"})
        return _written(events)

    def json(self) -> dict[str, Any]:
        """Return the message object of the deltas taken so far."""
        return {
            "id": self._id,
            "type": "message",
            "role": "assistant",
            "model": self._model,
            "content": self._blocks.content,
            "stop_reason": self._stop_reason,
            "stop_sequence": self._stop_sequence,
            "usage": self._usage,
        }

    def _reason(self, delta: ChatDelta) -> str:
        if delta.stop_sequence is not None:
            return "stop_sequence"
        if delta.finish == "length" and self._full:
            return "model_context_window_exceeded"
        return _STOP_REASONS.get(delta.finish or "stop", "end_turn")


def usage_json(usage: ChatUsage) -> dict[str, Any]:
    """Return the token counts; `input_tokens` excludes cached prompt tokens."""
    return {
        "input_tokens": usage.prompt_tokens - usage.cached_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": usage.cached_tokens,
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"thinking_tokens": usage.reasoning_tokens},
    }


def _written(events: Iterable[dict[str, Any]]) -> str:
    return "".join(event(body, body["type"]) for body in events)


_ANTHROPIC = ("/anthropic/v1",)


def router(pool: ModelPool) -> APIRouter:
    routes = APIRouter(tags=["Anthropic"], route_class=preloadable(pool))

    async def create_message(body: MessagesRequest, request: Request) -> Response:
        """Reply to a conversation, with one JSON object or with server-sent events."""
        body.check()
        preset = body.preset or request.headers.get(PRESET_HEADER)
        return await answer(
            request, pool, body, partial(start, body, preset), partial(whole, body),
            partial(events, body), failure=error_event(Family.ANTHROPIC),
        )  # fmt: skip

    async def count_message_tokens(body: PromptRequest, request: Request) -> dict[str, Any]:
        """Return the number of prompt tokens of these messages, including the tools."""

        async def count() -> int:
            async with pool.lease(body.model) as model:
                return await count_prompt(model, await compute(spec_of, body, model))

        return {"input_tokens": await unless_gone(request, count())}

    add_route(routes, "/messages", create_message, prefixes=_ANTHROPIC)
    add_route(routes, "/messages/count_tokens", count_message_tokens, prefixes=_ANTHROPIC)
    return routes


def spec_of(body: PromptRequest, model: ServedModel, preset: str | None = None) -> ChatSpec:
    """Return the API-neutral form of a request; raises `RequestError`."""
    messages = template_messages(body.system, body.messages, picture_reader(model))
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
        # Clients that do not mention thinking expect the reply to begin with text.
        reasoning=thinking is not None and thinking.type != "disabled" and not continues,
        reasoning_budget=thinking.budget_tokens if thinking is not None else None,
        continues=continues,
    )


async def start(body: MessagesRequest, preset: str | None, model: ServedModel) -> ChatStream:
    """Start the reply. Raises what `start_chat` raises, worded as Anthropic's clients expect."""
    spec = await compute(spec_of, body, model, preset)
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
    """Return the complete message."""
    reply = _reply(body, model, stream)
    async for delta in stream:
        reply.take(delta)
    return reply.json()


async def events(
    body: MessagesRequest, model: ServedModel, stream: ChatStream
) -> AsyncGenerator[str, None]:
    """Yield the stream events of the message."""
    reply = _reply(body, model, stream)
    begun = False
    async for delta in stream:
        # The first event has the number of cached tokens, so it waits for the first token.
        head = "" if begun else reply.begin(stream.cached_tokens) + PING
        begun = True
        yield head + reply.take(delta)


def _reply(body: MessagesRequest, model: ServedModel, stream: ChatStream) -> Reply:
    return Reply(
        body.model,
        stream.prompt_tokens,
        asked=body.max_tokens,
        limit=model.max_model_len - stream.prompt_tokens,
        show_thinking=body.thinking is None or body.thinking.display != "omitted",
    )
