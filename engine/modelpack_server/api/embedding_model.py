"""The embedding model that a request names: leased for as long as the request takes."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TypeVar

from fastapi import Request

from modelpack_engine.embedding.async_embedder import AsyncEmbedder
from modelpack_engine.errors import RequestError
from modelpack_server.api.answering import unless_gone
from modelpack_server.pool.keep_alive import parse_keep_alive
from modelpack_server.pool.pool import ModelPool

T = TypeVar("T")


async def with_embedding_model(
    request: Request,
    pool: ModelPool,
    name: str,
    work: Callable[[AsyncEmbedder], Awaitable[T]],
    *,
    keep_alive: str | float | None = None,
) -> T:
    """Return what `work` returns for the model `name`; drop it if the client leaves.

    Raises `RequestError` for a model that generates text, and what `ModelPool.lease` raises.
    """
    seconds = None if keep_alive is None else parse_keep_alive(keep_alive)

    async def run() -> T:
        async with pool.lease(name, keep_alive=seconds) as served:
            if not isinstance(served.engine, AsyncEmbedder):
                raise RequestError(
                    f"{name} generates text; it is no embedding model",
                    param="model",
                    hint="a model that can do both is loaded for embeddings in mode embedding",
                )
            return await work(served.engine)

    return await unless_gone(request, run())
