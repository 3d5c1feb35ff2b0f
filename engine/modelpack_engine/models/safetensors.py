"""Load safetensors through mlx-lm's loader, so that all of its quantisations work.

mlx-lm expects a directory with known file names, but blobs are named by digest. It therefore gets a
temporary directory of links, and a config that runs none of the model's code. `open_packable` is
for the library for CPUs: it builds the model without weights, and maps the files.
"""

from __future__ import annotations

import importlib
import json
import mmap
import re
import tempfile
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.nn.layers.base import Module
from mlx.utils import tree_unflatten

from modelpack.errors import ModelpackError
from modelpack.formats.adapter import Adapter
from modelpack.formats.config_json import without_speech
from modelpack.formats.safetensors import read_safetensors_header
from modelpack_engine.cpu import program
from modelpack_engine.cpu.library import AFFINE_BITS, GROUP
from modelpack_engine.cpu.weights import PackedWeights, StoredAffine, StoredArray
from modelpack_engine.errors import ModelLoadError
from modelpack_engine.models import load_progress
from modelpack_engine.models.adapter import merged_weight, read_layers
from modelpack_engine.models.config_guard import Limits, check_fields
from modelpack_engine.models.files import ModelFiles, decode_object
from modelpack_engine.models.load_budget import TensorBounds, checkpoint
from modelpack_engine.models.model_config import completed, normalised, with_tied_embeddings
from modelpack_engine.models.precision import shapes_of
from modelpack_engine.patches import mlx_lm_imports
from modelpack_engine.patches.corrections import Classes, corrected
from modelpack_engine.patches.lora import Layers, Matrices
from modelpack_engine.vision.models import WHOLE_TYPES

_MODEL_TYPE = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


def read_config(files: ModelFiles) -> dict[str, Any]:
    """Return config.json, without the parts of a model that speaks.

    Raises `ModelLoadError` if it is missing or names no architecture.
    """
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
    return dict(without_speech(config))


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
    utils = mlx_lm_imports.utils()
    choose = classes or utils._get_classes
    bounds, config, limits = _prepared(files, config, choose, ignored_fields)
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
                model, made = utils.load_model(
                    root,
                    lazy=True,
                    strict=True,
                    get_model_classes=classes or corrected(choose),
                )
        except ModelpackError:
            raise
        except (Exception, SystemExit) as error:
            raise _translated(error, str(config["model_type"])) from error
    _check_weights(model)
    return model, made, limits


def _prepared(
    files: ModelFiles, config: Mapping[str, Any], classes: Classes, ignored: Collection[str]
) -> tuple[TensorBounds, dict[str, Any], Limits]:
    """Return the tensors' bounds, and the checked config in the spelling of mlx-lm's class."""
    bounds, names = read_headers(files)
    bounds.check(config)
    if config["model_type"] in WHOLE_TYPES:
        bounds.check(config["vision_config"], "config.json: vision_config")
    config = with_tied_embeddings(normalised(config), names)
    try:
        _, arguments = classes(config)
    except (Exception, SystemExit) as error:  # mlx-lm's olmo exits if its package is missing
        raise _translated(error, str(config["model_type"])) from error
    limits = check_fields(config, arguments, ignored)
    return bounds, completed(config, arguments), limits


# The types of tensors that the library for CPUs reads; U32 has codes.
_TYPES = {"F32": mx.float32, "F16": mx.float16, "BF16": mx.bfloat16, "U32": mx.uint32}
# Bytes of the files that stay in memory while weights are packed.
_MOST_MAPPED = 32 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class PackableModel:
    """A model of shapes only, and its weights in files, which the library for CPUs can read."""

    model: Module
    config: dict[str, Any]
    limits: Limits
    _arrays: Mapping[str, StoredArray | StoredAffine]
    _maps: tuple[mmap.mmap, ...]

    def pack(self, adapter: Adapter | None = None) -> PackedWeights:
        """Return all weights, packed from the mapped files, with an adapter merged.

        Raises `AdapterError` for one that does not fit the model.
        """
        packed, mapped, done = PackedWeights(), 0, 0
        total = sum(array.nbytes for array in self._arrays.values())
        layers = {} if adapter is None else self._layers(adapter)
        for name, array in self._arrays.items():
            checkpoint()
            one = layers.get(name.removesuffix(".weight"))
            packed.add_stored(name, array if one is None else _merged(name, array, one))
            done += array.nbytes
            mapped += array.nbytes
            if mapped > _MOST_MAPPED or done == total:
                for each in self._maps:
                    if hasattr(mmap, "MADV_DONTNEED"):
                        each.madvise(mmap.MADV_DONTNEED)
                mapped = 0
            load_progress.read(done / total)
        return packed

    def _layers(self, adapter: Adapter) -> Layers:
        def weight_of(path: str, module: Any) -> mx.array:
            return self._arrays[f"{path}.weight"].dense()

        return read_layers(adapter, self.model, self.config, dtype=mx.float32, weight_of=weight_of)


