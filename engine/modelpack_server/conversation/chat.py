"""Start a chat: from a ChatSpec to a stream of ChatDeltas."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import replace
from types import TracebackType
from typing import Any

from modelpack_engine.async_engine import RequestStream
from modelpack_engine.request import EngineRequest
from modelpack_engine.worker.threads import prepare
from modelpack_server.conversation.answer import Answer
from modelpack_server.conversation.masks import MakeMask, make_masks
from modelpack_server.conversation.prompt import PLAIN_FAMILY, render
from modelpack_server.conversation.served_model import ServedModel
from modelpack_server.conversation.spec import ChatDelta, ChatSpec
from modelpack_server.tool_parsers.formats import OutputFormat, starts_reasoning
from modelpack_server.tool_parsers.parser import OutputParser
from modelpack_server.tool_parsers.parts import Tool

# Enough of a prompt's end to see whether it opens a block of reasoning.
_TAIL = 256


class ChatStream:
    """The answer to a conversation: iterate over it for deltas of all choices, as they come.

    Leaving its context aborts what has not ended. `starts_reasoning` says that the prompt already
    opened a block of reasoning; `prompt_ids` are the prompt's tokens.
    """

    def __init__(
        self,
        stream: RequestStream,
        answers: Sequence[Answer],
        reasons: bool,
        prompt_ids: Sequence[int] = (),
    ) -> None:
        self.prompt_ids = prompt_ids
        self.prompt_tokens = stream.prompt_tokens
        self.starts_reasoning = reasons
        self._stream = stream
        self._answers = answers

    async def __aenter__(self) -> ChatStream:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stream.abort()

    def __aiter__(self) -> AsyncIterator[ChatDelta]:
        return self._read()

    def abort(self) -> None:
        """End all choices; their blocks are free within a step."""
        self._stream.abort()

    async def _read(self) -> AsyncIterator[ChatDelta]:
        answers = self._answers
        async for event in self._stream:
            answer = answers[event.index]
            was_over = answer.is_over
            delta = answer.take(event)
            if answer.is_over and not was_over and delta.finish is None:
                self._stream.abort_choice(event.index)
            if delta.parts or delta.token_ids or delta.finish is not None:
                yield delta


async def start_chat(model: ServedModel, spec: ChatSpec) -> ChatStream:
    """Render the conversation and hand it to the engine; raises before anything was answered.

    Raises `RequestError` (its text has the word "template" where the template failed),
    `ContextLengthError`, `QueueFullError`, or `EngineError` if the engine does not run.
    """
    spec = _completed(spec, model)
    # A template may be slow, and a long text takes its time: not on the event loop.
    prompt, token_ids = await _prepared(model, spec)
    tools = offered_tools(spec)
    limit = model.token_limit(len(token_ids), spec.max_tokens)
    written = model.format
    if tools and written.family is None:
        written = replace(written, family=PLAIN_FAMILY)
    reasons = starts_reasoning(written, prompt[-_TAIL:])
    if spec.reasoning is False and not reasons:
        written = written.without_reasoning()
    parses = written.reasoning is not None or (bool(tools))
    stops = tuple(spec.params.stop)
    mask = await _masks(model, spec, written, tools, reasons)
    params = replace(
        spec.params,
        max_tokens=limit,
        min_tokens=min(spec.params.min_tokens, limit),
        stop=() if parses else stops,
        skip_special_tokens=not (parses and written.keeps_special_tokens),
        mask=mask,
    )

    def answer(index: int) -> Answer:
        if not parses:
            return Answer(index)
        parser = OutputParser(
            written, tools, starts_reasoning=reasons, parallel=spec.parallel_tool_calls
        )
        forced = spec.tool_choice.mode == "required"
        return Answer(index, parser, stops, min_tokens=params.min_tokens, calls_only=forced)

    answers = [answer(index) for index in range(spec.n)]
    stream = await model.submit(
        EngineRequest(token_ids, params, n=spec.n, continues_text=spec.continues)
    )
    return ChatStream(stream, answers, reasons, token_ids)


async def count_prompt(model: ServedModel, spec: ChatSpec) -> int:
    """Return how many tokens the conversation's prompt has."""
    _, token_ids = await _prepared(model, _completed(spec, model))
    return len(token_ids)


def _completed(spec: ChatSpec, model: ServedModel) -> ChatSpec:
    """Return `spec` with the model's limit on reasoning, where it says nothing of it."""
    budget = model.reasoning_budget
    if budget is None or spec.reasoning is not None or spec.reasoning_budget is not None:
        return spec
    if budget > 0:
        return replace(spec, reasoning_budget=budget)
    return replace(spec, reasoning=budget < 0)


async def _masks(
    model: ServedModel,
    spec: ChatSpec,
    format: OutputFormat,
    tools: tuple[Tool, ...],
    reasons: bool,
) -> MakeMask | None:
    if (spec.tool_choice.mode != "required" and spec.constraint is None
            and spec.reasoning_budget is None):  # fmt: skip
        return None
    return await asyncio.to_thread(make_masks, model, spec, format, tools, starts_reasoning=reasons)


def offered_tools(spec: ChatSpec) -> tuple[Tool, ...]:
    """Return the tools that the model may call: none, those that are allowed, or all."""
    if spec.tool_choice.mode == "none":
        return ()
    if not spec.tool_choice.names:
        return spec.tools
    return tuple(tool for tool in spec.tools if tool.name in spec.tool_choice.names)


async def _prepared(model: ServedModel, spec: ChatSpec) -> tuple[str, list[int]]:
    """Return the text and the tokens of the prompt. Raises `ContextLengthError`.

    What cannot fit is refused before it is rendered: by the characters of its messages.
    """
    size = sum(_characters(message) for message in spec.messages)
    model.check_texts(size)
    model.check_room(len(spec.earlier), param="context")
    return await prepare(size + len(spec.earlier), lambda: _prompt(model, spec))


def _characters(message: Mapping[str, Any]) -> int:
    return sum(len(value) for value in message.values() if isinstance(value, str))


def _prompt(model: ServedModel, spec: ChatSpec) -> tuple[str, list[int]]:
    tokenizer = model.tokenizer
    spec = replace(spec, messages=model.preface.before(spec.messages))
    text = render(spec, tokenizer, model.format)
    token_ids = model.encode(text, add_special_tokens=False)
    if spec.earlier:
        # The earlier turns begin with it; where it comes again, it begins every turn.
        if token_ids[:1] == [tokenizer.bos] and token_ids.count(token_ids[0]) == 1:
            del token_ids[0]
        token_ids = [*spec.earlier, *token_ids]
    return text, token_ids
