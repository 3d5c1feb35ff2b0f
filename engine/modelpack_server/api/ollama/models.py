"""The routes /api/tags, show, ps, delete, copy and version, and the details of models."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

from fastapi import APIRouter, Response

from modelpack.artifacts.digest import Digest
from modelpack.artifacts.model import Model, Role
from modelpack.artifacts.reference import Reference, is_model_id
from modelpack.errors import ModelpackError, NotFoundError, WeightFormatError
from modelpack.formats.gguf import GGUFHeader, MetadataArray, read_gguf_header
from modelpack.formats.tensors import TensorInfo
from modelpack.operations.lookup import stored_model
from modelpack.store.layout import LayoutStore
from modelpack_engine.errors import ModelLoadError
from modelpack_server.api.ollama.bodies import CopyBody, ModelBody, ShowBody
from modelpack_server.api.ollama.ndjson import JsonRoute, find, missing, shown, timestamp
from modelpack_server.conversation.prompt import may_infill
from modelpack_server.pool.catalogue import StoredModel
from modelpack_server.pool.entry import ModelState, RunningModel
from modelpack_server.pool.model_defaults import (
    TEMPLATE_KEY,
    ModelDefaults,
    as_options,
    sampling_of_files,
    template_of_files,
)
from modelpack_server.pool.pool import ModelPool
from modelpack_server.tool_parsers.families import find_format

# The length up to which arrays in metadata are shown without `verbose`.
_SHORT_ARRAY = 16
_MAX_LICENSE = 1 << 20
# Fields of config.json, by the key that GGUF metadata has below the architecture's name.
_CONFIG_FIELDS = {
    "max_position_embeddings": "context_length",
    "hidden_size": "embedding_length",
    "num_hidden_layers": "block_count",
    "intermediate_size": "feed_forward_length",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
    "vocab_size": "vocab_size",
    "rope_theta": "rope.freq_base",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
}


def details(model: StoredModel, parent: str = "") -> dict[str, Any]:
    """Return the `details` object of a model for /api/tags and /api/show."""
    return {
        "parent_model": parent,
        "format": model.format,
        "family": model.architecture,
        "families": [model.architecture] if model.architecture else None,
        "parameter_size": model.parameters,
        "quantization_level": model.quantization.removeprefix("MOSTLY_"),
    }


def digest_of(model: StoredModel) -> str:
    """Return the digest of a model in Ollama's form, without the algorithm."""
    return model.key.partition(":")[2] or model.key


def modified_at(store: LayoutStore, model: StoredModel) -> str:
    """Return the time at which the store got a model, as RFC 3339."""
    try:
        seconds = store.blob_path(Digest.parse(model.key)).stat().st_mtime
    except (ModelpackError, OSError):  # removed, or not in a store
        seconds = model.created
    return timestamp(datetime.fromtimestamp(seconds, UTC))


@dataclass(frozen=True, slots=True)
class _Facts:
    """Facts about a model that come from its files."""

    info: dict[str, Any]
    template: str = ""
    capabilities: tuple[str, ...] = ()
    tensors: tuple[TensorInfo, ...] = ()
    parameters: Mapping[str, Any] = field(default_factory=dict)


def describe(store: LayoutStore, found: StoredModel, *, verbose: bool) -> dict[str, Any]:
    """Return the response of /api/show, also for files that the engine cannot load."""
    model = stored_model(store, found.key)
    try:
        facts = _facts(store, model, found, verbose)
    except (ModelLoadError, WeightFormatError):
        facts = _Facts({"general.architecture": found.architecture or "unknown"})
    defaults = ModelDefaults.of_model(model, store)
    licenses = _licenses(store, model)
    answer: dict[str, Any] = {
        "modelfile": _modelfile(found, facts.template, defaults, licenses),
        "parameters": "\n".join(
            f"{name:<30} {value}"
            for name, value in _parameter_lines({**facts.parameters, **defaults.parameters})
        ),
        "template": facts.template,
        "details": details(found),
        "model_info": facts.info,
        "capabilities": facts.capabilities,
        "modified_at": modified_at(store, found),
    }
    if licenses:
        answer["license"] = "\n".join(licenses)
    if defaults.system:
        answer["system"] = defaults.system
    if defaults.messages:
        answer["messages"] = list(defaults.messages)
    if verbose:
        answer["tensors"] = [
            {"name": tensor.name, "type": tensor.dtype, "shape": tensor.shape}
            for tensor in facts.tensors
        ]
    return answer


