"""The two weight files of the specification's test vectors."""

from __future__ import annotations

from base64 import b64decode
from hashlib import sha256
from pathlib import Path
from typing import Any

from modelpack.artifacts.json_document import encode
from modelpack.formats.statistics import ModelStatistics

TINY_GGUF = b64decode(
    "R0dVRgMAAAABAAAAAAAAAAMAAAAAAAAAFAAAAAAAAABnZW5lcmFsLmFyY2hpdGVjdHVyZQgAAAAFAAAAAAAAAGxsYW1h"
    "DAAAAAAAAABnZW5lcmFsLm5hbWUIAAAACwAAAAAAAAB0aW55IDwmPiB2MRQAAAAAAAAAbGxhbWEuY29udGV4dF9sZW5n"
    "dGgEAAAAAAgAABEAAAAAAAAAdG9rZW5fZW1iZC53ZWlnaHQCAAAABAAAAAAAAAACAAAAAAAAAAAAAAAAAAAAAAAAAAAA"
    "AAAAAAAAAAAAAAAAAAAAAAAAAAAAAACAPwAAAEAAAEBAAACAQAAAoEAAAMBAAADgQA=="
)
MODEL_SAFETENSORS = b64decode(
    "kAAAAAAAAAB7Il9fbWV0YWRhdGFfXyI6eyJmb3JtYXQiOiJwdCJ9LCJiIjp7ImR0eXBlIjoiRjMyIiwic2hhcGUiOlsz"
    "XSwiZGF0YV9vZmZzZXRzIjpbMCwxMl19LCJhIjp7ImR0eXBlIjoiRjE2Iiwic2hhcGUiOlsyLDJdLCJkYXRhX29mZnNl"
    "dHMiOlsxMiwyMF19fSAAAAAAAACAPwAAAEAAAAA8AEAAQg=="
)
CONFIG_JSON = b'{"max_position_embeddings":512}'

assert sha256(TINY_GGUF).hexdigest() == (
    "d1bdb851bdd707d5d2fc1e6dbb3db8a0e4489cdc42616f551c6eb0943e18b14b"
)
assert sha256(MODEL_SAFETENSORS).hexdigest() == (
    "094524b905dca44dafe85d769ee5cf99f3c3521e1e11c9dde02e698bd9d6a867"
)

# The parts of the configs of vectors A and D that come from the weights.
VECTOR_A = (
    r'{"format":"gguf","quantization":"MOSTLY_F32","parameters":"8","architecture":"llama",'
    r'"size":"32B","gguf":{"general.architecture":"llama",'
    r'"general.name":"tiny \u003c\u0026\u003e v1","llama.context_length":"2048"},'
    r'"context_size":2048}'
)
VECTOR_D = (
    '{"format":"safetensors","quantization":"mixed","parameters":"7.00","size":"172.00B",'
    '"safetensors":{"format":"pt","tensor_count":"2"},"context_size":512}'
)


def as_config(statistics: ModelStatistics) -> str:
    """Return the statistics as the JSON object of a config blob, in its order of fields."""
    fields: dict[str, Any] = {}
    for name in (
        "format",
        "quantization",
        "parameters",
        "architecture",
        "size",
        "gguf",
        "safetensors",
        "diffusers",
        "context_size",
    ):
        value = getattr(statistics, name)
        if value:
            fields[name] = dict(value) if name in ("gguf", "safetensors", "diffusers") else value
    return encode(fields).decode()


def put(directory: Path, name: str, raw: bytes) -> Path:
    """Write `raw` to `name` in `directory`; return the path."""
    path = directory / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(raw)
    return path