def _merged(name: str, array: StoredArray | StoredAffine, one: Matrices) -> StoredArray:
    is_embedding = name.endswith("embed_tokens.weight")
    weight = merged_weight(array.dense(), one, is_embedding=is_embedding)
    return StoredArray.of(weight.astype(array.dtype))


def open_packable(
    files: ModelFiles, config: Mapping[str, Any], *, ignored_fields: Collection[str] = ()
) -> PackableModel | None:
    """Return a model whose weights the library for CPUs reads as they are stored; None for others.

    mlx-lm's loader is not imported: with transformers, that takes a second. Errors are those of
    `load_safetensors`; tensors that do not match the model are left to it.
    """
    kind = str(config["model_type"])
    kind = program.OTHER_NAMES.get(kind, kind)
    if kind not in program.MODELS or _is_in_other_codes(files, config):
        return None
    module: Any = importlib.import_module(f"mlx_lm.models.{kind}")
    classes = corrected(lambda _: (module.Model, module.ModelArgs))
    bounds, config, limits = _prepared(files, config, classes, ignored_fields)
    if (mapped := _mapped(files)) is None:
        return None
    arrays, maps = mapped
    try:
        with bounds.building("config.json"):
            model: Any = classes(config)[0](module.ModelArgs.from_dict(config))
    except ModelpackError:
        raise
    except (Exception, SystemExit) as error:
        raise _translated(error, kind) from error
    given = {name: mx.zeros(array.shape, array.dtype) for name, array in arrays.items()}
    kept = model.sanitize(dict(given)) if hasattr(model, "sanitize") else given
    if any(given.get(name) is not array for name, array in kept.items()):
        return None
    shapes = shapes_of(model)
    stored = _with_affine({name: arrays[name] for name in kept}, shapes)
    if {name: array.shape for name, array in stored.items()} != shapes:
        return None
    zeros = [(name, mx.zeros(array.shape, array.dtype)) for name, array in stored.items()]
    model.update(tree_unflatten(zeros))
    if not program.can_run(model):
        return None
    return PackableModel(model, config, limits, stored, maps)


def _is_in_other_codes(files: ModelFiles, config: Mapping[str, Any]) -> bool:
    """Return whether a config describes quantised weights other than those of mlx-lm."""
    if config.get("quantization"):
        return False
    return bool(config.get("quantization_config")) or files.read("hf_quant_config.json") is not None


def _with_affine(
    arrays: Mapping[str, StoredArray], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, StoredArray | StoredAffine]:
    """Return the arrays, those of MLX's affine codes joined as the weights of these `shapes`."""
    joined: dict[str, StoredArray | StoredAffine] = dict(arrays)
    for name, scales in arrays.items():
        path, _, part = name.rpartition(".")
        weight = f"{path}.weight"
        codes, biases = arrays.get(weight), arrays.get(f"{path}.biases")
        shape = shapes.get(weight, ())
        if part != "scales" or codes is None or biases is None or len(shape) != 2:
            continue
        rows, columns = shape
        groups = scales.shape[-1] if scales.shape else 0
        same = (biases.shape, biases.dtype) == (scales.shape, scales.dtype)
        bits = codes.raw.nbytes * 8 // max(1, rows * columns)
        if (
            same
            and groups > 0
            and scales.shape == (rows, groups)
            and columns % (groups * GROUP) == 0
            and codes.shape == (rows, columns * bits // 32)
            and bits in AFFINE_BITS
        ):
            size = columns // groups
            joined[weight] = StoredAffine(bits, size, shape, codes, scales, biases)
            del joined[name], joined[f"{path}.biases"]
    return joined


def _mapped(files: ModelFiles) -> tuple[dict[str, StoredArray], tuple[mmap.mmap, ...]] | None:
    """Map the files, and return the arrays in them; None for types that the library lacks."""
    arrays: dict[str, StoredArray] = {}
    maps: list[mmap.mmap] = []
    for path in files.weights:
        header = read_safetensors_header(path)
        if header.file_size == header.data_offset:  # no tensors
            continue
        with path.open("rb") as file:
            maps.append(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        data = np.frombuffer(maps[-1], np.uint8)[header.data_offset :]
        for tensor in header.tensors:
            if (dtype := _TYPES.get(tensor.dtype)) is None:
                return None
            raw = data[tensor.offset : tensor.offset + tensor.size]
            arrays[tensor.name] = StoredArray(dtype, tensor.shape, raw)
    return arrays, tuple(maps)


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


def speech_bytes(files: ModelFiles) -> int:
    """Return the bytes of the tensors with which Qwen-Omni speaks: they are not loaded."""
    if "thinker_config" not in (files.json("config.json") or {}):
        return 0
    return sum(
        tensor.size
        for path in files.weights
        for tensor in read_safetensors_header(path).tensors
        if tensor.name.startswith(("talker.", "code2wav."))
    )


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
