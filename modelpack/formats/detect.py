"""Which weight format a file has, by its first bytes and its name."""

from __future__ import annotations

import os
from enum import StrEnum

from modelpack.errors import WeightFormatError
from modelpack.formats.reading import WeightSource, opened
from modelpack.formats.safetensors import looks_like_safetensors


class WeightFormat(StrEnum):
    """A format of weight files, by its name in configs."""

    GGUF = "gguf"
    SAFETENSORS = "safetensors"
    DDUF = "dduf"


_EXPECTED = {
    WeightFormat.GGUF: "a GGUF file",
    WeightFormat.SAFETENSORS: "a safetensors file",
    WeightFormat.DDUF: "a DDUF archive",
}


def format_of_name(name: str) -> WeightFormat | None:
    """Return the format that the ending of a file name stands for, in either case, or None."""
    ending = os.path.splitext(name)[1].lower().removeprefix(".")
    return next((known for known in WeightFormat if known == ending), None)


def detect_format(source: WeightSource) -> WeightFormat:
    """Return the format of the file `source`; its header is not checked further.

    Raises `WeightFormatError` if it has none, or not the one that its name promises; the message
    says what the file seems to be instead.
    """
    with opened(source) as file:
        named = format_of_name(os.path.basename(file.path))
        found = _format_of_start(file.head(), file.size, named)
        if found is None:
            if named is WeightFormat.SAFETENSORS:
                return named  # its reader has more to say on what is wrong with the start
            raise file.foreign(_EXPECTED[named] if named else "a weight file")
        if named and found is not named:
            raise WeightFormatError(
                f"is {_EXPECTED[found]}, but is named .{named}",
                path=file.path,
                offset=0,
                hint=f"rename it to end in .{found}",
            )
        return found


def _format_of_start(head: bytes, size: int, named: WeightFormat | None) -> WeightFormat | None:
    if head[:4] in (b"GGUF", b"FUGG"):
        return WeightFormat.GGUF
    # Every ZIP archive starts like this; only the name tells a DDUF from the rest.
    if head[:4] == b"PK\x03\x04" and named in (WeightFormat.DDUF, None):
        return WeightFormat.DDUF
    if looks_like_safetensors(head, size):
        return WeightFormat.SAFETENSORS
    return None
