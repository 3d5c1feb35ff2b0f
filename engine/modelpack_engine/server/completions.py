"""POST /v1/completions."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from typing import Any

from modelpack_engine.async_engine import RequestStream
from modelpack_engine.errors import RequestError
from modelpack_engine.outputs import RequestEvent, TokenLogprob, Usage
from modelpack_engine.server.replies import (
    Envelope,
    completion_logprobs,
    finish_reason,
    total_usage,
)
from modelpack_engine.server.requests import CompletionRequest
from modelpack_engine.server.serving import ServedModel

_DEFAULT_MAX_TOKENS = 16


class Prompt:
    """One prompt of a request and its stream; its choices are `first` … `first + n - 1`."""

    def __init__(self, first: int, token_ids: list[int], text: str, stream: RequestStream) -> None:
        self.first = first
        self.token_ids = token_ids
        self.text = text
        self.stream = stream


async def start(request: CompletionRequest, served: ServedModel) -> list[Prompt]:
    """Hand every prompt to the engine; raises before anything was answered."""
    request.check()
    encoded = [await served.text_prompt(prompt) for prompt in request.prompts]
    if not all(encoded):
        raise RequestError("prompt is empty", param="prompt")
    asked = request.logprobs if request.echo else None
    prompts: list[Prompt] = []
    try:
        for i, token_ids in enumerate(encoded):
            limit = served.token_limit(len(token_ids), request.max_tokens or _DEFAULT_MAX_TOKENS)
            params = request.sampling_params(limit, request.logprobs, asked)
            stream = await served.engine.submit(token_ids, params, n=request.n)
            text = served.tokenizer.decode(token_ids, skip_special_tokens=False)
            prompts.append(Prompt(i * request.n, token_ids, text, stream))
    except BaseException:
        for prompt in prompts:
            prompt.stream.abort()
        raise
    return prompts


class _Writer:
    """Turns a prompt's events into choices, with the prompt itself first where it is echoed."""

    def __init__(self, request: CompletionRequest, served: ServedModel, prompt: Prompt) -> None:
        self._request = request
        self._words = served.vocabulary
        self._prompt = prompt
        self._offsets = [0] * request.n
        self._begun: set[int] = set()

    def choice(self, event: RequestEvent) -> dict[str, Any]:
        """Return the JSON of what an event adds to its choice."""
        text = event.text
        token_ids = list(event.token_ids)
        logprobs: list[TokenLogprob | None] = list(event.logprobs or ())
        if self._request.echo and event.index not in self._begun:
            text = self._prompt.text + text
            token_ids = self._prompt.token_ids + token_ids
            logprobs = list(event.prompt_logprobs or ()) + logprobs
        self._begun.add(event.index)
        shown = None
        if self._request.logprobs is not None and logprobs:
            ids = token_ids[: len(logprobs)]
            shown = completion_logprobs(logprobs, ids, self._words, self._offsets[event.index])
        self._offsets[event.index] += len(text)
        return {
            "index": self._prompt.first + event.index,
            "text": text,
            "logprobs": shown,
            "finish_reason": finish_reason(event),
        }


async def whole(
    request: CompletionRequest, served: ServedModel, prompts: list[Prompt]
) -> dict[str, Any]:
    """Return the response once all choices of all prompts have ended."""
    bodies: dict[int, dict[str, Any]] = {}
    usages: dict[int, Usage] = {}

    async def drain(prompt: Prompt) -> None:
        writer = _Writer(request, served, prompt)
        async with prompt.stream:
            async for event in prompt.stream:
                piece = writer.choice(event)
                _join(bodies, piece)
                if event.usage:
                    usages[piece["index"]] = event.usage

    await asyncio.gather(*(drain(prompt) for prompt in prompts))
    ordered = [usages[index] for index in sorted(usages)]
    envelope = Envelope("cmpl", "text_completion", request.model)
    return envelope.body([bodies[i] for i in sorted(bodies)], total_usage(ordered, len(prompts)))


async def chunks(
    request: CompletionRequest, served: ServedModel, prompts: list[Prompt]
) -> AsyncIterator[dict[str, Any]]:
    """Yield the response piece by piece, prompt after prompt; all of them run meanwhile."""
    envelope = Envelope("cmpl", "text_completion", request.model)
    more: dict[str, Any] = {"usage": None} if request.include_usage else {}
    usages = []
    async with AsyncExitStack() as streams:
        for prompt in prompts:
            await streams.enter_async_context(prompt.stream)
        for prompt in prompts:
            writer = _Writer(request, served, prompt)
            async for event in prompt.stream:
                if event.text or event.token_ids or event.finished:
                    yield envelope.chunk([writer.choice(event)], **more)
                if event.usage:
                    usages.append(event.usage)
    if request.include_usage:
        yield envelope.chunk([], usage=total_usage(usages, len(prompts)))


def _join(bodies: dict[int, dict[str, Any]], piece: dict[str, Any]) -> None:
    body = bodies.setdefault(piece["index"], piece)
    if body is piece:
        return
    body["text"] += piece["text"]
    body["finish_reason"] = piece["finish_reason"]
    if piece["logprobs"] is None:
        return
    if body["logprobs"] is None:
        body["logprobs"] = piece["logprobs"]
        return
    for key, values in piece["logprobs"].items():
        body["logprobs"][key] += values
