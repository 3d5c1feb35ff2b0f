"""The routes of /v1/models, the stored models, and those that load and unload LoRA adapters.

Source of the latter: vLLM (entrypoints/serve/lora), whose fields, texts and statuses these are.
"""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter
from fastapi.responses import PlainTextResponse
from pydantic import Field, StrictBool, StrictStr

from modelpack.errors import FormatError, NotFoundError, PackagingError
from modelpack.formats.units import format_decimal_size
from modelpack_engine.errors import RequestError
from modelpack_server.api.bodies import Body, BodyRoute
from modelpack_server.api.paths import add_route
from modelpack_server.pool.catalogue import StoredModel
from modelpack_server.pool.pool import ModelPool


class LoadAdapterRequest(Body):
    """The body of POST /v1/load_lora_adapter: a name, and a reference or a directory."""

    lora_name: Annotated[StrictStr, Field(min_length=1)]
    lora_path: Annotated[StrictStr, Field(min_length=1)]
    load_inplace: StrictBool = False


class UnloadAdapterRequest(Body):
    """The body of POST /v1/unload_lora_adapter."""

    lora_name: Annotated[StrictStr, Field(min_length=1)]


def router(pool: ModelPool) -> APIRouter:
    """Return the routes; those that change adapters only if the pool allows it."""
    routes = APIRouter(tags=["OpenAI"], route_class=BodyRoute)

    async def list_models() -> dict[str, Any]:
        """List the available models."""
        named = list((await pool.aliases()).items())
        named += [(_name(model), model) for model in await pool.stored()]
        cards = [await card(pool, model) | {"id": name} for name, model in named]
        return {"object": "list", "data": list({card["id"]: card for card in cards}.values())}

    async def retrieve_model(name: str) -> dict[str, Any]:
        """Return one model; `name` is any of its names."""
        model = await pool.find(name)
        return await card(pool, model) | {"id": name}

    add_route(routes, "/models", list_models, methods=["GET"])
    add_route(routes, "/models/{name:path}", retrieve_model, methods=["GET"])
    if pool.adapter_loading is not None:
        _add_adapter_routes(routes, pool)
    return routes


def _add_adapter_routes(routes: APIRouter, pool: ModelPool) -> None:
    @routes.post("/v1/load_lora_adapter", response_class=PlainTextResponse)
    async def load_adapter(body: LoadAdapterRequest) -> str:
        """Load a LoRA adapter, which requests may then name as their model."""
        if body.load_inplace:
            raise RequestError("load_inplace is not supported", param="load_inplace")
        try:
            await pool.load_adapter(body.lora_name, body.lora_path)
        except (FormatError, PackagingError) as error:
            raise RequestError(str(error), param="lora_path", hint=error.hint) from error
        return f"Success: LoRA adapter '{body.lora_name}' added successfully."

    @routes.post("/v1/unload_lora_adapter", response_class=PlainTextResponse)
    async def unload_adapter(body: UnloadAdapterRequest) -> str:
        """Unload a LoRA adapter; requests that use it go on."""
        await pool.unload_adapter(body.lora_name)
        return f"Success: LoRA adapter '{body.lora_name}' removed successfully."


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
_CAPABILITIES = {
    "generation": ["completion"],
    "embedding": ["embedding"],
    "ranking": ["ranking"],
    "transcription": ["transcription"],
}


async def card(pool: ModelPool, model: StoredModel) -> dict[str, Any]:
    """Return the object of a model; `dmr` has the fields that Docker Model Runner adds.

    Its `size` is a string: `docker model list --openai` rejects a number.
    """
    facts = {
        "context_window": pool.context_size(model),
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
            *(["audio"] if model.reads_sounds else ()),
            *(["video"] if model.reads_videos else ()),
            *model.templated,
        ],
        "dmr": {key: value for key, value in facts.items() if value},
        **await parent(pool, model),
    }
