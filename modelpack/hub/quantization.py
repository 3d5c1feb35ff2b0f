"""Which quantisation a GGUF file of the hub is, by its name.

Names are by convention: `Model-Q4_K_M.gguf`, `model.q8_0.gguf`, `BF16/model-00001-of-00003.gguf`,
`Model-UD-Q4_K_XL-00001-of-00002.gguf`. A label is matched whole: `Q4_K` is not `Q4_K_M`.
"""

from __future__ import annotations

import re
from typing import Final

_SHARD: Final = re.compile(r"-\d{5}-of-\d{5}\Z", re.A)
# llama.cpp's names of file types (llama-quantize), Unsloth's `UD-` and MXFP4.
_LABEL: Final = re.compile(
    r"(?:(?<=[-._])|\A)"
    r"((?:UD-)?(?:I?Q[1-9]\d?(?:_[0-9A-Z]+)*|TQ\d_\d|(?:MX|NV)FP4(?:_MOE)?|BF16|F16|FP16|F32|FP32))"
    r"(?=[-.]|\Z)",
    re.I | re.A,
)


def stem(path: str) -> str:
    """Return the name of a weight file without its directory, its shard number and its ending."""
    name = path.rpartition("/")[2]
    return _SHARD.sub("", name[: name.rfind(".")] if "." in name else name)


def quantization_of(path: str) -> str | None:
    """Return the label in upper case: of the file's name, else of its directory; None without."""
    for text in (stem(path), *reversed(path.split("/")[:-1])):
        found = _LABEL.findall(text)
        if found:
            return str(found[-1]).upper()
    return None


def is_quantization(path: str, wanted: str) -> bool:
    """Return whether the file is the quantisation `wanted`: by its label, or by its whole name.

    For what is no label (`8bit`, `imat`) the words of a name count, as `-` and `.` part them.
    """
    name = stem(path)
    if wanted.lower() in (name.lower(), path.rpartition("/")[2].lower()):
        return True
    if _LABEL.fullmatch(wanted):
        return quantization_of(path) == wanted.upper()
    words, asked = _words(name), _words(wanted)
    places = range(len(words) - len(asked) + 1)
    return any(words[at : at + len(asked)] == asked for at in places)


def _words(text: str) -> list[str]:
    return re.split(r"[-.]", text.lower())
