"""Chat requests: render the prompt, submit it, and turn the engine's events into deltas."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from modelpack_engine.async_engine import RequestStream
from modelpack_engine.core.detokenizer import stop_strings
from modelpack_engine.outputs import FinishReason, RequestEvent, TokenLogprob, Usage
from modelpack_engine.request import EngineRequest, Media
from modelpack_engine.worker.threads import in_thread, prepare
from modelpack_server.conversation.logprobs import TextLogprobs
from modelpack_server.conversation.masks import make_masks
from modelpack_server.conversation.pictures import (
    SentFile,
    place_pictures,
    shows_parts,
    take_pictures,
    with_pages,
)
from modelpack_server.conversation.prompt import PLAIN_FAMILY, render
from modelpack_server.conversation.served_model import ServedModel
from modelpack_server.conversation.spec import ChatDelta, ChatSpec, ChatUsage, Finish
from modelpack_server.tool_parsers.families import starts_reasoning
from modelpack_server.tool_parsers.parser import OutputParser
from modelpack_server.tool_parsers.parts import Part, Text, Tool


class TextStops:
    """Passes parts on up to the first stop string; holds back text that may begin one."""

    __slots__ = ("_automaton", "_held", "_state", "found")

    def __init__(self, strings: tuple[str, ...]) -> None:
        self._automaton = stop_strings(strings)
        self._state = 0
        self._held = ""
        #: The stop string that ended the text.
        self.found: str | None = None

    def pass_on(self, parts: Iterable[Part], *, may_stop: bool = True) -> list[Part]:
        """Return the parts that cannot contain a stop string; nothing after the first one."""
        passed: list[Part] = []
        for part in parts:
            if self.found is not None:
                break
            if isinstance(part, Text):
                if text := self._cut(part.text, may_stop):
                    passed.append(Text(text))
            else:
                passed += self.finish()
                passed.append(part)
        return passed

    def finish(self) -> list[Part]:
        """Return the text held back, since the text has ended."""
        held, self._held, self._state = self._held, "", 0
        return [Text(held)] if held and self.found is None else []

    def _cut(self, text: str, may_stop: bool) -> str:
        automaton, state = self._automaton, self._state
        for end, character in enumerate(text, 1):
            state = automaton.step(state, character)
            if may_stop and (found := automaton.found(state)) is not None:
                self.found = found
                kept = self._held + text[:end]
                return kept[: len(kept) - len(found)]
        self._state = state
        whole = self._held + text
        final = len(whole) - automaton.depth(state)
        self._held = whole[final:]
        return whole[:final]


_FINISHES: dict[FinishReason, Finish] = {
    FinishReason.STOP: "stop",
    FinishReason.LENGTH: "length",
    FinishReason.ABORT: "abort",
}


class Answer:
    """One choice: parses its text into parts, ends it at stop strings and counts its tokens.

    Without a parser, the engine finds stop strings. With one, this class searches the text outside
    of reasoning and calls, and sets `is_over` when the engine must end the choice. With
    `calls_only`, text outside of calls is dropped.
    """

    def __init__(
        self,
        index: int,
        parser: OutputParser | None = None,
        stops: tuple[str, ...] = (),
        *,
        min_tokens: int = 0,
        calls_only: bool = False,
        logprobs: TextLogprobs | None = None,
    ) -> None:
        self._index = index
        self._logprobs = logprobs
        self._parser = parser
        self._stops = TextStops(stops) if stops else None
        self._min_tokens = min_tokens
        self._tokens = 0
        self._calls_only = calls_only
        #: Whether the choice is complete except for the engine's last event.
        self.is_over = False

    def take(self, event: RequestEvent) -> ChatDelta:
        """Return the delta for an event."""
        if self.is_over:
            if event.finish_reason is None:
                return ChatDelta(self._index)
            return self._ended(event, (), FinishReason.STOP, None)
        self._tokens += len(event.token_ids)
        if self._parser is None:
            parts: tuple[Part, ...] = (Text(event.text),) if event.text else ()
        else:
            parts = tuple(self._parsed(event))
        logprobs = event.logprobs
        if self._logprobs is not None and logprobs is not None:
            ended = self.is_over or event.finish_reason is not None
            logprobs = self._logprobs.take(logprobs, parts, ended=ended) or None
        if event.finish_reason is None:
            return ChatDelta(self._index, parts, event.token_ids, logprobs)
        reason = FinishReason.STOP if self.is_over else event.finish_reason
        return self._ended(event, parts, reason, logprobs)

    def _parsed(self, event: RequestEvent) -> list[Part]:
        """Return the final parts, up to a stop string or the last call."""
        assert self._parser is not None
        parts = self._parser.feed(event.text, event.token_ids)
        self.is_over = self._parser.done
        if event.finish_reason is not None:
            cut = event.finish_reason is FinishReason.LENGTH
            parts = [*parts, *self._parser.finish(cut=cut)]
        if self._calls_only:  # the markup of an incomplete call
            parts = [part for part in parts if not isinstance(part, Text)]
        if self._stops is not None:
            parts = self._stops.pass_on(parts, may_stop=self._tokens > self._min_tokens)
            if event.finish_reason is not None:
                parts += self._stops.finish()
            self.is_over = self.is_over or self._stops.found is not None
        return parts

    def _ended(
        self,
        event: RequestEvent,
        parts: tuple[Part, ...],
        reason: FinishReason,
        logprobs: tuple[TokenLogprob, ...] | None,
    ) -> ChatDelta:
        stopped_by = self._stops.found if self._stops is not None else None
        if stopped_by is None and isinstance(event.stop_reason, str):
            stopped_by = event.stop_reason
        finish = _FINISHES.get(reason, "stop")
        if finish == "stop" and self._parser is not None and self._parser.tool_calls:
            finish = "tool_calls"
        counted = event.usage or Usage(0, 0)
        reasoned = self._parser.reasoning_tokens if self._parser is not None else 0
        usage = ChatUsage(
            counted.prompt_tokens, self._tokens, counted.cached_tokens,
            counted.accepted_tokens, counted.rejected_tokens, reasoned,
        )  # fmt: skip
        return ChatDelta(
            self._index, parts, event.token_ids, logprobs, finish, stopped_by, usage,
            event.timing,
        )  # fmt: skip


class ChatStream:
    """The reply to a conversation: iterate over it for the deltas of all choices.

    Leaving its context aborts the choices that have not ended. `starts_reasoning` says that the
    prompt has opened a block of reasoning; `prompt_ids` are the prompt's tokens. `cached_tokens`
    of these came from the prefix cache, which is known when the first delta is.
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
        self.cached_tokens = 0
        self.starts_reasoning = reasons
        self._stream = stream
        self._answers = answers

    async def __aenter__(self) -> ChatStream:
        return self

    async def __aexit__(self, *_: object) -> None:
        self._stream.abort()

    def abort(self) -> None:
        """Abort all choices; their KV blocks are free after one step."""
        self._stream.abort()

    async def __aiter__(self) -> AsyncIterator[ChatDelta]:
        async for event in self._stream:
            self.cached_tokens = event.cached_tokens or self.cached_tokens
            answer = self._answers[event.index]
            was_over = answer.is_over
            delta = answer.take(event)
            if answer.is_over and not was_over and delta.finish is None:
                self._stream.abort_choice(event.index)
            if delta.parts or delta.token_ids or delta.finish is not None:
                yield delta


