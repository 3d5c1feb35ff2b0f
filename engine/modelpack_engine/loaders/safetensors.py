"""Loads safetensors through mlx-lm's own loader, so that all of its quantisations work.

mlx-lm wants a directory with names that it knows; blobs are named by digest. It gets a temporary
directory of links, which costs no copy, and with a config that runs no code of the model's.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from mlx.nn.layers.base import Module

from modelpack.formats.safetensors import read_safetensors_header
from modelpack_engine.errors import ModelLoadError
from modelpack_engine.lean_mlx_lm import kept_file_limit
from modelpack_engine.loaders.documents import decode_object
from modelpack_engine.loaders.files import ModelFiles

#: From a config to a class of mlx_lm.models and that of its arguments.
Classes = Callable[[dict[str, Any]], tuple[type[Module], type]]

_MODEL_TYPE = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
# What mlx-lm raises for configs and weights that it cannot make a model of.
_FAILURES = (
    ArithmeticError,
    AttributeError,
    ImportError,
    LookupError,
    NameError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
)


def read_config(files: ModelFiles) -> dict[str, Any]:
    """Return config.json. Raises `ModelLoadError` if it is missing or names no architecture."""
    config = files.json("config.json")
    if config is None:
        raise ModelLoadError(
            "the model has no config.json", hint="package it with its configuration files"
        )
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or not _MODEL_TYPE.fullmatch(model_type):
        raise ModelLoadError(f"config.json: model_type is {str(model_type)[:100]!r}")
    if config.get("model_file") is not None:
        raise ModelLoadError(
            f"config.json asks to run the model's own code ({str(config['model_file'])[:100]!r}),"
            " which is never done"
        )
    return config


def load_safetensors(
    files: ModelFiles, config: Mapping[str, Any], *, classes: Classes | None = None
) -> tuple[Module, dict[str, Any]]:
    """Return the model, not evaluated, and its config as mlx-lm completed it.

    `classes` chooses the model's class and that of its arguments, in place of mlx-lm.

    Raises `ModelLoadError` for an architecture that mlx-lm does not have, and for tensors that
    are missing, unknown or of the wrong shape; `WeightFormatError` for a damaged file.
    """
    _check_headers(files)
    with kept_file_limit():
        from mlx_lm.utils import load_model

    with tempfile.TemporaryDirectory(prefix="modelpack-") as directory:
        root = Path(directory)
        (root / "config.json").write_text(json.dumps(config))
        for name in ("generation_config.json", "hf_quant_config.json"):
            raw = files.read(name)
            if raw is not None:
                (root / name).write_text(json.dumps(decode_object(raw, name)))
        count = len(files.weights)
        for number, path in enumerate(files.weights, start=1):
            link = root / f"model-{number:05d}-of-{count:05d}.safetensors"
            link.symlink_to(path.absolute())
        try:
            options: dict[str, Any] = {} if classes is None else {"get_model_classes": classes}
            model, completed = load_model(root, lazy=True, strict=True, **options)
        except _FAILURES as error:
            raise _translated(error, str(config["model_type"])) from error
    return model, completed


def _check_headers(files: ModelFiles) -> None:
    """Read every header within limits, and refuse a tensor that two shards have."""
    seen: dict[str, Path] = {}
    for path in files.weights:
        for tensor in read_safetensors_header(path).tensors:
            if tensor.name in seen:
                raise ModelLoadError(f"{path}: {tensor.name!r} is in {seen[tensor.name].name} too")
            seen[tensor.name] = path


def _translated(error: Exception, model_type: str) -> ModelLoadError:
    text = " ".join(str(error).split())
    if len(text) > 600:
        text = f"{text[:600]}…"
    if "not supported" in text and model_type in text:
        return ModelLoadError(
            f"the architecture {model_type!r} is not supported by the installed mlx-lm",
            hint="a newer mlx-lm may have it",
        )
    if not isinstance(error, ValueError):
        text = f"{type(error).__name__}: {text}"
    return ModelLoadError(f"mlx-lm's {model_type} cannot be made of these files: {text}")
