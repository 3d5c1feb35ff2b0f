"""Load safetensors through mlx-lm's loader, so that all of its quantisations work.

mlx-lm expects a directory with known file names, but blobs are named by digest. It therefore gets a
temporary directory of links, and a config that runs none of the model's code.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.nn.layers.base import Module

from modelpack.errors import ModelpackError
from modelpack.formats.safetensors import read_safetensors_header
from modelpack_engine.errors import ModelLoadError
from modelpack_engine.models.config_guard import Limits, check_fields
from modelpack_engine.models.files import ModelFiles, decode_object
from modelpack_engine.models.load_budget import TensorBounds
from modelpack_engine.models.model_config import completed, normalised, with_tied_embeddings
from modelpack_engine.patches.corrections import Classes, corrected
from modelpack_engine.patches.mlx_lm_imports import kept_file_limit

_MODEL_TYPE = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


def read_config(files: ModelFiles) -> dict[str, Any]:
    """Return config.json. Raises `ModelLoadError` if it is missing or names no architecture."""
    config = files.json("config.json")
    if config is None:
        raise ModelLoadError(
            "the model has no config.json", hint="package it with its configuration files"
        )
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or not _MODEL_TYPE.fullmatch(model_type):
        raise ModelLoadError(f"config.json: model_type {str(model_type)[:100]!r} is not valid")
    if config.get("model_file") is not None:
        raise ModelLoadError(
            f"config.json: model_file is {str(config['model_file'])[:100]!r}; the code of models is"
            " never run"
        )
    return config


def load_safetensors(
    files: ModelFiles,
    config: Mapping[str, Any],
    *,
    classes: Classes | None = None,
    ignored_fields: Collection[str] = (),
) -> tuple[Module, dict[str, Any], Limits]:
    """Return the model, not evaluated, its config as mlx-lm completed it, and its limits.

    `classes` chooses the model's class and that of its arguments, in place of mlx-lm;
    `ignored_fields` of the config are not checked.

    Raises `ModelLoadError` for an architecture that mlx-lm does not have, for a field of the config
    that changes the output and that the class does not read, and for tensors that are missing,
    unknown or of the wrong shape; `WeightFormatError` for a damaged file.
    """
    bounds, names = read_headers(files)
    bounds.check(config)
    with kept_file_limit():
        from mlx_lm.utils import _get_classes, load_model

    config = with_tied_embeddings(normalised(config), names)
    try:
        _, arguments = (classes or _get_classes)(config)
    except (Exception, SystemExit) as error:  # mlx-lm's olmo exits if its package is missing
        raise _translated(error, str(config["model_type"])) from error
    limits = check_fields(config, arguments, ignored_fields)
    config = completed(config, arguments)

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
            with bounds.building("config.json"):
                model, made = load_model(
                    root,
                    lazy=True,
                    strict=True,
                    get_model_classes=classes or corrected(_get_classes),
                )
        except ModelpackError:
            raise
        except (Exception, SystemExit) as error:
            raise _translated(error, str(config["model_type"])) from error
    _check_weights(model)
    return model, made, limits


def read_headers(files: ModelFiles) -> tuple[TensorBounds, Collection[str]]:
    """Return the tensors' bounds and names; raise `ModelLoadError` for a tensor in two shards."""
    seen: dict[str, Path] = {}
    shapes: list[tuple[str, tuple[int, ...]]] = []
    for path in files.weights:
        for tensor in read_safetensors_header(path).tensors:
            if tensor.name in seen:
                raise ModelLoadError(f"{path}: {tensor.name!r} is in {seen[tensor.name].name} too")
            seen[tensor.name] = path
            shapes.append((tensor.name, tensor.shape))
    return TensorBounds.of(shapes), seen


def _check_weights(model: Module) -> None:
    """Raise `ModelLoadError` for fp8 weights without scales, which MLX reads as integers."""
    for path, module in model.named_modules():
        weight = module.get("weight")
        if not isinstance(weight, mx.array) or mx.issubdtype(weight.dtype, mx.floating):
            continue
        if "scales" not in module and "weight_scale" not in module:
            raise ModelLoadError(
                f"{path}.weight is quantised (stored as {str(weight.dtype).rpartition('.')[2]}),"
                " but has no scales",
                hint="convert the model again, or use weights that are not quantised",
            )


def _translated(error: BaseException, model_type: str) -> ModelLoadError:
    text = " ".join(str(error).split())
    if len(text) > 600:
        text = f"{text[:600]}…"
    if "not supported" in text and model_type in text:
        return ModelLoadError(
            f"the architecture {model_type!r} is not supported by the installed mlx-lm",
            hint="try a newer mlx-lm",
        )
    if not isinstance(error, ValueError):
        text = f"{type(error).__name__}: {text}"
    return ModelLoadError(f"cannot build mlx-lm's {model_type} from these files: {text}")
