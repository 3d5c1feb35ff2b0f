"""The routes POST /v1/embeddings, /rerank and /score, of models that generate no text.

Sources: the OpenAI API reference, "Create embeddings"; the rerank APIs of Jina and Cohere, which
have these fields in common; vLLM's score API. Additions to OpenAI's: `truncate` truncates inputs
that are too long, `prompt_name` selects one of the model's prompts.
"""

from __future__ import annotations

import asyncio
import base64
import json
import time
import uuid
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request, Response
from pydantic import Field, StrictBool, StrictInt, StrictStr

from modelpack_engine.embedding.async_embedder import AsyncEmbedder, rank_pairs
from modelpack_engine.embedding.request import Embeddings, EmbedOptions, Input, Pair, Vector
from modelpack_engine.errors import RequestError
from modelpack_server.api.bodies import Body
from modelpack_server.api.model_use import preloadable, with_embedding_model
from modelpack_server.api.paths import add_route
from modelpack_server.pool.pool import ModelPool

#: The limit of inputs in one request, as in OpenAI's API.
MAX_INPUTS = 2048


class EmbeddingRequest(Body):
    """The body of POST /v1/embeddings; `user` has no effect."""

    model: Annotated[StrictStr, Field(min_length=1)]
    input: Any
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: StrictInt | None = None
    user: StrictStr | None = None
    truncate: StrictBool | None = None
    prompt_name: StrictStr | None = None
    keep_alive: StrictStr | StrictInt | float | None = None


def router(pool: ModelPool) -> APIRouter:
    routes = APIRouter(tags=["OpenAI"], route_class=preloadable(pool))

    async def create_embedding(body: EmbeddingRequest, request: Request) -> Response:
        """Return the embeddings of texts or lists of token ids."""
        inputs = inputs_of(body.input)
        options = EmbedOptions(body.dimensions, None, bool(body.truncate), body.prompt_name)

        async def work(model: AsyncEmbedder) -> Embeddings:
            return await model.embed(inputs, options)

        found = await with_embedding_model(
            request, pool, body.model, work, keep_alive=body.keep_alive
        )
        # In a thread, since encoding thousands of vectors would block the event loop.
        content = await asyncio.to_thread(_content, body, found)
        return Response(content, media_type="application/json")

    add_route(routes, "/embeddings", create_embedding, bare=True)
    return routes


def inputs_of(given: Any) -> list[Input]:
    """Return the inputs of a request: a string, strings, token ids, or lists of these.

    Raises `RequestError` for another type, for an empty list, and for more than `MAX_INPUTS`.
    """
    inputs: list[Input]
    if isinstance(given, str) or _is_ids(given):
        inputs = [given]
    elif isinstance(given, list) and (
        all(isinstance(item, str) for item in given)
        or all(item == [] or _is_ids(item) for item in given)
    ):
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
    """Return a vector as little-endian float32 in base64."""
    return base64.b64encode(vector.astype("<f4").tobytes()).decode()


def _floats(vector: Vector) -> list[float]:
    floats: list[float] = vector.tolist()
    return floats


#: The limit of pairs in one request.
MAX_PAIRS = 2048


class _Document(Body):
    text: StrictStr


class _RankingFields(Body):
    model: Annotated[StrictStr, Field(min_length=1)]
    truncate: StrictBool | None = None
    keep_alive: StrictStr | StrictInt | float | None = None


class RerankRequest(_RankingFields):
    """The body of POST /rerank; `truncate` truncates texts that are too long."""

    query: StrictStr
    documents: list[StrictStr | _Document]
    top_n: Annotated[StrictInt, Field(ge=1)] | None = None
    return_documents: StrictBool | None = None

    @property
    def pairs(self) -> list[Pair]:
        """The pairs of the query and each document."""
        return [(self.query, text) for text in self.texts]

    @property
    def texts(self) -> list[str]:
        """The texts of the documents."""
        return [item.text if isinstance(item, _Document) else item for item in self.documents]


class ScoreRequest(_RankingFields):
    """The body of POST /score: pairs of `text_1` and `text_2`, where one text pairs with all."""

    text_1: StrictStr | list[StrictStr]
    text_2: StrictStr | list[StrictStr]

    @property
    def pairs(self) -> list[Pair]:
        """The pairs of texts to score."""
        first, second = (
            [texts] if isinstance(texts, str) else texts for texts in (self.text_1, self.text_2)
        )
        if len(first) == 1:
            first = first * len(second)
        if len(first) != len(second):
            raise RequestError(
                f"text_1 has {len(first)} texts and text_2 {len(second)};"
                " expected one, or as many as text_2",
                param="text_1",
            )
        return list(zip(first, second, strict=True))


def ranking_routes(pool: ModelPool) -> APIRouter:
    routes = APIRouter(tags=["Ranking"], route_class=preloadable(pool))

    async def ranked(
        request: Request, body: RerankRequest | ScoreRequest, nouns: tuple[str, str]
    ) -> tuple[list[float], int]:
        pairs = _checked(body.pairs, nouns)

        async def work(model: AsyncEmbedder) -> tuple[list[float], int]:
            return await rank_pairs(model, pairs, truncate=bool(body.truncate), nouns=nouns)

        return await with_embedding_model(
            request, pool, body.model, work, keep_alive=body.keep_alive
        )

    async def rerank(body: RerankRequest, request: Request) -> dict[str, Any]:
        """Rank documents by their relevance to a query."""
        scores, tokens = await ranked(request, body, ("query", "documents"))
        texts = body.texts
        order = sorted(range(len(texts)), key=lambda index: (-scores[index], index))
        results = []
        for index in order[: body.top_n]:
            result: dict[str, Any] = {"index": index, "relevance_score": scores[index]}
            if body.return_documents is not False:
                result["document"] = {"text": texts[index]}
            results.append(result)
        return {
            "id": f"rerank-{uuid.uuid4().hex}",
            "model": body.model,
            "results": results,
            "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
        }

    async def score(body: ScoreRequest, request: Request) -> dict[str, Any]:
        """Score pairs of texts."""
        scores, tokens = await ranked(request, body, ("text_1", "text_2"))
        return {
            "id": f"score-{uuid.uuid4().hex}",
            "object": "list",
            "created": int(time.time()),
            "model": body.model,
            "data": [
                {"index": index, "object": "score", "score": value}
                for index, value in enumerate(scores)
            ],
            "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
        }

    prefixes = ("/engines", "/engines/{backend}")
    add_route(routes, "/rerank", rerank, bare=True, prefixes=("/v2", *prefixes))
    add_route(routes, "/score", score, bare=True, prefixes=prefixes)
    return routes


def _checked(pairs: list[Pair], nouns: tuple[str, str]) -> list[Pair]:
    """Return the pairs; raise `RequestError` for no pairs, too many pairs or an empty text."""
    if not pairs:
        raise RequestError(f"{nouns[1]} is empty", param=nouns[1])
    if len(pairs) > MAX_PAIRS:
        raise RequestError(
            f"{nouns[1]} has {len(pairs)} items, the limit is {MAX_PAIRS}", param=nouns[1]
        )
    for index, pair in enumerate(pairs):
        for noun, text in zip(nouns, pair, strict=True):
            if not text:
                raise RequestError(f"{noun} is empty (pair {index})", param=noun)
    return pairs
