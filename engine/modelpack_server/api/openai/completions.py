"""The route POST /v1/completions."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from functools import partial
from typing import Any

from fastapi import APIRouter, Request, Response

from modelpack_engine.async_engine import RequestStream
from modelpack_engine.errors import RequestError
from modelpack_engine.outputs import FinishReason, RequestEvent, TokenLogprob, Usage
from modelpack_engine.request import EngineRequest
from modelpack_server.api.bodies import call, large_response, written
from modelpack_server.api.model_use import PRESET_HEADER, answer, preloadable
from modelpack_server.api.openai.replies import Envelope, completion_logprobs, quoted, total_usage
from modelpack_server.api.openai.requests import CompletionRequest, constraint_of
from modelpack_server.api.paths import add_route
from modelpack_server.api.sse import DONE
from modelpack_server.api.vocabulary import Vocabulary
from modelpack_server.conversation.logprobs import TextLogprobs
from modelpack_server.conversation.masks import text_mask
from modelpack_server.conversation.served_model import ServedModel
from modelpack_server.pool.pool import ModelPool
from modelpack_server.tool_parsers.parts import Text

_DEFAULT_MAX_TOKENS = 16


def router(pool: ModelPool) -> APIRouter:
    routes = APIRouter(tags=["OpenAI"], route_class=preloadable(pool))

    async def create_completion(body: CompletionRequest, request: Request) -> Response:
        """Continue texts, with one JSON object or with server-sent events."""
        body.check()
        preset = request.headers.get(PRESET_HEADER)
        begin = partial(start, body, preset)
        return await answer(request, pool, body, begin, partial(whole, body), partial(events, body))

    add_route(routes, "/completions", create_completion)
    return routes


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt of a request and its stream; its choices have the indexes from `first` on."""

    first: int
    token_ids: list[int]
    text: str
    stream: RequestStream


class Prompts(list[Prompt]):
    """The prompts of a request, which run concurrently."""

    def abort(self) -> None:
        """Abort the prompts that have not ended."""
        for prompt in self:
            prompt.stream.abort()


async def start(body: CompletionRequest, preset: str | None, model: ServedModel) -> Prompts:
    """Submit every prompt to the engine; raises before the response begins."""
    encoded = [await model.text_prompt(prompt) for prompt in body.prompts]
    if not all(encoded):
        raise RequestError("prompt is empty", param="prompt")
    given = body.given() | {"logprobs": body.logprobs}
    if body.echo:
        given["prompt_logprobs"] = body.logprobs
    if (constraint := constraint_of(body.response_format)) is not None:
        given["mask"] = await asyncio.to_thread(text_mask, model, constraint)
    asked = body.max_tokens or model.default("max_tokens") or _DEFAULT_MAX_TOKENS
    prompts = Prompts()
    try:
        for i, token_ids in enumerate(encoded):
            limit = model.token_limit(len(token_ids), asked, param="prompt")
            limits = {"max_tokens": limit, "min_tokens": min(body.min_tokens, limit)}
            params = model.sampling_params(given | limits, preset=body.preset or preset)
            stream = await model.submit(
                EngineRequest(token_ids, params, n=body.n, continues_text=True)
            )
            text = model.tokenizer.decode(token_ids, skip_special_tokens=False) if body.echo else ""
            prompts.append(Prompt(i * body.n, token_ids, text, stream))
    except BaseException:
        prompts.abort()
        raise
    return prompts


