"""Docker Model Runner's own API: /models and /engines, as `docker model` uses them."""

from __future__ import annotations

import re

from fastapi import APIRouter

from modelpack_server.api.model_runner import engines, models
from modelpack_server.api.model_runner.answers import text_response as text_response
from modelpack_server.api.model_runner.records import Recording as Recording
from modelpack_server.api.model_runner.records import Records as Records
from modelpack_server.api.model_runner.records import router as record_routes
from modelpack_server.pool.pool import ModelPool

_OURS = re.compile(
    r"/models(?:/.*)?|/engines/(?:status|ps|df|unload|requests|(?:un)?install-backend"
    r"|(?:[^/]+/)?_configure)"
)


def is_ours(path: str) -> bool:
    """Return whether a path belongs to this API, whose errors are plain text."""
    return _OURS.fullmatch(path) is not None


def router(pool: ModelPool, records: Records) -> APIRouter:
    """Return the routes; /engines/requests shows `records`."""
    routes = APIRouter()
    for part in (models.router(pool), engines.router(pool), record_routes(pool, records)):
        routes.routes.extend(part.routes)
    return routes
