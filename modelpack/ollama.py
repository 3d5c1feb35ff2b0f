"""Models as Ollama's registry has them: single files, and how they are to be used.

The manifest is of Docker's image type 2; weights are GGUF, the template is one of Go's. Source:
ollama/ollama v0.33.0, types/model/config.go, manifest/layer.go, server/images.go.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from typing import Any

from modelpack import mediatypes
from modelpack.descriptor import Descriptor
from modelpack.errors import ManifestError, UnsupportedError
from modelpack.gojson import decode, decode_object, kind_of

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
    if mediatypes.OLLAMA_ADAPTER in types:
        raise UnsupportedError(
            "has an adapter (LoRA) apart from the weights, which is not applied here",
            path=what,
            hint="merge the adapter into the weights first",
        )
    if mediatypes.OLLAMA_TENSOR in types:
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
            case mediatypes.OLLAMA_PARAMS:
                value["parameters"] = decode_object(read(layer), what)
            case mediatypes.OLLAMA_SYSTEM:
                value["system"] = _decoded(read(layer), what)
            case mediatypes.OLLAMA_MESSAGES:
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


def _text(value: dict[str, Any], key: str, what: str) -> str:
    text = value.get(key)
    if text is not None and not isinstance(text, str):
        raise ManifestError(f"{key!r} is {kind_of(text)}, expected a string", path=what)
    return text or ""