async def start_chat(model: ServedModel, spec: ChatSpec) -> ChatStream:
    """Render the conversation and submit it to the engine; return the stream of its reply.

    Raises `RequestError` (with the word "template" in its text if the template failed),
    `ContextLengthError`, `QueueFullError`, or `EngineError` if the engine is not running.
    """
    spec = _completed(spec, model)
    # In a thread, since a template or a long text may take long.
    prompt, token_ids, media = await _prepared(model, spec)
    tools = offered_tools(spec)
    limit = model.token_limit(len(token_ids), spec.max_tokens)
    written = model.format
    if tools and written.family is None:
        written = replace(written, family=PLAIN_FAMILY)
    reasons = starts_reasoning(written, prompt)
    if spec.reasoning is False and not reasons:
        written = written.without_reasoning()
    parses = written.reasoning is not None or bool(tools)
    stops = tuple(spec.params.stop)
    mask = None
    if spec.tool_choice.mode == "required" or spec.constraint or spec.reasoning_budget is not None:
        mask = await asyncio.to_thread(
            make_masks, model, spec, written, tools, starts_reasoning=reasons
        )
    params = replace(
        spec.params,
        max_tokens=limit,
        min_tokens=min(spec.params.min_tokens, limit),
        stop=() if parses else stops,
        skip_special_tokens=not (parses and written.keeps_special_tokens),
        mask=mask,
    )

    def answer(index: int) -> Answer:
        logprobs = None
        if params.logprobs is not None:
            logprobs = TextLogprobs(model.tokenizer, skips_special=params.skip_special_tokens)
        if not parses:
            return Answer(index, logprobs=logprobs)
        parser = OutputParser(
            written, tools, starts_reasoning=reasons, parallel=spec.parallel_tool_calls
        )
        forced = spec.tool_choice.mode == "required"
        return Answer(
            index, parser, stops,
            min_tokens=params.min_tokens, calls_only=forced, logprobs=logprobs,
        )  # fmt: skip

    answers = [answer(index) for index in range(spec.n)]
    stream = await model.submit(
        EngineRequest(token_ids, params, n=spec.n, continues_text=spec.continues, media=media)
    )
    return ChatStream(stream, answers, reasons, token_ids)


