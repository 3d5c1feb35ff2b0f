"""JSON documents of models: config.json, tokenizer_config.json and the like."""

from __future__ import annotations

import json
from typing import Any

from modelpack_engine.errors import ModelLoadError


def decode_object(raw: bytes, what: str) -> dict[str, Any]:
    """Return the JSON object `raw`; `what` names it in the `ModelLoadError` otherwise.

    Infinity and NaN are taken, as configs of some models hold them.
    """
    try:
        value = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise ModelLoadError(f"{what}: is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise ModelLoadError(f"{what}: is no JSON object")
    return value
