"""Models in the layout of Ollama's models directory, as its x/create writes them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from modelpack.artifacts import media_types as mt
from modelpack.artifacts.digest import Digest

#: The media type, the name (None: a layer without one) and the content of a layer.
Layer = tuple[str, str | None, bytes]
#: Name -> dtype, shape and data.
Tensors = Mapping[str, tuple[str, Sequence[int], bytes]]


def blob(tensors: Tensors, metadata: Mapping[str, str] | None = None) -> bytes:
    """Return a safetensors file."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name, (dtype, shape, data) in tensors.items():
        start, end = end, end + len(data)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
    raw = json.dumps(header).encode()
    data = b"".join(data for _, _, data in tensors.values())
    return len(raw).to_bytes(8, "little") + raw + data


def tensor(name: str, tensors: Tensors, metadata: Mapping[str, str] | None = None) -> Layer:
    """Return the layer of a tensor or of a group of tensors."""
    return mt.OLLAMA_TENSOR, name, blob(tensors, metadata)


def document(name: str, value: Mapping[str, Any]) -> Layer:
    """Return the layer of a JSON file."""
    return mt.OLLAMA_JSON, name, json.dumps(value).encode()


def write_ollama(root: Path, name: str, layers: Sequence[Layer], **config: Any) -> Digest:
    """Write a model called `host/namespace/model/tag`; return the digest of its manifest."""

    def described(kind: str, label: str | None, content: bytes) -> dict[str, Any]:
        digest = Digest.of(content)
        path = root / "blobs" / f"sha256-{digest.encoded}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        named = {} if label is None else {"name": label}
        return {"mediaType": kind, "digest": str(digest), "size": len(content), **named}

    settings = {"model_format": "safetensors", "model_family": "", "model_families": None,
                "model_type": "", "file_type": "", "capabilities": ["completion"],
                "requires": "0.19.0", **config}  # fmt: skip
    value = {
        "schemaVersion": 2,
        "mediaType": mt.DOCKER_MANIFEST,
        "config": described(mt.DOCKER_IMAGE_CONFIG, None, json.dumps(settings).encode()),
        "layers": [described(*layer) for layer in layers],
    }
    path = root / "manifests" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    # As Go's json.Encoder ends a document.
    path.write_bytes(json.dumps(value, separators=(",", ":")).encode() + b"\n")
    return Digest.of(path.read_bytes())
