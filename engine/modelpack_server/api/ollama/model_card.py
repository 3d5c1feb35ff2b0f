"""The details of a stored model for /api/tags and /api/show, which take file reads."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from modelpack.artifacts.digest import Digest
from modelpack.artifacts.model import Model, Role
from modelpack.errors import ModelpackError, WeightFormatError
from modelpack.formats.gguf import GGUFHeader, MetadataArray, read_gguf_header
from modelpack.formats.tensors import TensorInfo
from modelpack.operations.lookup import stored_model
from modelpack.store.layout import LayoutStore
from modelpack_engine.errors import ModelLoadError
from modelpack_server.api.ollama.ndjson import timestamp
from modelpack_server.conversation.infill import may_infill
from modelpack_server.pool.catalogue import StoredModel
from modelpack_server.pool.model_defaults import ModelDefaults
from modelpack_server.pool.pool import ModelPool
from modelpack_server.tool_parsers.formats import find_format

# Arrays of metadata that are shown without being asked for.
_SHORT_ARRAY = 16
_MAX_LICENSE = 1 << 20
_HIDDEN = "tokenizer.chat_template"
# What config.json of a model calls what GGUF's metadata have under the name of the architecture.
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
    """Return what both routes tell of a model."""
    return {
        "parent_model": parent,
        "format": model.format,
        "family": model.architecture,
        "families": [model.architecture] if model.architecture else None,
        "parameter_size": model.parameters,
        "quantization_level": model.quantization,
    }


def digest_of(model: StoredModel) -> str:
    """Return the id of a model as Ollama writes it: without the name of the algorithm."""
    return model.key.partition(":")[2] or model.key


def modified_at(store: LayoutStore, model: StoredModel) -> str:
    """Return when a model came into the store, as RFC 3339."""
    try:
        seconds = store.blob_path(Digest.parse(model.key)).stat().st_mtime
    except (ModelpackError, OSError):  # it is gone, or its catalogue is no store
        seconds = model.created
    return timestamp(datetime.fromtimestamp(seconds, UTC))


@dataclass(frozen=True, slots=True)
class _Facts:
    """What a model's files tell."""

    info: dict[str, Any]
    template: str = ""
    capabilities: tuple[str, ...] = ()
    tensors: tuple[TensorInfo, ...] = ()


def describe(store: LayoutStore, found: StoredModel, *, verbose: bool) -> dict[str, Any]:
    """Return all that /api/show tells; of files that the engine cannot load, what is known."""
    model = stored_model(store, found.key)
    try:
        facts = _facts(store, model, found, verbose)
    except (ModelLoadError, WeightFormatError):
        facts = _Facts({"general.architecture": found.architecture or "unknown"})
    defaults = ModelDefaults.of_model(model, store)
    licenses = _licenses(store, model)
    answer: dict[str, Any] = {
        "modelfile": _modelfile(found, facts.template, defaults, licenses),
        "parameters": _parameters(defaults.parameters),
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
    """Return the chat template that /api/show gives for a model, "" if it has none."""
    try:
        found = await pool.find(name)
        shown = await asyncio.to_thread(describe, pool.catalogue.store, found, verbose=False)
    except ModelpackError:  # not here yet, or its catalogue is no store
        return ""
    return str(shown["template"])


def _facts(store: LayoutStore, model: Model, found: StoredModel, verbose: bool) -> _Facts:
    from modelpack_server.stored_models import stored_files

    files = stored_files(model, store)
    header = read_gguf_header(files.weights[0]) if files.format == "gguf" else None
    template = _template(files, header)
    return _Facts(
        _gguf_info(header, verbose) if header else _config_info(files, found),
        template,
        tuple(_capabilities(files, template, header)),
        header.tensors if header else (),
    )


def _template(files: Any, header: GGUFHeader | None) -> str:
    """Return the chat template: of a file of its own, or of the weights' metadata."""
    from modelpack.artifacts.model import CHAT_TEMPLATE
    from modelpack_engine.models.json_tokenizer import chat_template_of

    if header is None:
        found = chat_template_of(files)
        return found.source if found else ""
    own: str | None = files.text(CHAT_TEMPLATE)
    if own is not None:
        return own
    entry = header.metadata.get(_HIDDEN)
    return entry.value if entry is not None and isinstance(entry.value, str) else ""


def _gguf_info(header: GGUFHeader, verbose: bool) -> dict[str, Any]:
    info: dict[str, Any] = {}
    for key, entry in header.metadata.items():
        if key == _HIDDEN:
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


def _capabilities(files: Any, template: str, header: GGUFHeader | None) -> list[str]:
    from modelpack_engine.embedding.loader import purpose_of

    purpose = purpose_of(files)
    if purpose != "generation":
        return [purpose]
    written = find_format(template)
    found = ["completion"]
    if written.family is not None:
        found.append("tools")
    if written.reasoning is not None:
        found.append("thinking")
    if may_infill(_vocabulary(files, header)):
        found.append("insert")
    return found


def _vocabulary(files: Any, header: GGUFHeader | None) -> bytes:
    """Return the part of a model's files that has the texts of its tokens."""
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


def _parameters(parameters: Mapping[str, Any]) -> str:
    """Return parameters as Ollama lists them: a line each, of several stop strings one each."""
    return "\n".join(f"{name:<30} {value}" for name, value in _parameter_lines(parameters))


def _parameter_lines(parameters: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [
        (name, json.dumps(value, ensure_ascii=False))
        for name, given in sorted(parameters.items())
        for value in (given if isinstance(given, list) else [given])
    ]


def _modelfile(
    found: StoredModel, template: str, defaults: ModelDefaults, licenses: list[str]
) -> str:
    """Return a file from which /api/create would make the model again."""
    lines = [f"FROM {found.names[0] if found.names else found.key}"]
    if template:
        lines.append(f'TEMPLATE """{template}"""')
    if defaults.system:
        lines.append(f'SYSTEM """{defaults.system}"""')
    lines += [f"PARAMETER {name} {value}" for name, value in _parameter_lines(defaults.parameters)]
    lines += [f"MESSAGE {m['role']} {json.dumps(m['content'])}" for m in defaults.messages]
    lines += [f'LICENSE """{text}"""' for text in licenses]
    return "\n".join(lines) + "\n"
