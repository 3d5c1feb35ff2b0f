"""POST /v1/embeddings. Source: the OpenAI API reference, "Create embeddings".

Beyond it: `truncate` cuts inputs that are too long, `prompt_name` is one of the model's prompts.
"""

from __future__ import annotations

import asyncio
import base64
import json
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request, Response
from pydantic import ConfigDict, Field, StrictBool, StrictInt, StrictStr

from modelpack_engine.embedding.async_embedder import AsyncEmbedder
from modelpack_engine.embedding.request import Embeddings, EmbedOptions, Input, Vector
from modelpack_engine.errors import RequestError
from modelpack_server.api.bodies import Body
from modelpack_server.api.model_use import preloadable, with_embedding_model
from modelpack_server.api.paths import add_route
from modelpack_server.pool.pool import ModelPool

#: The most inputs of one request, as OpenAI has it.
MAX_INPUTS = 2048


class EmbeddingRequest(Body):
    """The body of POST /v1/embeddings; `user` is accepted and of no effect."""

    model_config = ConfigDict(extra="ignore")
    model: Annotated[StrictStr, Field(min_length=1)]
    input: Any
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: StrictInt | None = None
    user: StrictStr | None = None
    truncate: StrictBool | None = None
    prompt_name: StrictStr | None = None
    keep_alive: StrictStr | StrictInt | float | None = None

    @property
    def options(self) -> EmbedOptions:
        """How the vectors are wanted."""
        return EmbedOptions(self.dimensions, None, bool(self.truncate), self.prompt_name)


def router(pool: ModelPool) -> APIRouter:
    """Return the route and its aliases."""
    routes = APIRouter(tags=["OpenAI"], route_class=preloadable(pool))

    async def create_embedding(body: EmbeddingRequest, request: Request) -> Response:
        """Turn texts, or lists of token ids, into vectors."""
        inputs = inputs_of(body.input)

        async def work(model: AsyncEmbedder) -> Embeddings:
            return await model.embed(inputs, body.options)

        found = await with_embedding_model(
            request, pool, body.model, work, keep_alive=body.keep_alive
        )
        # Thousands of vectors take a while to write: not on the event loop.
        content = await asyncio.to_thread(_content, body, found)
        return Response(content, media_type="application/json")

    add_route(routes, "/embeddings", create_embedding, bare=True)
    return routes


def inputs_of(given: Any) -> list[Input]:
    """Return the inputs of a request: a string, strings, token ids, or lists of these.

    Raises `RequestError` for anything else, for none, and for more than `MAX_INPUTS`.
    """
    inputs: list[Input]
    if isinstance(given, str) or _is_ids(given):
        inputs = [given]
    elif isinstance(given, list) and (_are_texts(given) or _are_lists(given)):
        inputs = given
    else:
        raise RequestError(
            "expected input to be a string, a list of strings, a list of token ids,"
            " or a list of lists of token ids",
            param="input",
        )
    if not inputs:
        raise RequestError("input is empty", param="input")
    if len(inputs) > MAX_INPUTS:
        raise RequestError(
            f"input has {len(inputs)} items, the limit is {MAX_INPUTS}", param="input"
        )
    return inputs


def _is_ids(given: Any) -> bool:
    return (
        isinstance(given, list)
        and bool(given)
        and all(isinstance(item, int) and not isinstance(item, bool) for item in given)
    )


def _are_texts(given: list[Any]) -> bool:
    return all(isinstance(item, str) for item in given)


def _are_lists(given: list[Any]) -> bool:
    return all(item == [] or _is_ids(item) for item in given)


def _content(body: EmbeddingRequest, found: Embeddings) -> bytes:
    encode = _base64 if body.encoding_format == "base64" else _floats
    reply = {
        "object": "list",
        "data": [
            {"object": "embedding", "index": index, "embedding": encode(vector)}
            for index, vector in enumerate(found.vectors)
        ],
        "model": body.model,
        "usage": {"prompt_tokens": found.num_tokens, "total_tokens": found.num_tokens},
    }
    return json.dumps(reply, separators=(",", ":"), ensure_ascii=False).encode()


def _base64(vector: Vector) -> str:
    """Return little-endian float32 in base64."""
    return base64.b64encode(vector.astype("<f4").tobytes()).decode()


def _floats(vector: Vector) -> list[float]:
    floats: list[float] = vector.tolist()
    return floats
