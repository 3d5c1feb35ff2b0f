"""Settings that vllm-metal takes from the environment, understood here as well.

Source: vllm-metal's page "Configuration". A value that is neither is an `EngineError`, on every
device: a setting that is misspelt would otherwise change nothing and say nothing.
"""

from __future__ import annotations

import os

from modelpack_engine.errors import EngineError

MEMORY_FRACTION = "VLLM_METAL_MEMORY_FRACTION"
USE_PAGED_ATTENTION = "VLLM_METAL_USE_PAGED_ATTENTION"

_YES = frozenset({"1", "true", "yes", "on"})
_NO = frozenset({"0", "false", "no", "off"})


def memory_fraction() -> float | None:
    """Return the share of the GPU's memory that is asked for, above 0 and up to 1.

    None for "auto", and where nothing is set.
    """
    text = os.environ.get(MEMORY_FRACTION, "").strip()
    if text.lower() in ("", "auto"):
        return None
    try:
        share = float(text)
    except ValueError:
        share = float("nan")
    if not 0 < share <= 1:
        raise EngineError(
            f"{MEMORY_FRACTION} is {text[:100]!r}, expected 'auto' or a number above 0, up to 1",
            hint="unset it, or give a share such as 0.8",
        )
    return share


def uses_paged_attention() -> bool:
    """Return whether keys and values are paged: unless it is switched off."""
    text = os.environ.get(USE_PAGED_ATTENTION, "").strip()
    if text.lower() in _NO:
        return False
    if text and text.lower() not in _YES:
        raise EngineError(
            f"{USE_PAGED_ATTENTION} is {text[:100]!r}, expected 1 or 0",
            hint="unset it, or give 0 to run without paged attention",
        )
    return True
