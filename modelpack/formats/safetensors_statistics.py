"""Statistics of a model in safetensors files."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from modelpack.artifacts.json_document import sorted_map
from modelpack.errors import NotFoundError
from modelpack.formats import config_json as model_json
from modelpack.formats.config_json import MLXQuantization
from modelpack.formats.safetensors import SafetensorsHeader, read_safetensors_header
from modelpack.formats.shards import check_complete, indexed_files
from modelpack.formats.tensors import ModelStatistics, TensorInfo
from modelpack.formats.units import format_decimal_parameters, format_decimal_size, trim

#: Longer metadata texts are left out of configs, but for exact ones.
MAX_TEXT = 65_536


def safetensors_statistics(
    files: Sequence[str | os.PathLike[str] | SafetensorsHeader],
    *,
    exact: bool = False,
    config_json: str | os.PathLike[str] | None = None,
) -> ModelStatistics:
    """Return the statistics of the model in the weight `files`: paths, or headers read already.

    `config_json` is the model's configuration, by default the one beside the weights. With
    `exact`, everything is as Docker Model Runner computes it, which looks at the first file only.
    Every header is checked either way: raises `WeightFormatError`, or `PackagingError` naming
    shards that are missing.
    """
    if not files:
        return ModelStatistics(format="safetensors")
    check_complete(file.path if isinstance(file, SafetensorsHeader) else file for file in files)
    headers = [
        file if isinstance(file, SafetensorsHeader) else read_safetensors_header(file)
        for file in files
    ]
    size = format_decimal_size(sum(header.file_size for header in headers))
    if exact:
        return _exact(headers, size)
    notes: list[str] = []
    tensors = _counted(headers)
    config = _config(headers, config_json, notes)
    metadata: dict[str, str] = {}
    for header in headers:
        for key, value in header.metadata.items():
            metadata.setdefault(key, value)
    architecture = trim(metadata.get("architecture", "")) or model_json.architecture(config)
    for key in [key for key, value in metadata.items() if len(value) > MAX_TEXT]:
        notes.append(f"{key} of {len(metadata[key])} characters is left out of the config")
        del metadata[key]
    quantized = MLXQuantization.of(config)
    if quantized is None:
        quantization = _quantization(tensors)
        parameters = sum(tensor.elements for tensor in tensors)
    else:
        quantization = quantized.label
        parameters = quantized.parameters(tensors)
        metadata |= quantized.facts()
    return ModelStatistics(
        format="safetensors",
        quantization=quantization,
        parameters=format_decimal_parameters(parameters),
        architecture=architecture,
        size=size,
        safetensors=sorted_map({**metadata, "tensor_count": str(len(tensors))}),
        context_size=model_json.context_size(config, nested=True),
        notes=tuple(notes),
    )


def _exact(headers: Sequence[SafetensorsHeader], size: str) -> ModelStatistics:
    first = headers[0]
    config: Mapping[str, Any] = {}
    path = model_json.first_config_json(Path(header.path).parent for header in headers)
    if path is not None:
        try:
            config = model_json.read_config_json(path, strict=True)
        except (ValueError, NotFoundError):
            config = {}
    return ModelStatistics(
        format="safetensors",
        quantization=_quantization(first.tensors),
        parameters=format_decimal_parameters(sum(tensor.elements for tensor in first.tensors)),
        architecture=first.metadata.get("architecture", ""),
        size=size,
        safetensors=sorted_map({**first.metadata, "tensor_count": str(len(first.tensors))}),
        context_size=model_json.context_size(config, nested=False),
    )


def _counted(headers: Sequence[SafetensorsHeader]) -> list[TensorInfo]:
    """Return the tensors that make up the model, each once.

    In each directory, an index says which files count; without one, a tensor that several files
    hold (variants such as `model.fp16.safetensors`) counts where it comes first.
    """
    directories: dict[Path, list[SafetensorsHeader]] = {}
    for header in headers:
        directories.setdefault(Path(header.path).parent, []).append(header)
    tensors: list[TensorInfo] = []
    for directory, files in directories.items():
        names = [Path(header.path).name for header in files]
        indexed = indexed_files(directory, names)
        counted: dict[str, TensorInfo] = {}
        for name, header in zip(names, files, strict=True):
            if indexed is None or name in indexed:
                for tensor in header.tensors:
                    counted.setdefault(tensor.name, tensor)
        tensors += counted.values()
    return tensors


def _quantization(tensors: Sequence[TensorInfo]) -> str:
    dtypes = {tensor.dtype for tensor in tensors}
    if not dtypes:
        return "unknown"
    return dtypes.pop() if len(dtypes) == 1 else "mixed"


def _config(
    headers: Sequence[SafetensorsHeader],
    given: str | os.PathLike[str] | None,
    notes: list[str],
) -> Mapping[str, Any]:
    """Return the model's config.json, or an empty object.

    It lies in the directory that all weights have in common: those further down describe parts.
    """
    if given is None:
        directories = [os.path.dirname(os.path.abspath(header.path)) for header in headers]
        path = Path(os.path.commonpath(directories)) / model_json.CONFIG_JSON
    else:
        path = Path(given)
    try:
        return model_json.read_config_json(path, strict=False)
    except NotFoundError:
        return {}
    except ValueError as error:
        notes.append(f"{path} does not parse ({error}): no architecture, no context size from it")
        return {}
