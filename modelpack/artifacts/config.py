"""ModelConfig: one view of the config blobs of Docker v0.1, Docker v0.2 and CNCF ModelPack.

Configs of KitOps and Ollama are read into the same view, but never written. A ModelKit's config is
its Kitfile. An Ollama model keeps its template, parameters and messages in separate layers;
`ollama_defaults` reads these.
Sources: Docker Model Runner pkg/distribution/types; CNCF model-spec schema/config-schema.json;
kitops-ml/kitops v1.7.0, pkg/artifact/kitfile.go and pkg/lib/kitfile/layer.go.
"""

from __future__ import annotations

import json
import posixpath
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final

from modelpack.artifacts import media_types
from modelpack.artifacts.descriptor import Descriptor, parsed_annotations, parsed_digest
from modelpack.artifacts.digest import Digest
from modelpack.artifacts.json_document import (
    checked_time,
    decode,
    decode_object,
    encode,
    kind_of,
    sorted_map,
)
from modelpack.errors import ManifestError, UnsupportedError

#: The largest context size, in tokens: configs have signed 32-bit integers.
MAX_CONTEXT_SIZE: Final = 2**31 - 1
_INT32 = range(-(2**31), 2**31)

#: Raises `ManifestError`, naming the place, unless a decoded JSON value is valid.
_Check = Callable[[Any, str], object]


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """The content of a model's config blob; texts without a value are empty.

    `parameters` and `size` are texts for people ("7.24B", "4.07GiB"), as Docker writes them.
    `context_size` is in tokens. `created` is RFC 3339. `cncf_descriptor` and `cncf_config` are the
    fields that only CNCF has (authors, licenses, capabilities, …), as decoded JSON. `layer_paths`
    are the unchecked paths of layers that the config names instead of the layers' annotations.
    """

    media_type: str
    format: str = ""
    quantization: str = ""
    parameters: str = ""
    architecture: str = ""
    size: str = ""
    gguf: Mapping[str, str] | None = field(default=None, hash=False)
    safetensors: Mapping[str, str] | None = field(default=None, hash=False)
    diffusers: Mapping[str, str] | None = field(default=None, hash=False)
    context_size: int | None = None
    created: str | None = None
    diff_ids: tuple[Digest, ...] = ()
    cncf_descriptor: Mapping[str, Any] = field(default_factory=dict, hash=False)
    cncf_config: Mapping[str, Any] = field(default_factory=dict, hash=False)
    layer_paths: Mapping[Digest, str] = field(default_factory=dict, hash=False)

    @classmethod
    def parse(cls, raw: bytes, media_type: str, what: str = "config") -> ModelConfig:
        """Return the config in `raw`; raise `ManifestError`, naming the invalid field."""
        value = decode_object(raw, what)
        if media_type in (media_types.DOCKER_CONFIG_V01, media_types.DOCKER_CONFIG_V02):
            return _parse_docker(value, media_type, what)
        if media_type == media_types.CNCF_CONFIG:
            return _parse_cncf(value, what)
        if media_type == media_types.CNAI_CONFIG:
            return _parse_cncf(_renamed(value), what).with_changes(media_type=media_type)
        if media_type == media_types.KITOPS_CONFIG:
            return cls(media_type, **_kitfile_fields(value, what))
        if media_type == media_types.DOCKER_IMAGE_CONFIG:
            return cls(media_type, **_ollama_fields(value, what))
        raise UnsupportedError(f"{media_type!r} is not a config type of a model", path=what)

    @property
    def is_cncf(self) -> bool:
        """Whether this is a CNCF config."""
        return self.media_type == media_types.CNCF_CONFIG

    @property
    def is_foreign(self) -> bool:
        """Whether this config is of a format that is never written."""
        return self.media_type in media_types.FOREIGN_CONFIG_TYPES

    @property
    def capabilities(self) -> tuple[str, ...]:
        """The `capability_names` of a CNCF config; none for configs without the field."""
        return capability_names(self.cncf_config.get("capabilities") or {})

    def with_changes(self, **changes: Any) -> ModelConfig:
        """Return a copy with these fields replaced."""
        return replace(self, **changes)

    def encode(self) -> bytes:
        """Return the bytes of the config blob, as Docker Model Runner writes them."""
        return encode(_cncf_json(self) if self.is_cncf else _docker_json(self))


