"""The capabilities of a model in a store or a registry, without reading its weights."""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from modelpack.artifacts import media_types
from modelpack.artifacts.model import Model, Role
from modelpack.builder.capabilities import capabilities
from modelpack.errors import FormatError, NotFoundError, SourceChangedError
from modelpack.formats.gguf import GGUFHeader, MetadataValue, ValueType, read_gguf_header
from modelpack.formats.reader import WeightFile
from modelpack.lint.checks import LintFile
from modelpack.operations.lint import model_subject
from modelpack.storage import Source

_DOCKER: Final = (media_types.DOCKER_CONFIG_V01, media_types.DOCKER_CONFIG_V02)
#: Projectors have no vocabulary: their headers are some 100 KB of tensor names.
_MAX_HEADER_BYTES: Final = 1024 * 1024
_MAX_DIGITS: Final = 20  # of 64 bits


@dataclass(frozen=True, slots=True)
class _SourceFile:
    """A file of a model in a store or registry; without `content`, it cannot be read."""

    filepath: str
    role: Role
    format: str
    content: LintFile | None

    def read(self, count: int) -> bytes:
        if self.content is None:
            raise NotFoundError(f"{self.filepath}: is not read from a registry")
        return self.content.read(min(count, self.content.size))

    def header(self) -> GGUFHeader:
        head = self.read(_MAX_HEADER_BYTES)
        size = len(head) if self.content is None else self.content.size
        return read_gguf_header(WeightFile(io.BytesIO(head), path=self.filepath, size=size))


def capabilities_of(model: Model, source: Source | None) -> Mapping[str, Any]:
    """Return the `capabilities` of CNCF's config for a model; {} if they are not known.

    A CNCF config states them. Docker's has no field for them, but the chat template and other
    values of a GGUF header; its other files are read from `source`: config.json,
    tokenizer_config.json, the chat template and the header of a projector. Without a source, a
    safetensors model has none, nor has one with a projector, which may be of pictures or of sound.
    Raises what `source` raises, except for missing files.
    """
    config = model.config
    if config.media_type not in _DOCKER or model.is_adapter or model.is_drafter:
        return config.cncf_config.get("capabilities") or {}
    roles = {file.role for file in model.files()}
    if source is None and (config.format == "safetensors" or Role.PROJECTOR in roles):
        return {}
    contents = () if source is None else model_subject(model, source, ()).files
    files = [
        _SourceFile(file.filepath or "", file.role, file.format, contents[at] if contents else None)
        for at, file in enumerate(model.files())
        if not file.is_packed
    ]
    try:
        return capabilities(files, _metadata(model) if config.format == "gguf" else {})
    except (FormatError, SourceChangedError):  # a damaged projector, or a header that goes on
        return {}


def _metadata(model: Model) -> Mapping[str, MetadataValue]:
    """Return the GGUF metadata in a config, whose values are texts."""
    texts = {"general.architecture": model.config.architecture, **(model.config.gguf or {})}
    return {
        key: MetadataValue(ValueType.UINT32, int(text), 0)
        if text.isdecimal() and len(text) <= _MAX_DIGITS
        else MetadataValue(ValueType.STRING, text, 0)
        for key, text in texts.items()
    }
