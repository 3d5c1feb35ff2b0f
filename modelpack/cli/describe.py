"""A model described: for people, and for programs."""

from __future__ import annotations

from collections.abc import Collection
from datetime import UTC, datetime
from typing import Any

from modelpack import mediatypes
from modelpack.cli.output import human_size, one_line
from modelpack.digest import Digest
from modelpack.model import Model

_STEPS = (("year", 365 * 86400), ("month", 30 * 86400), ("week", 7 * 86400), ("day", 86400),
          ("hour", 3600), ("minute", 60))  # fmt: skip


def model_json(model: Model, missing: Collection[Digest] = ()) -> dict[str, Any]:
    """Return what `inspect --json` prints; `missing` are the layers that the store lacks."""
    config = model.config
    return {
        "reference": str(model.reference) if model.reference else None,
        "digest": str(model.digest),
        "mediaType": model.manifest.media_type,
        "artifactType": model.manifest.artifact_type,
        "annotations": dict(model.manifest.annotations),
        "size": model.manifest.total_size,
        "config": {
            "mediaType": config.media_type,
            "format": config.format,
            "quantization": config.quantization,
            "parameters": config.parameters,
            "architecture": config.architecture,
            "size": config.size,
            "contextSize": config.context_size,
            "created": config.created,
            "gguf": dict(config.gguf) if config.gguf else None,
            "safetensors": dict(config.safetensors) if config.safetensors else None,
        },
        "files": [
            {
                "file": file.filepath,
                "role": str(file.role),
                "mediaType": file.media_type,
                "size": file.descriptor.size,
                "digest": str(file.descriptor.digest),
                **({"missing": True} if file.descriptor.digest in missing else {}),
            }
            for file in model.files()
        ],
    }


def model_text(model: Model, missing: Collection[Digest] = ()) -> str:
    """Return what `inspect` prints; `missing` are the layers that the store lacks."""
    config = model.config
    kinds = {mediatypes.CNCF_CONFIG: "CNCF ModelPack", mediatypes.CNAI_CONFIG: "CNAI model",
             mediatypes.KITOPS_CONFIG: "KitOps ModelKit",
             mediatypes.DOCKER_IMAGE_CONFIG: "Ollama"}  # fmt: skip
    kind = kinds.get(config.media_type) or f"Docker {config.media_type[-9:-5]}"
    context = str(config.context_size) if config.context_size is not None else ""
    lines = [
        ("Model", str(model.reference) if model.reference else model.short_id),
        ("Digest", str(model.digest)),
        ("Type", kind),
        ("Created", config.created or ""),
        ("Format", config.format),
        ("Architecture", config.architecture),
        ("Parameters", config.parameters),
        ("Quantization", config.quantization),
        ("Context size", context),
        ("Size", human_size(model.manifest.total_size)),
    ]
    text = [f"{label + ':':<14}{value}" for label, value in lines if value]
    text.append("Files:")
    for file in model.files():
        size = human_size(file.descriptor.size)
        line = f"  {file.role!s:<14}{size:>10}  {file.filepath or file.descriptor.digest}"
        text.append(line + ("  (not here)" if file.descriptor.digest in missing else ""))
    return "\n".join(map(one_line, text))


def age(created: str | None, now: datetime) -> str:
    """Return how long ago an RFC 3339 time was; empty for none, and for the epoch's stand-in."""
    if not created:
        return ""
    try:
        when = datetime.fromisoformat(created)
    except ValueError:
        return created
    if when.tzinfo is None:
        when = when.replace(tzinfo=UTC)
    if when.timestamp() == 0:
        return ""
    seconds = (now - when).total_seconds()
    for unit, length in _STEPS:
        count = int(seconds // length)
        if count >= 1:
            return f"{count} {unit}{'s' if count > 1 else ''} ago"
    return "just now" if seconds >= 0 else created
