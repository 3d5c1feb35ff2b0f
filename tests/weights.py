"""Weight files of any size for tests."""

from __future__ import annotations

import json
from pathlib import Path


def _header(size: int) -> bytes:
    header = json.dumps({"w": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header


def write_safetensors(path: Path, data: bytes) -> Path:
    """Write a valid safetensors file with one tensor of these bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(_header(len(data)) + data)
    return path


def sparse_safetensors(path: Path, size: int) -> Path:
    """Write a valid safetensors file with one tensor of `size` zero bytes that take no space."""
    path.parent.mkdir(parents=True, exist_ok=True)
    header = _header(size)
    with path.open("wb") as stream:
        stream.write(header)
        stream.truncate(len(header) + size)
    return path
