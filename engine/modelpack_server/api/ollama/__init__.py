"""The Ollama API: /api/*."""

from __future__ import annotations

from fastapi import APIRouter

from modelpack_server.api.ollama.chat import router as chat
from modelpack_server.api.ollama.create import router as create
from modelpack_server.api.ollama.embed import router as embed
from modelpack_server.api.ollama.generate import router as generate
from modelpack_server.api.ollama.jobs import router as transfers
from modelpack_server.api.ollama.models import router as models
from modelpack_server.pool.pool import ModelPool


def router(pool: ModelPool, *, request_templates: bool = False) -> APIRouter:
    """Return the routes of the Ollama API; `request_templates` lets admins send templates."""
    routes = APIRouter()
    for part in (generate, create):
        routes.routes.extend(part(pool, request_templates=request_templates).routes)
    for other in (chat, embed, models, transfers):
        routes.routes.extend(other(pool).routes)
    return routes
