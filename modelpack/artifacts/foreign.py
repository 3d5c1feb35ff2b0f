"""Read the configs of KitOps and Ollama: their fields as those of a `ModelConfig`.

A ModelKit's config is its Kitfile. Its layers are tar archives of paths below the packed directory.
Source: kitops-ml/kitops v1.7.0, pkg/artifact/kitfile.go and pkg/lib/kitfile/layer.go.

An Ollama model keeps its template, parameters and messages in layers of their own.
"""

from __future__ import annotations

import json
import posixpath
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Final

from modelpack.artifacts import media_types
from modelpack.artifacts.descriptor import Descriptor, parsed_digest
from modelpack.artifacts.digest import Digest
from modelpack.artifacts.json_document import decode, decode_object, kind_of
from modelpack.errors import ManifestError, UnsupportedError

_LISTS: Final = ("code", "datasets", "docs")
_FORMATS: Final = ("gguf", "safetensors", "dduf")


def parse_kitfile(value: dict[str, Any], what: str) -> dict[str, Any]:
    """Return the fields of a `ModelConfig` from a decoded Kitfile.

    Raises `ManifestError`, naming the place, for fields of a wrong type. Unknown fields are
    ignored.
    """
    package = _object(value, "package", what)
    model = _object(value, "model", what)
    entries = list(_entries(value, model, what))
    paths, diff_ids = {}, []
    for entry, where in entries:
        digest, diff_id = (_digest(entry, key, where) for key in ("digest", "diffId"))
        path = _path(entry, where)
        if digest is not None and path != ".":
            paths[digest] = path
        if diff_id is not None:
            diff_ids.append(diff_id)
    description = _text(package, "description", what) or _text(model, "description", what)
    licence = _text(package, "license", what) or _text(model, "license", what)
    said = {
        "name": _text(package, "name", what) or _text(model, "name", what),
        "version": _text(package, "version", what) or _text(model, "version", what),
        "description": description,
        "authors": _texts(package, "authors", what),
        "licenses": [licence] if licence else [],
    }
    return {
        "format": _format(model, what),
        "diff_ids": tuple(diff_ids) if len(diff_ids) == len(entries) else (),
        "cncf_descriptor": {key: text for key, text in said.items() if text},
        "layer_paths": paths,
    }


def _entries(
    value: dict[str, Any], model: dict[str, Any], what: str
) -> Iterator[tuple[dict[str, Any], str]]:
    """Yield the entries that have a layer, in the order of the layers."""
    if model.get("digest"):  # otherwise its path names another ModelKit, or there is no model
        yield model, f"{what}: model"
    for i, part in enumerate(_list(model, "parts", what)):
        yield _checked_object(part, f"{what}: model.parts[{i}]"), f"{what}: model.parts[{i}]"
    for key in _LISTS:
        for i, entry in enumerate(_list(value, key, what)):
            yield _checked_object(entry, f"{what}: {key}[{i}]"), f"{what}: {key}[{i}]"


def _format(model: dict[str, Any], what: str) -> str:
    """Return the format of the weights by the path's extension, else by the Kitfile's fields."""
    extension = _text(model, "path", what).lower().rpartition(".")[2]
    said = (extension, *(_text(model, key, what).lower() for key in ("format", "framework")))
    return next((text for text in said if text in _FORMATS), "")


def _path(entry: dict[str, Any], where: str) -> str:
    """Return the path as KitOps normalises it; the user of the path checks that it is safe."""
    return posixpath.normpath(_text(entry, "path", where) or ".")


def _digest(entry: dict[str, Any], key: str, where: str) -> Digest | None:
    return parsed_digest(entry[key], f"{where}.{key}") if entry.get(key) else None


def _object(value: dict[str, Any], key: str, what: str) -> dict[str, Any]:
    found = value.get(key)
    return {} if found is None else _checked_object(found, f"{what}: {key}")