async def shown_template(pool: ModelPool, name: str) -> str:
    """Return the chat template that /api/show returns for a model, or ""."""
    try:
        found = await pool.find(name)
        shown = await asyncio.to_thread(describe, pool.catalogue.store, found, verbose=False)
    except ModelpackError:  # not pulled yet, or not in a store
        return ""
    return str(shown["template"])


def _facts(store: LayoutStore, model: Model, found: StoredModel, verbose: bool) -> _Facts:
    from modelpack_server.stored_models import stored_files

    files = stored_files(model, store)
    header = read_gguf_header(files.weights[0]) if files.format == "gguf" else None
    template = template_of_files(files, header)
    sees = found.reads_pictures
    capabilities = tuple(_capabilities(files, template, header, reads_pictures=sees))
    return _Facts(
        _gguf_info(header, verbose) if header else _config_info(files, found),
        template,
        capabilities,
        header.tensors if header else (),
        as_options(sampling_of_files(files, header)) if "completion" in capabilities else {},
    )


def _gguf_info(header: GGUFHeader, verbose: bool) -> dict[str, Any]:
    info: dict[str, Any] = {}
    for key, entry in header.metadata.items():
        if key == TEMPLATE_KEY:
            continue
        value = entry.value
        if isinstance(value, MetadataArray):
            kept = value.items if verbose or value.length <= _SHORT_ARRAY else None
            info[key] = None if kept is None else list(kept)
        else:
            info[key] = value
    info.setdefault("general.parameter_count", sum(t.elements for t in header.tensors))
    return info


def _config_info(files: Any, found: StoredModel) -> dict[str, Any]:
    config = files.json("config.json") or {}
    text = config.get("text_config")
    config = {**config, **text} if isinstance(text, dict) else config
    architecture = str(config.get("model_type") or found.architecture or "unknown")
    info: dict[str, Any] = {"general.architecture": architecture}
    for name, ours in _CONFIG_FIELDS.items():
        if isinstance(config.get(name), (int, float)):
            info[f"{architecture}.{ours}"] = config[name]
    if found.context_size:
        info.setdefault(f"{architecture}.context_length", found.context_size)
    return info


def _capabilities(
    files: Any, template: str, header: GGUFHeader | None, *, reads_pictures: bool = False
) -> list[str]:
    from modelpack_engine.embedding.loader import purpose_of
    from modelpack_engine.models.loader import may_read_pictures, may_read_sounds

    purpose = purpose_of(files)
    if purpose != "generation":
        return [purpose]
    written = find_format(template)
    found = ["completion"]
    if written.family is not None:
        found.append("tools")
    if written.reasoning is not None:
        found.append("thinking")
    if reads_pictures or may_read_pictures(files):
        found.append("vision")
    if may_read_sounds(files):
        found.append("audio")
    if may_infill(_vocabulary(files, header)):
        found.append("insert")
    return found


def _vocabulary(files: Any, header: GGUFHeader | None) -> bytes:
    """Return the bytes of a model's files that contain its token texts."""
    if header is None:
        return files.read("tokenizer.json") or b""
    with open(files.weights[0], "rb") as file:
        return file.read(header.infos_end)


def _licenses(store: LayoutStore, model: Model) -> list[str]:
    texts = []
    for file in model.files():
        if file.role is Role.LICENSE and file.archive is None:
            raw = store.blob_path(file.descriptor.digest).read_bytes()[:_MAX_LICENSE]
            texts.append(raw.decode(errors="replace"))
    return texts


