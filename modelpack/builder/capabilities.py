"""The capabilities of a model: what it takes and returns, as its files say.

CNCF's config has them (model-spec, docs/config.md, "capabilities"). Docker's has no place for them;
`operations.capabilities` derives them from the same files. They are those of the model, whichever
runtime has them: a chat template that takes tools, a vision tower or a projector. What the files do
not say is left out.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol

from modelpack.artifacts import media_types
from modelpack.artifacts.model import Role, format_of, preferred_template, role_of
from modelpack.builder.files import LayerFile
from modelpack.errors import NotFoundError
from modelpack.formats.config_json import (
    ENCODERS,
    MAX_CONFIG_JSON_BYTES,
    output_of,
    parse_config_json,
    speech_family,
    stated_template,
    without_speech,
)
from modelpack.formats.gguf import GGUFHeader, MetadataValue, read_gguf_header
from modelpack.formats.projector import gguf_role

_POOLING: Final = ("embedding", "embedding", "embedding", "other")  # from 1 on; 4 ranks pairs
# Keys of a config.json that only models with these inputs have.
_IMAGE_KEYS: Final = ("image_token_id", "image_token_index", "vision_config", "vision_tower")
_IMAGE_TYPES: Final = ("molmo", "phi4mm")  # whose config.json has none of these keys
_VIDEO_KEYS: Final = ("video_token_id", "video_token_index")
_AUDIO_KEYS: Final = ("audio_config", "audio_processor", "audio_token_id", "audio_token_index")
_MAX_TEMPLATE_BYTES: Final = 2 * 1024 * 1024  # as the engine renders at most
_TOOLS: Final = re.compile(r"\{[%{][^{}]*\btools\b")
_REASONING: Final = re.compile(
    r"<think>|enable_thinking|reasoning_content|\bthinking\b|<\|channel\|>|\[THINK\]"
)


class ReadableFile(Protocol):
    """A file of a model, its path and role in the model, and its format if it has weights."""

    @property
    def filepath(self) -> str: ...
    @property
    def role(self) -> Role: ...
    @property
    def format(self) -> str: ...

    def read(self, count: int) -> bytes:
        """Return the first `count` bytes, or all; raise `NotFoundError` if it is not at hand."""
        ...

    def header(self) -> GGUFHeader:
        """Return the header of a GGUF file. Raises as `read` and `read_gguf_header`."""
        ...


@dataclass(frozen=True, slots=True)
class LocalFile:
    """A file of a model: its content at `path`, and its path and role in the model."""

    path: Path
    filepath: str
    role: Role
    format: str = ""

    @classmethod
    def of(cls, file: LayerFile) -> LocalFile:
        """Return a file that is to be packaged."""
        role = role_of(file.media_type, file.filepath)
        kind = format_of(file.media_type, file.filepath)
        if file.media_type == media_types.DOCKER_GGUF:  # in a directory also that of projectors
            role = gguf_role(file.path, role)
        return cls(file.path, file.filepath, role, kind)

    def read(self, count: int) -> bytes:
        """Return the first `count` bytes, or all."""
        with self.path.open("rb") as stream:
            return stream.read(count)

    def header(self) -> GGUFHeader:
        """Return the header of a GGUF file."""
        return read_gguf_header(self.path)


def capabilities(
    files: Sequence[ReadableFile], metadata: Mapping[str, MetadataValue]
) -> Mapping[str, Any]:
    """Return the `capabilities` of CNCF's config for a model of these files.

    `metadata` is that of the GGUF weights, empty for other formats.
    """
    if any(file.role is Role.WEIGHT and file.format == "dduf" for file in files):
        return {"inputTypes": ["text"], "outputTypes": ["image"]}
    config = without_speech(json_of(files, "config.json"))
    if not metadata and speech_family(config) is not None:
        return {"inputTypes": ["audio"], "outputTypes": ["text"]}
    output = _output_of_gguf(metadata) if metadata else output_of(config)
    if output == "text" and any(file.filepath == "modules.json" for file in files):
        output = "embedding"  # sentence-transformers
    found = {"inputTypes": ["text", *_media_of(config)], "outputTypes": [output]}
    return with_files(found, files, _stated_template(files, metadata))


def with_files(
    found: Mapping[str, Any], files: Sequence[ReadableFile], template: str = ""
) -> Mapping[str, Any]:
    """Return capabilities with what projectors and chat templates among `files` add to them.

    `template` is the chat template of a model without a file of its own for it.
    """
    inputs = list(found.get("inputTypes", ()))
    for file in files:
        if file.role is Role.PROJECTOR:
            inputs += _media_of_projector(file)
    chosen = preferred_template([(file.role, file.filepath) for file in files])
    if chosen is not None:
        template = ""
        with suppress(NotFoundError):
            template = files[chosen].read(_MAX_TEMPLATE_BYTES).decode("utf-8", "replace")
    made = {**found, "inputTypes": list(dict.fromkeys(inputs))}
    if template and "text" in found.get("outputTypes", ()):
        made["reasoning"] = _REASONING.search(template) is not None
        made["toolUsage"] = _TOOLS.search(template) is not None
    return made


def _media_of(config: Mapping[str, Any]) -> Iterable[str]:
    kinds = {"image": _IMAGE_KEYS, "audio": _AUDIO_KEYS, "video": _VIDEO_KEYS}
    found = [
        kind for kind, keys in kinds.items() if any(config.get(key) is not None for key in keys)
    ]
    is_seeing = config.get("model_type") in _IMAGE_TYPES and "image" not in found
    return ["image", *found] if is_seeing else found


def _media_of_projector(file: ReadableFile) -> Iterable[str]:
    """Return the inputs of a projector; those of before the keys existed are of pictures."""
    metadata: Mapping[str, MetadataValue] = {}
    with suppress(NotFoundError):
        metadata = file.header().metadata
    said = {
        "image": metadata.get("clip.has_vision_encoder"),
        "audio": metadata.get("clip.has_audio_encoder"),
    }
    return [kind for kind, entry in said.items() if entry is not None and entry.value] or ["image"]


def _output_of_gguf(metadata: Mapping[str, MetadataValue]) -> str:
    entry = metadata.get("general.architecture")
    name = str(entry.value) if entry is not None else ""
    pooling = metadata.get(f"{name}.pooling_type")
    if pooling is not None and pooling.value in range(1, 1 + len(_POOLING)):
        return _POOLING[int(pooling.value) - 1]  # type: ignore[arg-type]  # in a range
    return "embedding" if name in ENCODERS else "text"


def _stated_template(files: Sequence[ReadableFile], metadata: Mapping[str, MetadataValue]) -> str:
    """Return the chat template in the metadata of a GGUF, or in tokenizer_config.json."""
    entry = metadata.get("tokenizer.chat_template")
    if entry is not None and isinstance(entry.value, str):
        return entry.value
    return stated_template(json_of(files, "tokenizer_config.json"))


def json_of(files: Sequence[ReadableFile], name: str) -> Mapping[str, Any]:
    """Return a JSON file of the model; empty if there is none, or it is not an object."""
    found = next((file for file in files if file.filepath == name), None)
    if found is None:
        return {}
    try:
        return parse_config_json(found.read(MAX_CONFIG_JSON_BYTES), strict=False)
    except (NotFoundError, ValueError):
        return {}
