"""The routes GET /anthropic/v1/models, and /v1/models for clients that send `anthropic-version`."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Annotated, Any

from fastapi import APIRouter, Query
from fastapi.routing import APIRoute
from starlette.routing import Match
from starlette.types import Scope

from modelpack_engine.errors import RequestError
from modelpack_server.pool.catalogue import StoredModel
from modelpack_server.pool.pool import ModelPool

_HEADER = b"anthropic-version"


class _AnthropicRoute(APIRoute):
    """A route that matches only requests with `anthropic-version`; OpenAI's API shares its path."""

    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        if not any(name == _HEADER for name, _ in scope.get("headers", ())):
            return Match.NONE, {}
        return super().matches(scope)


def router(pool: ModelPool) -> APIRouter:
    """Return the routes; add them before OpenAI's."""
    routes = APIRouter(tags=["Anthropic"])

    async def list_anthropic_models(
        limit: Annotated[int, Query(ge=1, le=1000)] = 20,
        after_id: str | None = None,
        before_id: str | None = None,
    ) -> dict[str, Any]:
        """List the available models, one page per request."""
        return page(
            [card(pool, model) for model in await pool.stored()], limit, after_id, before_id
        )

    async def retrieve_anthropic_model(name: str) -> dict[str, Any]:
        """Return one model; `name` is any of its names."""
        return card(pool, await pool.find(name)) | {"id": name}

    for prefix in ("/anthropic/v1", "/v1"):
        own = prefix == "/anthropic/v1"
        kind = APIRoute if own else _AnthropicRoute
        for tail, endpoint in (
            ("/models", list_anthropic_models),
            ("/models/{name:path}", retrieve_anthropic_model),
        ):
            routes.add_api_route(
                prefix + tail, endpoint, methods=["GET"], response_model=None,
                include_in_schema=own, route_class_override=kind,
            )  # fmt: skip
    return routes


def page(
    cards: list[dict[str, Any]], limit: int, after_id: str | None, before_id: str | None
) -> dict[str, Any]:
    """Return a page of models. Raises `RequestError` for an unknown id."""
    ids = [card["id"] for card in cards]
    for name, value in (("after_id", after_id), ("before_id", before_id)):
        if value is not None and value not in ids:
            raise RequestError(f"no such model: {value!r} ({name})", param=name)
    start = ids.index(after_id) + 1 if after_id is not None else 0
    stop = ids.index(before_id) if before_id is not None else len(ids)
    rest = cards[start:stop]
    backwards = before_id is not None and after_id is None
    shown = rest[-limit:] if backwards else rest[:limit]
    return {
        "data": shown,
        "has_more": len(shown) < len(rest),
        "first_id": shown[0]["id"] if shown else None,
        "last_id": shown[-1]["id"] if shown else None,
    }


def card(pool: ModelPool, model: StoredModel) -> dict[str, Any]:
    """Return the API's object for a model."""
    name = model.names[0] if model.names else model.key
    created = datetime.fromtimestamp(model.created, UTC)
    limit = pool.context_size(model)
    return {
        "type": "model",
        "id": name,
        "display_name": name,
        "created_at": created.isoformat().replace("+00:00", "Z"),
        "lifecycle": "active",
        **({} if limit is None else {"max_input_tokens": limit, "max_tokens": limit}),
    }
