"""The Ollama API: /api/*."""

from __future__ import annotations

from fastapi import APIRouter

from modelpack_engine.pool.pool import ModelPool
from modelpack_engine.server.ollama.blobs import router as blobs
from modelpack_engine.server.ollama.chat import router as chat
from modelpack_engine.server.ollama.create import router as create
from modelpack_engine.server.ollama.embed import router as embed
from modelpack_engine.server.ollama.generate import router as generate
from modelpack_engine.server.ollama.models import router as models
from modelpack_engine.server.ollama.ndjson import ERROR_SCHEMA as ERROR_SCHEMA
from modelpack_engine.server.ollama.ndjson import is_ours as is_ours
from modelpack_engine.server.ollama.ndjson import shape as shape
from modelpack_engine.server.ollama.transfers import router as transfers


def router(pool: ModelPool, *, request_templates: bool = False) -> APIRouter:
    """Return the routes of the Ollama API; `request_templates` lets admins send templates."""
    routes = APIRouter()
    for part in (generate, create):
        routes.include_router(part(pool, request_templates=request_templates))
    for other in (chat, embed, models, transfers, blobs):
        routes.include_router(other(pool))
    return routes