async def prompt_ids(model: ServedModel, spec: ChatSpec) -> list[int]:
    """Return the tokens of the conversation's prompt; raises `ContextLengthError`."""
    _, token_ids, _ = await _prepared(model, _completed(spec, model))
    return token_ids


async def count_prompt(model: ServedModel, spec: ChatSpec) -> int:
    """Return the number of tokens of the conversation's prompt."""
    return len(await prompt_ids(model, spec))


def _completed(spec: ChatSpec, model: ServedModel) -> ChatSpec:
    """Return `spec` with the model's reasoning budget if it has none."""
    budget = model.reasoning_budget
    if budget is None or spec.reasoning is not None or spec.reasoning_budget is not None:
        return spec
    if budget > 0:
        return replace(spec, reasoning_budget=budget)
    return replace(spec, reasoning=budget < 0)


def offered_tools(spec: ChatSpec) -> tuple[Tool, ...]:
    """Return the tools that the tool choice allows."""
    if spec.tool_choice.mode == "none":
        return ()
    if not spec.tool_choice.names:
        return spec.tools
    return tuple(tool for tool in spec.tools if tool.name in spec.tool_choice.names)


async def _prepared(model: ServedModel, spec: ChatSpec) -> tuple[str, list[int], tuple[Media, ...]]:
    """Return the text, the tokens and the pictures of the prompt. Raises `ContextLengthError`.

    Messages with too many characters for the context are refused before rendering.
    """
    size = sum(_characters(message) for message in spec.messages)
    model.check_texts(size)
    model.check_room(len(spec.earlier), param="context")
    messages: Sequence[dict[str, Any]] = model.preface.before(spec.messages)
    files: list[SentFile] = []
    processor = model.pictures
    if processor is not None and any(isinstance(m.get("content"), list) for m in messages):
        messages = await in_thread(with_pages, model, messages)
        template, sounds = spec.template or model.tokenizer.chat_template, processor.sounds
        shown = shows_parts(template, "image")
        placeholder = None if shown else processor.image_token
        picture = processor.image_token if shown and processor.is_marker else None
        # Where pictures become text, parts of sounds do too.
        shows_sounds = placeholder is None and shows_parts(template, "audio")
        sound = None if sounds is None or shows_sounds else sounds.token
        shows_videos = placeholder is None and shows_parts(template, "video")
        video = None if processor.videos is None or shows_videos else processor.videos.text
        messages, files = take_pictures(messages, placeholder, picture, sound, video)
    spec = replace(spec, messages=messages)
    text, token_ids = await prepare(
        size + len(spec.earlier), lambda: _prompt(model, spec, with_pictures=bool(files))
    )
    media: tuple[Media, ...] = ()
    if files:
        model.check_room(len(token_ids))
        # Not by `prepare`: its threads for large prompts are few, and pictures may take a minute.
        token_ids, media = await in_thread(place_pictures, model, token_ids, files)
    return text, token_ids, media


def _characters(message: Mapping[str, Any]) -> int:
    parts = message.get("content")
    texts = [part.get("text", "") for part in parts] if isinstance(parts, list) else []
    return sum(len(value) for value in (*message.values(), *texts) if isinstance(value, str))


def _prompt(model: ServedModel, spec: ChatSpec, *, with_pictures: bool) -> tuple[str, list[int]]:
    tokenizer = model.tokenizer
    text = render(spec, tokenizer, model.format)
    processor = model.pictures if with_pictures else None
    encode = partial(model.encode, add_special_tokens=False)
    token_ids = encode(text) if processor is None else processor.token_ids(text, encode)
    if spec.earlier:
        # The earlier turns begin with the BOS token. If it occurs again, it begins each turn.
        if token_ids[:1] == [tokenizer.bos] and token_ids.count(token_ids[0]) == 1:
            del token_ids[0]
        token_ids = [*spec.earlier, *token_ids]
    return text, token_ids
