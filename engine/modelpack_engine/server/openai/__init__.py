"""The OpenAI API: chat completions, completions, responses, embeddings, ranking
and models."""

from __future__ import annotations

from fastapi import APIRouter

from modelpack_engine.pool.pool import ModelPool
from modelpack_engine.server.openai.chat import router as chat
from modelpack_engine.server.openai.completions import router as completions
from modelpack_engine.server.openai.embeddings import router as embeddings
from modelpack_engine.server.openai.models import router as models
from modelpack_engine.server.openai.rerank import router as rerank
from modelpack_engine.server.openai.responses import router as responses


def router(pool: ModelPool) -> APIRouter:
    """Return the routes of the OpenAI API."""
    routes = APIRouter()
    for part in (chat, completions, responses, embeddings, rerank, models):
        routes.include_router(part(pool))
    return routes
