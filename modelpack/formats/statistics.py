"""Statistics of a model's weights, whatever their format."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from modelpack.errors import PackagingError
from modelpack.formats.dduf import DDUFHeader, read_dduf_header
from modelpack.formats.detect import WeightFormat, detect_format
from modelpack.formats.gguf_statistics import gguf_statistics as gguf_statistics
from modelpack.formats.model_statistics import ModelStatistics as ModelStatistics
from modelpack.formats.safetensors_statistics import (
    safetensors_statistics as safetensors_statistics,
)
from modelpack.formats.units import format_decimal_size
from modelpack.gojson import sorted_map


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