def _checked_object(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ManifestError(f"is {kind_of(value)}, expected an object", path=where)
    return value


def _list(value: dict[str, Any], key: str, what: str) -> list[Any]:
    found = value.get(key)
    if found is not None and not isinstance(found, list):
        raise ManifestError(f"{key!r} is {kind_of(found)}, expected an array", path=what)
    return found or []


def _texts(value: dict[str, Any], key: str, what: str) -> list[str]:
    found = _list(value, key, what)
    if not all(isinstance(text, str) for text in found):
        raise ManifestError(f"{key!r} is not an array of strings", path=what)
    return found


def _text(value: dict[str, Any], key: str, what: str) -> str:
    text = value.get(key)
    if text is not None and not isinstance(text, str):
        raise ManifestError(f"{key!r} is {kind_of(text)}, expected a string", path=what)
    return text or ""


_MAX_CONTEXT = 2**31 - 1


def parse_ollama_config(value: dict[str, Any], what: str) -> dict[str, Any]:
    """Return the fields of a `ModelConfig` from a decoded config of Ollama.

    Raises `ManifestError` for a field of a wrong type, and `UnsupportedError` for a remote model.
    """
    host = _text(value, "remote_host", what)
    if host or _text(value, "remote_model", what):
        raise UnsupportedError(
            f"remote model: served by {host or 'another host'}, no weights to pull",
            path=what,
            hint="use a model with weights",
        )
    context = value.get("context_length")
    if context is not None and type(context) is not int:
        kind = kind_of(context)
        raise ManifestError(f"'context_length' is {kind}, expected a whole number", path=what)
    return {
        "format": _text(value, "model_format", what).lower(),
        "architecture": _text(value, "model_family", what),
        "parameters": _text(value, "model_type", what),
        "quantization": _text(value, "file_type", what),
        "context_size": context if context and 0 < context <= _MAX_CONTEXT else None,
    }


def check_usable(layers: Iterable[Descriptor], what: str) -> None:
    """Raise `UnsupportedError` for Ollama layers that Modelpack cannot apply to the weights."""
    types = {layer.media_type for layer in layers}
    if media_types.OLLAMA_ADAPTER in types:
        raise UnsupportedError(
            "has a LoRA adapter in a layer of its own, which is not supported",
            path=what,
            hint="merge the adapter into the weights",
        )
    if media_types.OLLAMA_TENSOR in types:
        raise UnsupportedError(
            "has one layer per tensor, which only Ollama's engine reads",
            path=what,
            hint="use a model with GGUF or safetensors files",
        )


def ollama_defaults(layers: Iterable[Descriptor], read: Callable[[Descriptor], bytes]) -> str:
    """Return the defaults in an Ollama model's layers, for the annotation `media_types.DEFAULTS`.

    The text is empty if there are none. Raises `ManifestError` for layers that do not parse.
    """
    value: dict[str, Any] = {}
    for layer in layers:
        what = f"layer {layer.digest.short} ({layer.media_type})"
        match layer.media_type:
            case media_types.OLLAMA_PARAMS:
                value["parameters"] = decode_object(read(layer), what)
            case media_types.OLLAMA_SYSTEM:
                value["system"] = _decoded(read(layer), what)
            case media_types.OLLAMA_MESSAGES:
                value["messages"] = _messages(read(layer), what)
    value = {key: item for key, item in value.items() if item}
    if not value:
        return ""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), sort_keys=True)


def _messages(raw: bytes, what: str) -> list[dict[str, str]]:
    value = decode(raw, what) or []
    if not isinstance(value, list) or not all(isinstance(message, dict) for message in value):
        raise ManifestError("is not an array of messages", path=what)
    return [
        {"role": _text(message, "role", what), "content": _text(message, "content", what)}
        for message in value
    ]


def _decoded(raw: bytes, what: str) -> str:
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        raise ManifestError(f"is not UTF-8 at byte {error.start}", path=what) from None
