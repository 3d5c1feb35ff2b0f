"""KitOps ModelKits: what a Kitfile says, which is a ModelKit's config.

Layers are tar archives of paths below the directory that was packed, so that they unpack side by
side. Source: kitops-ml/kitops v1.7.0, pkg/artifact/kitfile.go and pkg/lib/kitfile/layer.go.
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
    """Return the fields of a `ModelConfig` that a decoded Kitfile fills.

    Raises `ManifestError`, naming the place, for fields of other kinds than KitOps writes. What
    KitOps adds in later versions is ignored.
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
    """Yield what has a layer, in the order of the layers."""
    if model.get("digest"):  # without: its path names another ModelKit, or there is none
        yield model, f"{what}: model"
    for i, part in enumerate(_list(model, "parts", what)):
        yield _checked_object(part, f"{what}: model.parts[{i}]"), f"{what}: model.parts[{i}]"
    for key in _LISTS:
        for i, entry in enumerate(_list(value, key, what)):
            yield _checked_object(entry, f"{what}: {key}[{i}]"), f"{what}: {key}[{i}]"


def _format(model: dict[str, Any], what: str) -> str:
    """Return the format of the weights: what the path says, else what somebody wrote."""
    extension = _text(model, "path", what).lower().rpartition(".")[2]
    said = (extension, *(_text(model, key, what).lower() for key in ("format", "framework")))
    return next((text for text in said if text in _FORMATS), "")


def _path(entry: dict[str, Any], where: str) -> str:
    """Return the path as KitOps cleans it; whether it is safe is seen where it is used."""
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


def parse_config(value: dict[str, Any], what: str) -> dict[str, Any]:
    """Return the fields of a `ModelConfig` that a decoded config of Ollama's fills.

    Raises `ManifestError` for a field of another kind, and `UnsupportedError` for a model that
    runs at somebody else's.
    """
    host = _text(value, "remote_host", what)
    if host or _text(value, "remote_model", what):
        raise UnsupportedError(
            f"the model is not in it: Ollama has it run by {host or 'another host'}",
            path=what,
            hint="take a model that runs here",
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
    """Raise `UnsupportedError` for layers that would be left out of what they belong to."""
    types = {layer.media_type for layer in layers}
    if media_types.OLLAMA_ADAPTER in types:
        raise UnsupportedError(
            "has an adapter (LoRA) apart from the weights, which is not applied here",
            path=what,
            hint="merge the adapter into the weights first",
        )
    if media_types.OLLAMA_TENSOR in types:
        raise UnsupportedError(
            "has each tensor in a layer of its own, as Ollama's own engine reads them",
            path=what,
            hint="take a model of GGUF or safetensors files",
        )


def defaults(layers: Iterable[Descriptor], read: Callable[[Descriptor], bytes]) -> str:
    """Return how the model is to be used: the value of the annotation `mediatypes.DEFAULTS`.

    Empty if it does not say. Raises `ManifestError` for layers that are not what their types say.
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
