"""ModelConfig: one view of the config blobs of Docker v0.1, Docker v0.2 and CNCF ModelPack.

Sources: Docker Model Runner pkg/distribution/types; CNCF model-spec schema/config-schema.json.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from modelpack import mediatypes
from modelpack.descriptor import parsed_annotations, parsed_digest
from modelpack.digest import Digest
from modelpack.errors import ManifestError, UnsupportedError
from modelpack.gojson import decode_object, encode, kind_of, sorted_map

_INT32 = range(-(2**31), 2**31)

# Field orders of Go's structs; what is not listed comes last, as it came.
_CNCF_DESCRIPTOR_ORDER = (
    "createdAt", "authors", "family", "name", "docURL", "sourceURL", "datasetsURL", "version",
    "revision", "vendor", "licenses", "title", "description",
)  # fmt: skip
_CNCF_CONFIG_ORDER = (
    "architecture", "format", "paramSize", "precision", "quantization", "capabilities",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """What a config blob says about a model; texts are empty where it says nothing.

    `parameters` and `size` are texts for people ("7.24B", "4.07GiB"), as Docker writes them.
    `context_size` is in tokens. `created` is RFC 3339. `cncf_descriptor` and `cncf_config` hold
    what only CNCF knows (authors, licenses, capabilities, …), as decoded JSON.
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

    @classmethod
    def parse(cls, raw: bytes, media_type: str, what: str = "config") -> ModelConfig:
        """Return the config in `raw`; raise `ManifestError`, naming the field, otherwise."""
        value = decode_object(raw, what)
        if media_type in (mediatypes.DOCKER_CONFIG_V01, mediatypes.DOCKER_CONFIG_V02):
            return _parse_docker(value, media_type, what)
        if media_type == mediatypes.CNCF_CONFIG:
            return _parse_cncf(value, what)
        raise UnsupportedError(f"config type {media_type!r} is not one of a model", path=what)

    @property
    def is_cncf(self) -> bool:
        """Whether this is (to be) a CNCF config."""
        return self.media_type == mediatypes.CNCF_CONFIG

    def with_changes(self, **changes: Any) -> ModelConfig:
        """Return a copy with these fields replaced."""
        return replace(self, **changes)

    def encode(self) -> bytes:
        """Return the bytes of the config blob, as Docker Model Runner writes them."""
        return encode(_cncf_json(self) if self.is_cncf else _docker_json(self))


def _docker_json(config: ModelConfig) -> dict[str, Any]:
    inner: dict[str, Any] = {}
    for key in ("format", "quantization", "parameters", "architecture", "size"):
        if getattr(config, key):
            inner[key] = getattr(config, key)
    for key in ("gguf", "safetensors", "diffusers"):
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
    if config.architecture and "family" not in descriptor:
        descriptor["family"] = config.architecture
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
        "descriptor": _ordered(descriptor, _CNCF_DESCRIPTOR_ORDER),
        "modelfs": {"type": "layers", "diffIds": [str(digest) for digest in config.diff_ids]},
        "config": _ordered(inner, _CNCF_CONFIG_ORDER),
    }


def _ordered(value: dict[str, Any], order: tuple[str, ...]) -> dict[str, Any]:
    known = {key: value[key] for key in order if key in value}
    return known | {key: value[key] for key in sorted(value) if key not in known}


def _parse_docker(value: dict[str, Any], media_type: str, what: str) -> ModelConfig:
    inner = _object(value, "config", what)
    descriptor = _object(value, "descriptor", what, required=False)
    rootfs = _object(value, "rootfs", what)
    return ModelConfig(
        media_type,
        format=_text(inner, "format", f"{what}: config"),
        quantization=_text(inner, "quantization", f"{what}: config"),
        parameters=_text(inner, "parameters", f"{what}: config"),
        architecture=_text(inner, "architecture", f"{what}: config"),
        size=_text(inner, "size", f"{what}: config"),
        gguf=_strings(inner, "gguf", what),
        safetensors=_strings(inner, "safetensors", what),
        diffusers=_strings(inner, "diffusers", what),
        context_size=_int32(inner, "context_size", f"{what}: config"),
        created=_text(descriptor, "created", f"{what}: descriptor") or None,
        diff_ids=_digests(rootfs, "diff_ids", f"{what}: rootfs"),
    )


def _parse_cncf(value: dict[str, Any], what: str) -> ModelConfig:
    descriptor = _object(value, "descriptor", what)
    inner = _object(value, "config", what)
    modelfs = _object(value, "modelfs", what)
    if modelfs.get("type") != "layers":
        raise ManifestError(
            f"type is {modelfs.get('type')!r}, expected 'layers'", path=f"{what}: modelfs"
        )
    own = {"architecture", "format", "paramSize", "quantization"}
    return ModelConfig(
        mediatypes.CNCF_CONFIG,
        format=_text(inner, "format", f"{what}: config"),
        quantization=_text(inner, "quantization", f"{what}: config"),
        parameters=_text(inner, "paramSize", f"{what}: config"),
        architecture=_text(inner, "architecture", f"{what}: config"),
        created=_text(descriptor, "createdAt", f"{what}: descriptor") or None,
        diff_ids=_digests(modelfs, "diffIds", f"{what}: modelfs"),
        cncf_descriptor={key: item for key, item in descriptor.items() if key != "createdAt"},
        cncf_config={key: item for key, item in inner.items() if key not in own},
    )


def _object(value: dict[str, Any], key: str, what: str, *, required: bool = True) -> dict[str, Any]:
    if key not in value:
        if required:
            raise ManifestError(f"has no {key!r}", path=what)
        return {}
    found = value[key]
    if not isinstance(found, dict):
        raise ManifestError(f"{key!r} is {kind_of(found)}, expected an object", path=what)
    return found


def _text(value: dict[str, Any], key: str, where: str) -> str:
    text = value.get(key, "")
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
