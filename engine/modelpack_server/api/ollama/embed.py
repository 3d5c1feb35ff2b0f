"""The routes POST /api/embed and /api/embeddings."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

from fastapi import APIRouter, Request, Response

from modelpack_engine.embedding.async_embedder import AsyncEmbedder
from modelpack_engine.embedding.request import Embeddings, EmbedOptions, Input
from modelpack_engine.errors import RequestError
from modelpack_server.api.model_use import seconds_of, unless_gone, with_embedding_model
from modelpack_server.api.ollama.bodies import EmbedBody, EmbeddingsBody, KeepAlive
from modelpack_server.api.ollama.chat import unload
from modelpack_server.api.ollama.ndjson import JsonRoute, find
from modelpack_server.api.ollama.replies import Clock
from modelpack_server.pool.pool import ModelPool

#: The limit of inputs in one request.
MAX_INPUTS = 2048


def router(pool: ModelPool) -> APIRouter:
    routes = APIRouter(tags=["Ollama"], route_class=JsonRoute)

    async def vectors(
        request: Request, name: str, inputs: list[Input], options: EmbedOptions,
        keep_alive: KeepAlive | None, clock: Clock,
    ) -> Embeddings:  # fmt: skip
        """Return the vectors; without inputs, load or unload the model."""
        await find(pool, name)
        seconds = seconds_of(keep_alive)
        if not inputs:
            if seconds == 0:
                await unload(pool, name)
            else:
                await unless_gone(request, pool.preload(name, keep_alive=seconds))
                clock.model_is_there()
            return Embeddings((), ())

        async def work(model: AsyncEmbedder) -> Embeddings:
            clock.model_is_there()
            return await model.embed(inputs, options)

        return await with_embedding_model(request, pool, name, work, keep_alive=keep_alive)

    @routes.post("/api/embed", response_model=None)
    async def embed(body: EmbedBody, request: Request) -> Response:
        """Return the embeddings of texts, normalized to length 1."""
        clock = Clock()
        texts = [body.input] if isinstance(body.input, str) else body.input
        if len(texts) > MAX_INPUTS:
            raise RequestError(
                f"input has {len(texts)} items, the limit is {MAX_INPUTS}", param="input"
            )
        inputs: list[Input] = [] if texts == [""] else list(texts)
        options = EmbedOptions(body.dimensions or None, True, body.truncate)
        found = await vectors(request, body.model, inputs, options, body.keep_alive, clock)
        facts = {
            "model": body.model,
            "total_duration": clock.total,
            "load_duration": clock.load,
            "prompt_eval_count": found.num_tokens,
        }
        return await _written(lambda: facts | {"embeddings": [v.tolist() for v in found.vectors]})

    @routes.post("/api/embeddings", response_model=None)
    async def embeddings(body: EmbeddingsBody, request: Request) -> Response:
        """Return the embedding of one text, not normalized."""
        inputs: list[Input] = [body.prompt] if body.prompt else []
        options = EmbedOptions(truncate=True, noun="prompt")
        found = await vectors(request, body.model, inputs, options, body.keep_alive, Clock())
        vector = found.vectors[0].tolist() if found.vectors else []
        return await _written(lambda: {"embedding": vector})

    return routes


async def _written(make: Callable[[], dict[str, Any]]) -> Response:
    """Respond with the result of `make`, encoded in a thread: thousands of vectors take long."""
    content = await asyncio.to_thread(lambda: json.dumps(make(), separators=(",", ":")))
    return Response(content, media_type="application/json")
