"""The types that the KV cache can have, by the names that users give them."""

from __future__ import annotations

from typing import Literal, cast

from modelpack.errors import UsageError

#: "auto" is the type of the model's own keys; q8 and q4 are 8 and 4 bits with scales.
KVCacheDtype = Literal["auto", "bf16", "fp16", "q8", "q4"]

#: Names that mean the same: vLLM's for types, llama.cpp's for quantised ones.
_SPELLINGS = {
    "auto": "auto",
    "bf16": "bf16",
    "bfloat16": "bf16",
    "fp16": "fp16",
    "f16": "fp16",
    "float16": "fp16",
    "half": "fp16",
    "q8": "q8",
    "q8_0": "q8",
    "q4": "q4",
    "q4_0": "q4",
}


def parse_kv_cache_dtype(text: str) -> KVCacheDtype:
    """Return the type that `text` names, in any case; raises `UsageError` for other names."""
    found = _SPELLINGS.get(text.strip().lower())
    if found is None:
        fp8 = text.strip().lower().startswith("fp8")
        raise UsageError(
            f"there is no KV cache of type {text[:100]!r}"
            + (": MLX has no 8-bit floats to compute with" if fp8 else ""),
            hint="q8 takes as many bytes, more exactly" if fp8 else "auto, bf16, fp16, q8 or q4",
        )
    return cast("KVCacheDtype", found)
