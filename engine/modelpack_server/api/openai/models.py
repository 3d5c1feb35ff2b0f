"""The routes GET /v1/models and /v1/models/{name}: the stored models."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter

from modelpack.errors import NotFoundError
from modelpack.formats.units import format_decimal_size
from modelpack_server.api.paths import add_route
from modelpack_server.pool.catalogue import StoredModel
from modelpack_server.pool.pool import ModelPool


def router(pool: ModelPool) -> APIRouter:
    routes = APIRouter(tags=["OpenAI"])

    async def list_models() -> dict[str, Any]:
        """List the available models."""
        named = list((await pool.aliases()).items())
        named += [(_name(model), model) for model in await pool.stored()]
        cards = [card(model) | {"id": name} | await parent(pool, model) for name, model in named]
        return {"object": "list", "data": list({card["id"]: card for card in cards}.values())}

    async def retrieve_model(name: str) -> dict[str, Any]:
        """Return one model; `name` is any of its names."""
        model = await pool.find(name)
        return card(model) | {"id": name} | await parent(pool, model)

    add_route(routes, "/models", list_models, methods=["GET"])
    add_route(routes, "/models/{name:path}", retrieve_model, methods=["GET"])
    return routes


async def parent(pool: ModelPool, model: StoredModel) -> dict[str, Any]:
    """Return `parent`, the name of an adapter's base, as vLLM; nothing for other models.

    It is None if the current request may not use the base.
    """
    if not model.adapter:
        return {}
    try:
        return {"parent": _name(await pool.find(model.base))}
    except NotFoundError:
        return {"parent": None}


def _name(model: StoredModel) -> str:
    return model.names[0] if model.names else model.key


# As in Ollama's /api/show and in llama-server.
_CAPABILITIES = {"generation": ["completion"], "embedding": ["embedding"], "ranking": ["ranking"]}


def card(model: StoredModel) -> dict[str, Any]:
    """Return the object of a model; `dmr` has the fields that Docker Model Runner adds.

    Its `size` is a string: `docker model list --openai` rejects a number.
    """
    facts = {
        "context_window": model.context_size,
        "architecture": model.architecture,
        "parameters": model.parameters,
        "quantization": model.quantization,
        "size": format_decimal_size(model.size) if model.size else "",
    }
    return {
        "id": _name(model),
        "object": "model",
        "created": model.created,
        "owned_by": "modelpack",
        "root": model.key,
        "capabilities": [
            *_CAPABILITIES.get(model.purpose, ()),
            *(["vision"] if model.reads_pictures else ()),
        ],
        "dmr": {key: value for key, value in facts.items() if value},
    }
