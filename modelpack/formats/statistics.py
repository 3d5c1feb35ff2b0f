"""Which weight format a file has, by its first bytes and its name."""

from __future__ import annotations

import os
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path

from modelpack.artifacts.json_document import sorted_map
from modelpack.errors import PackagingError, WeightFormatError
from modelpack.formats.dduf import DDUFHeader, read_dduf_header
from modelpack.formats.gguf_statistics import gguf_statistics as gguf_statistics
from modelpack.formats.reader import WeightSource, opened
from modelpack.formats.safetensors import looks_like_safetensors
from modelpack.formats.safetensors_statistics import (
    safetensors_statistics as safetensors_statistics,
)
from modelpack.formats.tensors import ModelStatistics as ModelStatistics
from modelpack.formats.units import format_decimal_size


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


def read_statistics(
    paths: Sequence[str | os.PathLike[str]], *, exact: bool = False
) -> ModelStatistics:
    """Return the statistics of the model in the weight files `paths`, all of one format.

    With `exact`, everything is as Docker Model Runner computes it. Raises `WeightFormatError` for
    a file that does not parse, `PackagingError` for formats that are mixed or shards that are
    missing.
    """
    if not paths:
        raise PackagingError("no weight files to take statistics from")
    formats = [detect_format(path) for path in paths]
    for path, found in zip(paths, formats, strict=True):
        if found is not formats[0]:
            raise PackagingError(
                f"{os.fspath(path)} is {found}, but {os.fspath(paths[0])} is {formats[0]}:"
                " the weights of a model have one format",
            )
    if formats[0] is WeightFormat.GGUF:
        return gguf_statistics(paths, exact=exact)
    if formats[0] is WeightFormat.SAFETENSORS:
        return safetensors_statistics(paths, exact=exact)
    return dduf_statistics(paths, exact=exact)


def dduf_statistics(
    files: Sequence[str | os.PathLike[str] | DDUFHeader], *, exact: bool = False
) -> ModelStatistics:
    """Return the statistics of the model in the DDUF archives `files`, usually one.

    They are Docker Model Runner's with and without `exact`; a broken archive is a
    `WeightFormatError`.
    """
    if not files:
        return ModelStatistics(format="dduf")
    headers = [file if isinstance(file, DDUFHeader) else read_dduf_header(file) for file in files]
    size = sum(header.file_size for header in headers)
    return ModelStatistics(
        format="dduf",
        architecture="diffusers",
        size=format_decimal_size(size),
        diffusers=sorted_map({"dduf_file": Path(headers[0].path).name, "layout": "dduf"}),
    )