def _parameter_lines(parameters: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [
        (name, json.dumps(value, ensure_ascii=False))
        for name, given in sorted(parameters.items())
        for value in (given if isinstance(given, list) else [given])
    ]


def _modelfile(
    found: StoredModel, template: str, defaults: ModelDefaults, licenses: list[str]
) -> str:
    """Return a Modelfile that describes the model."""
    lines = [f"FROM {found.names[0] if found.names else found.key}"]
    if template:
        lines.append(f'TEMPLATE """{template}"""')
    if defaults.system:
        lines.append(f'SYSTEM """{defaults.system}"""')
    lines += [f"PARAMETER {name} {value}" for name, value in _parameter_lines(defaults.parameters)]
    lines += [f"MESSAGE {m['role']} {json.dumps(m['content'])}" for m in defaults.messages]
    lines += [f'LICENSE """{text}"""' for text in licenses]
    return "\n".join(lines) + "\n"


#: The version of Ollama with this API: clients enable features by it.
VERSION = "0.20.0"

# The longest Go duration in seconds, which stands for "forever": 2 ** 63 - 1 nanoseconds.
_FOREVER = (2**63 - 1) // 10**9


def router(pool: ModelPool) -> APIRouter:
    routes = APIRouter(tags=["Ollama"], route_class=JsonRoute)

    @routes.get("/api/version")
    @routes.head("/api/version", include_in_schema=False)
    async def version() -> dict[str, str]:
        """Return the version of Ollama with this API."""
        return {"version": VERSION}

    @routes.get("/api/tags")
    @routes.head("/api/tags", include_in_schema=False)
    async def tags() -> dict[str, Any]:
        """List the stored models, with one entry for each name."""
        models, store = await pool.stored(), pool.catalogue.store
        named = [(name, model) for model in models for name in model.names or (model.key,)]
        named += (await pool.aliases()).items()
        named = list(dict(named).items())

        def listed() -> list[dict[str, Any]]:
            found = [
                _named(name, model) | {"modified_at": modified_at(store, model)}
                for name, model in named
            ]
            return sorted(found, key=lambda tag: str(tag["modified_at"]), reverse=True)

        return {"models": await asyncio.to_thread(listed)}

    @routes.post("/api/show")
    async def show(body: ShowBody) -> dict[str, Any]:
        """Return the details of a stored model."""
        found = await find(pool, body.model)
        return await asyncio.to_thread(describe, pool.catalogue.store, found, verbose=body.verbose)

    @routes.get("/api/ps")
    async def ps() -> dict[str, Any]:
        """List the loaded models."""
        loaded = [model for model in pool.running() if model.state is ModelState.READY]
        if not loaded:
            return {"models": []}
        from modelpack_engine.runner.kv_cache_size import on_gpu

        clock, gpu = pool.clock(), on_gpu()
        return {"models": [_running(model, clock, gpu) for model in loaded]}

    @routes.delete("/api/delete", response_model=None)
    async def delete(body: ModelBody) -> Response:
        """Delete a name of a model, and the model with its last name; 404 for an unknown name."""
        found = await find(pool, body.model)
        if len(found.names) <= 1:
            await pool.unload([body.model])
        name = body.model
        if not is_model_id(name.strip()):
            name = str(Reference.parse(name))
        try:
            await asyncio.to_thread(pool.catalogue.store.remove, name)
        except NotFoundError:  # another request removed it first
            raise missing(body.model) from None
        return Response(status_code=200)

    @routes.post("/api/copy", response_model=None)
    async def copy(body: CopyBody) -> Response:
        """Give a model an additional name."""
        found = await find(pool, body.source)
        target = Reference.parse(body.destination)
        await asyncio.to_thread(pool.catalogue.store.tag, found.key, target)
        return Response(status_code=200)

    return routes


def _named(name: str, model: StoredModel) -> dict[str, Any]:
    return {
        "name": shown(name),
        "model": shown(name),
        "size": model.size,
        "digest": digest_of(model),
        "details": details(model),
    }


def _running(model: RunningModel, clock: float, on_gpu: bool) -> dict[str, Any]:
    """Return the object of a loaded model; for one in use, `keep_alive` starts now."""
    now = datetime.now(UTC)
    left = model.keep_alive if model.expires_at is None else model.expires_at - clock
    expires = now + timedelta(seconds=min(left, _FOREVER))
    return _named(model.name, model.stored) | {
        "size": model.memory,
        "size_vram": model.memory if on_gpu else 0,
        "expires_at": timestamp(expires),
        "context_length": model.context_size or 0,
    }
