"""JSON documents of models: config.json, tokenizer_config.json and the like."""

from __future__ import annotations

import json
from typing import Any

from modelpack_engine.errors import ModelLoadError

#: Bytes of one document. Parsed, it takes 25 times as much memory, and stops all threads meanwhile;
#: tokenizer_config.json of models that speak has 12 MB.
MAX_BYTES = 16 * 1024 * 1024


def decode_json(raw: bytes, what: str) -> Any:
    """Return the value of the JSON document `raw`; `what` names it in the `ModelLoadError`."""
    if len(raw) > MAX_BYTES:
        raise ModelLoadError(f"{what}: {len(raw)} bytes of JSON, the limit is {MAX_BYTES}")
    try:
        return json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise ModelLoadError(f"{what}: is not JSON: {error}") from None


def decode_object(raw: bytes, what: str) -> dict[str, Any]:
    """Return the JSON object `raw`; `what` names it in the `ModelLoadError` otherwise.

    Infinity and NaN are taken, as configs of some models hold them.
    """
    value = decode_json(raw, what)
    if not isinstance(value, dict):
        raise ModelLoadError(f"{what}: is no JSON object")
    return value
