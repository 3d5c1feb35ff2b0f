"""From a model's files to an `Encoder`: safetensors blobs, read where they lie."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx

from modelpack.formats.safetensors import read_safetensors_header
from modelpack_engine.embedding.encoder import Encoder
from modelpack_engine.embedding.encoder_config import parse_encoder_config
from modelpack_engine.embedding.encoder_names import rename_tensors
from modelpack_engine.errors import ModelLoadError
from modelpack_engine.loaders.files import ModelFiles
from modelpack_engine.loaders.parameters import check_parameters, shapes_of
from modelpack_engine.loaders.tensor_bounds import TensorBounds

_FLOATS = ("F32", "F16", "BF16")
#: Buffers that older versions of transformers saved beside the weights.
_BUFFERS = ("position_ids", "token_type_ids", "inv_freq")


def load_encoder(files: ModelFiles, config: Mapping[str, Any], dtype: mx.Dtype | None) -> Encoder:
    """Return the encoder, not evaluated, its weights as `dtype` (None: as in the files).

    Raises `ModelLoadError` for an architecture that is not known, by its name, and for tensors
    that are missing, unknown or of another shape; `WeightFormatError` for a damaged file.
    """
    bounds = TensorBounds.of(
        (tensor.name, tensor.shape)
        for path in files.weights
        for tensor in read_safetensors_header(path).tensors
    )
    bounds.check(config)
    parsed = parse_encoder_config(config)
    with bounds.building("config.json"):
        encoder = Encoder(parsed)
    tensors = rename_tensors(parsed, read_tensors(files.weights))
    got = {name: tuple(array.shape) for name, array in tensors.items()}
    check_parameters(parsed.architecture, shapes_of(encoder), got)
    if dtype is not None:
        tensors = {name: array.astype(dtype) for name, array in tensors.items()}
    encoder.load_weights(list(tensors.items()))
    encoder.eval()
    return encoder


def read_tensors(paths: Iterable[Path]) -> dict[str, mx.array]:
    """Return the tensors of safetensors files by name; their bytes are read when they are used.

    Raises `ModelLoadError` for one that is in two files, or of no floating-point type.
    """
    found: dict[str, mx.array] = {}
    for path in paths:
        for tensor in read_safetensors_header(path).tensors:
            if tensor.name in found:
                raise ModelLoadError(f"{path}: {tensor.name!r} is in another file too")
            if tensor.dtype not in _FLOATS and not tensor.name.endswith(_BUFFERS):
                raise ModelLoadError(
                    f"{path}: {tensor.name!r} is {tensor.dtype}, expected one of {_FLOATS}"
                )
        try:
            loaded = mx.load(str(path), format="safetensors")
        except (RuntimeError, ValueError) as error:
            raise ModelLoadError(f"{path}: cannot be read: {error}") from error
        assert isinstance(loaded, dict)
        found |= loaded
    return found
