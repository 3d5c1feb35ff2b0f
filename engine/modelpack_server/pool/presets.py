"""Presets: sampling and context settings for what a model is used for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from modelpack.errors import UsageError


@dataclass(frozen=True, slots=True)
class Preset:
    """`sampling` are fields of SamplingParams; `context_size`, in tokens, is at most that."""

    sampling: Mapping[str, Any] = field(hash=False)
    context_size: int


#: More than any model holds: all that it does.
WHOLE_CONTEXT = 1 << 30

PRESETS: Mapping[str, Preset] = {
    # Programs have to be right: little chance, and no penalty for saying a name again.
    "code": Preset({"temperature": 0.2, "top_p": 0.95, "top_k": 40}, 32768),
    "chat": Preset({"temperature": 0.7, "top_p": 0.9, "min_p": 0.05}, 8192),
    "creative": Preset(
        {"temperature": 1.0, "top_p": 0.98, "min_p": 0.02, "presence_penalty": 0.3}, 8192
    ),
    # All that the model has: what is read counts, not what is made up.
    "long-context": Preset({"temperature": 0.3, "top_p": 0.9}, WHOLE_CONTEXT),
}


def preset_named(name: str) -> Preset:
    """Return the preset; raise `UsageError`, naming those there are, for another name."""
    if name not in PRESETS:
        raise UsageError(
            f"there is no preset {name!r}", hint=f"there are {', '.join(sorted(PRESETS))}"
        )
    return PRESETS[name]
