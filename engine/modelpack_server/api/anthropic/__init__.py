"""Anthropic's API: messages, token counts and models."""

from __future__ import annotations

from fastapi import APIRouter

from modelpack_server.api.anthropic.messages import router as messages
from modelpack_server.api.anthropic.models import router as models
from modelpack_server.pool.pool import ModelPool


def router(pool: ModelPool) -> APIRouter:
    """Return the routes. They come before OpenAI's, with which they share /v1/models."""
    routes = APIRouter()
    for part in (messages, models):
        routes.routes.extend(part(pool).routes)
    return routes
