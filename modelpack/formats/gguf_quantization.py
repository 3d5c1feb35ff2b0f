"""The quantization of a GGUF model: the name of its file type, or a guess from its tensors."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from modelpack.formats.gotext import trim
from modelpack.formats.tensor_types import FILE_TYPES, GUESSED_FILE_TYPE, REFERENCE_FILE_TYPES
from modelpack.formats.tensors import TensorInfo

#: Types that never become the name of a file type.
_UNNAMED = {"Q8_1", "Q8_K", "I8", "I16", "I32", "I64", "F64"} | {
    f"IQ4_NL_{rows}" for rows in ("4_4", "4_8", "8_8")
}


def quantization(
    file_type: int | None, architecture: str, tensors: Iterable[TensorInfo], *, exact: bool
) -> str:
    """Return the quantization of a model with this `general.file_type`, as `MOSTLY_Q4_K_M`.

    `exact` knows the file types of the reference implementation only.
    """
    known = REFERENCE_FILE_TYPES if exact else len(FILE_TYPES)
    if file_type is not None and not exact and file_type & GUESSED_FILE_TYPE:
        file_type = None  # llama.cpp says that nobody had written it down
    if file_type is None or (exact and file_type == REFERENCE_FILE_TYPES):
        name = _guess(architecture, tensors)
        return f"MOSTLY_{name}" if name else "Unknown"
    return f"MOSTLY_{FILE_TYPES[file_type]}" if file_type < known else f"GGUFFileType({file_type})"


def _guess(architecture: str, tensors: Iterable[TensorInfo]) -> str | None:
    diffusion = architecture == "diffusion"
    counts = Counter(tensor.dtype for tensor in tensors if _counts(trim(tensor.name), diffusion))
    if not counts:
        return None
    ranked = [dtype for dtype, _ in counts.most_common()]
    main = ranked[1] if ranked[0] == "F32" and len(ranked) > 1 else ranked[0]
    match main:
        case "Q2_K":
            return "Q2_K_S" if ranked[-1] == "Q5_K" else "Q2_K"
        case "Q3_K" if counts["Q8_0"] or (counts["Q5_K"] > 1 and not counts["Q4_K"]):
            return "Q3_K_L"
        case "Q3_K":
            return "Q3_K_M" if counts["Q4_K"] > 1 else "Q3_K_S"
        case "Q4_K" if counts["Q6_K"] > 1:
            return "Q4_K_M"
        case "Q4_K":
            return "Q3_K_M" if counts["Q3_K"] > 1 else "Q4_K_S"
        case "Q5_K":
            return "Q5_K_M" if counts["Q6_K"] > 1 else "Q5_K_S"
        case "IQ2_XS":
            return "IQ2_S" if counts["IQ4_XS"] > 1 else "IQ2_XS"
        case "IQ2_S":
            return "IQ2_M"
        case "IQ3_S":
            return "IQ3_XS" if counts["IQ3_XXS"] > 1 else "IQ3_S"
        case _:
            return None if main in _UNNAMED else main


def _counts(name: str, diffusion: bool) -> bool:
    """Return whether a tensor of this name says how the model is quantized."""
    if name.endswith(".weight"):
        return True
    return not diffusion and (name.startswith(("token_embd", "blk.")) or "_norm" in name)
