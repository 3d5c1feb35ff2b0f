"""Quantise a directory of safetensors with mlx-lm's quantiser."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import mlx.core as mx
from mlx.utils import tree_flatten

from modelpack.builder.classify import WEIGHT_KINDS, classify
from modelpack.builder.files import Found, walk
from modelpack.errors import UsageError
from modelpack.formats.shards import INDEX_SUFFIX
from modelpack_engine.errors import ModelLoadError
from modelpack_engine.models.files import ModelFiles
from modelpack_engine.models.safetensors import load_safetensors, read_config
from modelpack_engine.patches import mlx_lm_imports

#: Weights per scale: mlx-lm's default, which the models of mlx-community have.
GROUP_SIZE: Final = 64
#: The approximate limit of one weight file in bytes: mlx-lm's limit of 5 GB.
SHARD_BYTES: Final = 5 << 30
#: The values of `--quantize`: bits per weight.
BITS: Final = (4, 8)


@dataclass(frozen=True, slots=True)
class Quantized:
    """The result: `modules` have `bits` per weight; `before` and `after` are bytes of weights."""

    bits: int
    modules: int
    before: int
    after: int


def quantize_directory(
    source: Path,
    target: Path,
    *,
    bits: int,
    follow_symlinks: bool = False,
    progress: Callable[[int, int], None] = lambda _made, _total: None,
) -> Quantized:
    """Quantise the model in `source` to `bits` (4 or 8) per weight, in an empty directory.

    Other files are copied. The same files and versions of MLX give the same bytes. `progress` gets
    the bytes of quantised weights that are made, and of all. Raises
    `UsageError` for weights that are not safetensors or are quantised already, and `ModelLoadError`
    for an architecture that mlx-lm does not have.
    """
    if bits not in BITS:
        raise UsageError(f"bits per weight is {bits}, expected 4 or 8")
    files = ModelFiles.from_directory(source)
    if files.format != "safetensors":
        raise UsageError(
            f"{source}: only safetensors can be quantised, but these weights are {files.format}",
            hint="use llama-quantize of llama.cpp for GGUF",
        )
    config = read_config(files)
    for key in ("quantization", "quantization_config"):
        if config.get(key):
            raise UsageError(f"{source}: the model is quantised already: config.json has {key!r}")
    before = sum(path.stat().st_size for path in files.weights)
    with redirect_stdout(io.StringIO()):  # mlx-lm prints to it
        model, config, _ = load_safetensors(files, config)
        utils = mlx_lm_imports.utils()
        model, config = utils.quantize_model(model, config, GROUP_SIZE, bits)
    flat: Any = tree_flatten(model.parameters())
    weights: dict[str, Any] = dict(sorted(flat))
    modules = sum(name.endswith(".scales") for name in weights)
    if not modules:
        raise ModelLoadError(
            f"{source}: no module is wide enough to be quantised in groups of {GROUP_SIZE}"
        )
    target.mkdir(parents=True, exist_ok=True)
    _copy_others(source, target, follow_symlinks)
    # As mlx-lm's own `save` does.
    keeps_vision = "vision_tower" in getattr(model, "model", {})
    utils.save_config(config, target / "config.json", keep_vision_config=keeps_vision)
    after = _save(weights, target, progress)
    return Quantized(bits, modules, before, after)


def _save(weights: dict[str, Any], target: Path, progress: Callable[[int, int], None]) -> int:
    shards = _shards(weights)
    total = sum(array.nbytes for array in weights.values())
    made = 0
    where: dict[str, str] = {}
    size = 0
    for number, names in enumerate(shards, start=1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        path = target / (name if len(shards) > 1 else "model.safetensors")
        shard = {key: weights.pop(key) for key in names}
        for array in shard.values():
            mx.eval(array)  # reads and quantises one weight; saving would do all of them at once
            made += array.nbytes
            progress(made, total)
        mx.save_safetensors(str(path), shard, metadata={"format": "mlx"})
        where |= dict.fromkeys(names, path.name)
        size += path.stat().st_size
    if len(shards) > 1:
        index = {"metadata": {"total_size": size}, "weight_map": where}
        (target / f"model{INDEX_SUFFIX}").write_text(json.dumps(index, indent=2) + "\n")
    return size


def _shards(weights: dict[str, Any]) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    size = 0
    for name, array in weights.items():
        if shards[-1] and size + array.nbytes > SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += array.nbytes
    return shards


def _copy_others(source: Path, target: Path, follow_symlinks: bool) -> None:
    for found in walk(source, follow_symlinks=follow_symlinks):
        if not isinstance(found, Found) or found.filepath.endswith(INDEX_SUFFIX):
            continue
        at_top = "/" not in found.filepath
        if at_top and classify(found.filepath) in WEIGHT_KINDS:
            continue
        copy = target / found.filepath
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(found.path, copy)