class _Writer:
    """Turns a prompt's events into choices; with `echo`, the prompt itself comes first."""

    def __init__(self, body: CompletionRequest, model: ServedModel, prompt: Prompt) -> None:
        self._body = body
        self._words = Vocabulary(model.tokenizer)
        self._prompt = prompt
        self._offsets = [0] * body.n
        self._matched = [TextLogprobs(model.tokenizer) for _ in range(body.n)]
        self._begun: set[int] = set()

    def written_choice(self, event: RequestEvent) -> str:
        """Return the piece of a choice for an event, as JSON text."""
        return written(self.choice(event))

    def choice(self, event: RequestEvent) -> dict[str, Any]:
        """Return the piece of a choice for an event."""
        echoed, shown = "", None
        prompt: list[tuple[int, TokenLogprob | None]] = []
        if self._body.echo and event.index not in self._begun:
            echoed = self._prompt.text
            prompt = list(zip(self._prompt.token_ids, event.prompt_logprobs or (), strict=False))
            self._begun.add(event.index)
        if self._body.logprobs is not None:
            logprobs = self._matched[event.index].take(
                event.logprobs or (), [Text(event.text)], ended=event.finished
            )
            if prompt or logprobs:
                offset = self._offsets[event.index]
                shown = completion_logprobs(prompt, logprobs, self._words, offset)
            data = b"".join(item.data or b"" for item in logprobs)
            self._offsets[event.index] += len(echoed) + len(data.decode(errors="replace"))
        return {
            "index": self._prompt.first + event.index,
            "text": echoed + event.text,
            "logprobs": shown,
            "finish_reason": _reason(event),
        }


async def whole(
    body: CompletionRequest, model: ServedModel, prompts: Prompts
) -> dict[str, Any] | Response:
    """Return the response after all choices of all prompts have ended."""
    bodies: dict[int, dict[str, Any]] = {}
    large = body.logprobs is not None
    usages: dict[int, Usage] = {}

    async def drain(prompt: Prompt) -> None:
        writer = _Writer(body, model, prompt)
        async for event in prompt.stream:
            piece = await call(large, writer.choice, event)
            _join(bodies, piece)
            if event.usage:
                usages[piece["index"]] = event.usage

    await asyncio.gather(*(drain(prompt) for prompt in prompts))
    ordered = [usages[index] for index in sorted(usages)]
    envelope = Envelope("cmpl", "text_completion", body.model)
    made = envelope.body([bodies[i] for i in sorted(bodies)], total_usage(ordered, len(prompts)))
    return await large_response(lambda: made) if large else made


async def events(
    body: CompletionRequest, model: ServedModel, prompts: Prompts
) -> AsyncGenerator[str, None]:
    """Yield the stream events, prompt after prompt, while all prompts run concurrently."""
    envelope = Envelope("cmpl", "text_completion", body.model)
    usage = "null" if body.include_usage else ""
    large = body.logprobs is not None
    plain = not large and not body.echo
    usages = []
    for prompt in prompts:
        writer = _Writer(body, model, prompt)
        async for event in prompt.stream:
            if plain and event.finish_reason is None:
                if event.text:
                    index = prompt.first + event.index
                    yield envelope.chunk(
                        f'{{"index":{index},"text":{quoted(event.text)},"logprobs":null,'
                        '"finish_reason":null}',
                        usage,
                    )
            elif event.text or event.token_ids or event.finished:
                choice = await call(large, writer.written_choice, event)
                yield envelope.chunk(choice, usage)
            if event.usage:
                usages.append(event.usage)
    tail = envelope.chunk("", json.dumps(total_usage(usages, len(prompts))))
    yield (tail if body.include_usage else "") + DONE


def _reason(event: RequestEvent) -> str | None:
    if event.finish_reason is None:
        return None
    return "length" if event.finish_reason is FinishReason.LENGTH else "stop"


def _join(bodies: dict[int, dict[str, Any]], piece: dict[str, Any]) -> None:
    """Append a piece of a choice to its object in `bodies`."""
    body = bodies.setdefault(piece["index"], piece)
    if body is piece:
        return
    body["text"] += piece["text"]
    body["finish_reason"] = piece["finish_reason"]
    if body["logprobs"] is None:
        body["logprobs"] = piece["logprobs"]
    elif piece["logprobs"] is not None:
        for key, values in piece["logprobs"].items():
            body["logprobs"][key] += values
