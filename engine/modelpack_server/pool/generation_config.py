"""generation_config.json: how a model's makers would have it sampled."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# The file's name of a field, SamplingParams' name, and what is no sensible value of it.
_FIELDS = (
    ("temperature", "temperature", (0, 2)),
    ("top_p", "top_p", (0, 1)),
    ("top_k", "top_k", (-1, 1 << 30)),
    ("min_p", "min_p", (0, 1)),
    ("repetition_penalty", "repetition_penalty", (0.01, 100)),
)


def sampling_defaults(config: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return the fields of SamplingParams that the file sets to something sensible."""
    found: dict[str, Any] = {}
    for name, field, (low, high) in _FIELDS:
        value = (config or {}).get(name)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            continue
        if low <= value <= high and not (field == "top_p" and value == 0):
            found[field] = int(value) if field == "top_k" else value
    if (config or {}).get("do_sample") is False:
        found.pop("temperature", None)
        found["temperature"] = 0.0
    return found
