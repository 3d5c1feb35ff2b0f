"""The route POST /api/generate."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

from fastapi import APIRouter, Request, Response

from modelpack.errors import DeniedError
from modelpack_engine.errors import RequestError
from modelpack_engine.models.chat_template import as_jinja
from modelpack_engine.request import EngineRequest
from modelpack_engine.worker.threads import in_thread, prepare
from modelpack_server.api.bodies import compute
from modelpack_server.api.ollama import replies
from modelpack_server.api.ollama.bodies import GenerateBody, check_request_template
from modelpack_server.api.ollama.chat import (
    common_spec,
    constraint_of,
    load_or_unload,
    reply,
    sampling,
    with_images,
)
from modelpack_server.api.ollama.models import shown_template
from modelpack_server.api.ollama.ndjson import JsonRoute
from modelpack_server.conversation.chat import Answer, ChatStream, start_chat
from modelpack_server.conversation.logprobs import TextLogprobs
from modelpack_server.conversation.masks import text_mask
from modelpack_server.conversation.pictures import picture_reader
from modelpack_server.conversation.prompt import Markers, find_markers, infilling_prompt
from modelpack_server.conversation.served_model import ServedModel
from modelpack_server.conversation.spec import ChatSpec
from modelpack_server.pool.pool import ModelPool


def router(pool: ModelPool, *, request_templates: bool = False) -> APIRouter:
    """Return the route; `request_templates` lets admins send templates."""
    routes = APIRouter(tags=["Ollama"], route_class=JsonRoute)

    @routes.post("/api/generate", response_model=None)
    async def generate(body: GenerateBody, request: Request) -> Response:
        """Reply to a prompt, with lines or one object; without a prompt, load the model."""
        _check_raw(body)
        if not body.prompt and not body.suffix and not body.images:
            return await load_or_unload(request, pool, body, replies.generated)

        async def start(model: ServedModel) -> ChatStream:
            if body.suffix:
                return await _infill(body, model)
            if body.raw:
                return await _continue(body, model, await model.text_prompt(body.prompt))
            template = await _template(pool, body, model, request, request_templates)
            return await start_chat(model, await compute(spec_of, body, model, template))

        def context(stream: ChatStream, reader: replies.Reader) -> dict[str, Any]:
            if body.images:
                return {}  # tokens that stand for pictures mean nothing without them
            if body.raw or body.suffix:
                return {}
            return {"context": [*stream.prompt_ids, *reader.token_ids]}

        return await reply(request, pool, body, replies.generated, start, context)

    return routes


async def _template(
    pool: ModelPool, body: GenerateBody, model: ServedModel, request: Request, allowed: bool
) -> str | None:
    """Return the template of a request as Jinja, or None to use the model's template.

    Raises `DeniedError` if the client may not send templates.
    """
    if not body.template or body.template == model.tokenizer.chat_template:
        return None
    try:
        check_request_template(request, allowed=allowed)
    except DeniedError:
        if body.template == await shown_template(pool, body.model):
            return None
        raise
    return await in_thread(as_jinja, body.template)


def spec_of(body: GenerateBody, model: ServedModel, template: str | None = None) -> ChatSpec:
    """Return the API-neutral form of a request; raises `RequestError`."""
    system = [{"role": "system", "content": body.system}] if body.system else []
    content = with_images(body.prompt, body.images, body.model, picture_reader(model))
    messages: list[dict[str, Any]] = [*system, {"role": "user", "content": content}]
    return common_spec(body, model, messages, template=template, earlier=body.context)


async def _infill(body: GenerateBody, model: ServedModel) -> ChatStream:
    """Start generating the text between the prompt and the suffix."""
    markers = find_markers(model.tokenizer)
    if markers is None:
        raise RequestError(f"{body.model!r} does not support insert", param="suffix")
    prompt = await prepare(
        len(body.prompt) + len(body.suffix),
        lambda: _infilling_ids(model, markers, body.prompt, body.suffix),
    )
    return await _continue(body, model, prompt)


def _infilling_ids(model: ServedModel, markers: Markers, beginning: str, end: str) -> list[int]:
    for text, param in ((beginning, "prompt"), (end, "suffix")):
        model.check_text(text, param=param)
    return infilling_prompt(model.tokenizer, markers, beginning, end)


async def _continue(body: GenerateBody, model: ServedModel, prompt: list[int]) -> ChatStream:
    """Start generating after the tokens of a prompt, without a template."""
    params, asked = sampling(body, model)
    limit = model.token_limit(len(prompt), asked, param="prompt")
    constraint = constraint_of(body)
    mask = await asyncio.to_thread(text_mask, model, constraint) if constraint else None
    params = replace(params, max_tokens=limit, mask=mask)
    stream = await model.submit(EngineRequest(prompt, params, continues_text=True))
    logprobs = TextLogprobs(model.tokenizer) if params.logprobs is not None else None
    return ChatStream(stream, [Answer(0, logprobs=logprobs)], False, prompt)


def _check_raw(body: GenerateBody) -> None:
    """Raise `RequestError` for fields that cannot be combined."""
    for name in ("template", "system", "context", "suffix"):
        if body.raw and getattr(body, name):
            raise RequestError(f"raw cannot be combined with {name}", param=name)
    for name in ("raw", "suffix"):
        if body.images and getattr(body, name):
            raise RequestError(f"images cannot be combined with {name}", param="images")