def capability_names(found: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the names that servers use for CNCF's `capabilities` beside text to text.

    `vision`, `audio`, `video`, `tools`, `reasoning`, `reward`, `embedding`, `images` and
    `transcription` (audio to text).
    """
    if found.get("inputTypes") == ["audio"] and "text" in found.get("outputTypes", ()):
        return ("transcription",)
    said = {
        "vision": "image" in found.get("inputTypes", ()),
        "audio": "audio" in found.get("inputTypes", ()),
        "video": "video" in found.get("inputTypes", ()),
        "tools": found.get("toolUsage"),
        "reasoning": found.get("reasoning"),
        "reward": found.get("reward"),
        "embedding": "embedding" in found.get("outputTypes", ()),
        "images": "image" in found.get("outputTypes", ()),
    }
    return tuple(name for name, is_true in said.items() if is_true)


# The fields of Docker's configs, in the order of Go's structs.
_DOCKER_TEXTS: Final = ("format", "quantization", "parameters", "architecture", "size")
_DOCKER_MAPS: Final = ("gguf", "safetensors", "diffusers")


def _docker_json(config: ModelConfig) -> dict[str, Any]:
    inner: dict[str, Any] = {}
    for key in _DOCKER_TEXTS:
        if getattr(config, key):
            inner[key] = getattr(config, key)
    for key in _DOCKER_MAPS:
        if getattr(config, key):
            inner[key] = sorted_map(dict(getattr(config, key)))
    if config.context_size is not None:
        inner["context_size"] = config.context_size
    return {
        "config": inner,
        "descriptor": {"created": config.created} if config.created else {},
        "rootfs": {"type": "rootfs", "diff_ids": [str(digest) for digest in config.diff_ids]},
    }


def _cncf_json(config: ModelConfig) -> dict[str, Any]:
    descriptor = dict(config.cncf_descriptor)
    if config.created:
        descriptor["createdAt"] = config.created
    inner = dict(config.cncf_config)
    for key, text in (
        ("architecture", config.architecture),
        ("format", config.format),
        ("paramSize", config.parameters),
        ("quantization", config.quantization),
    ):
        if text:
            inner[key] = text
    return {
        "descriptor": _ordered(descriptor, _CNCF_DESCRIPTOR),
        "modelfs": {"type": "layers", "diffIds": [str(digest) for digest in config.diff_ids]},
        "config": _ordered(inner, _CNCF_MODEL),
    }


def _ordered(value: dict[str, Any], order: Mapping[str, Any]) -> dict[str, Any]:
    known = {key: value[key] for key in order if key in value}
    return known | {key: value[key] for key in sorted(value) if key not in known}


def _parse_docker(value: dict[str, Any], media_type: str, what: str) -> ModelConfig:
    inner = _object(value, "config", what)
    descriptor = _object(value, "descriptor", what, required=False)
    rootfs = _object(value, "rootfs", what)
    _expect_type(rootfs, "rootfs", f"{what}: rootfs")
    created = descriptor.get("created")
    texts: dict[str, Any] = {key: _text(inner, key, f"{what}: config") for key in _DOCKER_TEXTS}
    maps: dict[str, Any] = {key: _strings(inner, key, what) for key in _DOCKER_MAPS}
    return ModelConfig(
        media_type,
        **texts,
        **maps,
        context_size=_int32(inner, "context_size", f"{what}: config"),
        created=None if created is None else checked_time(created, f"{what}: descriptor.created"),
        diff_ids=_digests(rootfs, "diff_ids", f"{what}: rootfs"),
    )


def _parse_cncf(value: dict[str, Any], what: str) -> ModelConfig:
    descriptor = _object(value, "descriptor", what)
    inner = _object(value, "config", what)
    modelfs = _object(value, "modelfs", what)
    _check_closed(value, _CNCF_TOP, what)
    _check_closed(descriptor, _CNCF_DESCRIPTOR, f"{what}: descriptor")
    _check_closed(inner, _CNCF_MODEL, f"{what}: config")
    _check_closed(modelfs, _CNCF_MODELFS, f"{what}: modelfs")
    _expect_type(modelfs, "layers", f"{what}: modelfs")
    diff_ids = _digests(modelfs, "diffIds", f"{what}: modelfs")
    if not diff_ids:
        raise ManifestError("'diffIds' is empty", path=f"{what}: modelfs")
    own = {"architecture", "format", "paramSize", "quantization"}
    return ModelConfig(
        media_types.CNCF_CONFIG,
        format=_text(inner, "format", f"{what}: config"),
        quantization=_text(inner, "quantization", f"{what}: config"),
        parameters=_text(inner, "paramSize", f"{what}: config"),
        architecture=_text(inner, "architecture", f"{what}: config"),
        created=descriptor.get("createdAt"),
        diff_ids=diff_ids,
        cncf_descriptor={key: item for key, item in descriptor.items() if key != "createdAt"},
        cncf_config={key: item for key, item in inner.items() if key not in own},
    )


def _renamed(value: Any) -> Any:
    """Return a CNAI config with CNCF's names of fields."""
    if not isinstance(value, dict):
        return value
    return {_CNAI_NAMES.get(key, key): _renamed(item) for key, item in value.items()}


def _object(value: dict[str, Any], key: str, what: str, *, required: bool = True) -> dict[str, Any]:
    found = value.get(key)
    if found is None and not required:
        return {}
    if key not in value:
        raise ManifestError(f"has no {key!r}", path=what)
    if not isinstance(found, dict):
        raise ManifestError(f"{key!r} is {kind_of(found)}, expected an object", path=what)
    return found


def _text(value: dict[str, Any], key: str, where: str) -> str:
    text = value.get(key)
    if text is None:  # Go's decoder treats null as absent
        return ""
    if not isinstance(text, str):
        raise ManifestError(f"{key!r} is {kind_of(text)}, expected a string", path=where)
    return text


def _strings(value: dict[str, Any], key: str, what: str) -> Mapping[str, str] | None:
    if value.get(key) is None:
        return None
    return parsed_annotations(value[key], f"{what}: config.{key}")


def _int32(value: dict[str, Any], key: str, where: str) -> int | None:
    number = value.get(key)
    if number is None:
        return None
    if type(number) is not int:
        raise ManifestError(f"{key!r} is {kind_of(number)}, expected a whole number", path=where)
    if number not in _INT32:
        raise ManifestError(f"{key!r} is {number}, which does not fit 32 bits", path=where)
    return number


def _digests(value: dict[str, Any], key: str, where: str) -> tuple[Digest, ...]:
    found = value.get(key)
    if not isinstance(found, list):
        raise ManifestError(f"{key!r} is {kind_of(found)}, expected an array", path=where)
    return tuple(parsed_digest(item, f"{where}.{key}[{i}]") for i, item in enumerate(found))


def _expect_type(value: dict[str, Any], expected: str, where: str) -> None:
    if value.get("type") != expected:
        raise ManifestError(f"type is {value.get('type')!r}, expected {expected!r}", path=where)


# The CNCF schema is closed (additionalProperties: false) and does not allow null.


def _check_closed(value: Any, fields: Mapping[str, _Check], where: str) -> None:
    if not isinstance(value, dict):
        raise ManifestError(f"is {kind_of(value)}, expected an object", path=where)
    for key, item in value.items():
        if key not in fields:
            raise ManifestError(f"has the unknown field {key!r}", path=where)
        fields[key](item, f"{where}.{key}")


def _string(value: Any, where: str) -> None:
    if not isinstance(value, str):
        raise ManifestError(f"is {kind_of(value)}, expected a string", path=where)


def _name(value: Any, where: str) -> None:
    _string(value, where)
    if not value:
        raise ManifestError("is empty", path=where)


def _boolean(value: Any, where: str) -> None:
    if not isinstance(value, bool):
        raise ManifestError(f"is {kind_of(value)}, expected true or false", path=where)


def _modality(value: Any, where: str) -> None:
    if value not in ("text", "image", "audio", "video", "embedding", "other"):
        raise ManifestError(f"{value!r} is not a modality", path=where)


def _language(value: Any, where: str) -> None:
    _string(value, where)
    if not re.match(r"[a-z]{2}\Z", value):
        raise ManifestError(f"{value!r} is not a two-letter language code", path=where)


def _array_of(check: _Check) -> _Check:
    def check_array(value: Any, where: str) -> None:
        if not isinstance(value, list):
            raise ManifestError(f"is {kind_of(value)}, expected an array", path=where)
        for i, item in enumerate(value):
            check(item, f"{where}[{i}]")

    return check_array


def _any(value: Any, where: str) -> None:
    """Accept any value: the caller checks it."""


_CNAI_NAMES: Mapping[str, str] = {
    "diff_ids": "diffIds",
    "input_types": "inputTypes",
    "output_types": "outputTypes",
    "knowledge_cutoff": "knowledgeCutoff",
    "tool_usage": "toolUsage",
}
# In the order of Go's structs, which is the order that `encode` writes.
_CNCF_TOP: Mapping[str, _Check] = {"descriptor": _any, "modelfs": _any, "config": _any}
_CNCF_MODELFS: Mapping[str, _Check] = {"type": _any, "diffIds": _any}
_CNCF_DESCRIPTOR: Mapping[str, _Check] = {
    "createdAt": checked_time,
    "authors": _array_of(_string),
    "family": _string,
    "name": _name,
    "docURL": _string,
    "sourceURL": _string,
    "datasetsURL": _array_of(_string),
    "version": _string,
    "revision": _string,
    "vendor": _string,
    "licenses": _array_of(_string),
    "title": _string,
    "description": _string,
}
_CNCF_CAPABILITIES: Mapping[str, _Check] = {
    "inputTypes": _array_of(_modality),
    "outputTypes": _array_of(_modality),
    "knowledgeCutoff": checked_time,
    "reasoning": _boolean,
    "toolUsage": _boolean,
    "reward": _boolean,
    "languages": _array_of(_language),
}
_CNCF_MODEL: Mapping[str, _Check] = {
    "architecture": _string,
    "format": _string,
    "paramSize": _string,
    "precision": _string,
    "quantization": _string,
    "capabilities": lambda value, where: _check_closed(value, _CNCF_CAPABILITIES, where),
}


_LISTS: Final = ("code", "datasets", "docs")
_FORMATS: Final = ("gguf", "safetensors", "dduf")


def _kitfile_fields(value: dict[str, Any], what: str) -> dict[str, Any]:
    """Return the fields of a `ModelConfig` from a decoded Kitfile; ignore unknown fields."""
    package = _object(value, "package", what, required=False)
    model = _object(value, "model", what, required=False)
    entries = list(_entries(value, model, what))
    paths, diff_ids = {}, []
    for entry, where in entries:
        digest, diff_id = (_digest(entry, key, where) for key in ("digest", "diffId"))
        # As KitOps normalises it; the user of the path checks that it is safe.
        path = posixpath.normpath(_text(entry, "path", where) or ".")
        if digest is not None and path != ".":
            paths[digest] = path
        if diff_id is not None:
            diff_ids.append(diff_id)
    said: dict[str, Any] = {
        key: _text(package, key, what) or _text(model, key, what)
        for key in ("name", "version", "description", "license")
    }
    licence = said.pop("license")
    said |= {"authors": _texts(package, "authors", what), "licenses": [licence] if licence else []}
    return {
        "format": _weight_format(model, what),
        "diff_ids": tuple(diff_ids) if len(diff_ids) == len(entries) else (),
        "cncf_descriptor": {key: text for key, text in said.items() if text},
        "layer_paths": paths,
    }


def _entries(
    value: dict[str, Any], model: dict[str, Any], what: str
) -> Iterator[tuple[dict[str, Any], str]]:
    """Yield each entry that has a layer, with its place for errors, in the order of the layers."""
    if model.get("digest"):  # otherwise its path names another ModelKit, or there is no model
        yield model, f"{what}: model"
    for i, part in enumerate(_list(model, "parts", what)):
        yield _checked_object(part, f"{what}: model.parts[{i}]"), f"{what}: model.parts[{i}]"
    for key in _LISTS:
        for i, entry in enumerate(_list(value, key, what)):
            yield _checked_object(entry, f"{what}: {key}[{i}]"), f"{what}: {key}[{i}]"


def _weight_format(model: dict[str, Any], what: str) -> str:
    """Return the format of the weights from the path's extension or the Kitfile's fields, or ""."""
    extension = _text(model, "path", what).lower().rpartition(".")[2]
    said = (extension, *(_text(model, key, what).lower() for key in ("format", "framework")))
    return next((text for text in said if text in _FORMATS), "")


def _digest(entry: dict[str, Any], key: str, where: str) -> Digest | None:
    return parsed_digest(entry[key], f"{where}.{key}") if entry.get(key) else None


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


def _ollama_fields(value: dict[str, Any], what: str) -> dict[str, Any]:
    """Return the fields of a `ModelConfig` from a decoded config of Ollama.

    Raises `UnsupportedError` for a remote model.
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
        "context_size": context if context and 0 < context <= MAX_CONTEXT_SIZE else None,
    }


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
                try:
                    value["system"] = read(layer).decode()
                except UnicodeDecodeError as error:
                    message = f"is not UTF-8 at byte {error.start}"
                    raise ManifestError(message, path=what) from None
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
