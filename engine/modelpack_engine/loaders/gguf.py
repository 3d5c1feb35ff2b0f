"""Loads GGUF files into unmodified mlx-lm models.

The names and shapes of all tensors are compared with those of the model before any data is read.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import mlx.core as mx
import numpy as np
from mlx.nn.layers.base import Module
from mlx.nn.layers.quantized import quantize

from modelpack_engine.errors import ModelLoadError
from modelpack_engine.loaders import gguf_blocks
from modelpack_engine.loaders.gguf_architectures import (
    Config,
    Hyperparameters,
    architecture_of,
)
from modelpack_engine.loaders.gguf_blocks import GROUP_SIZE
from modelpack_engine.loaders.gguf_file import GGUFFile, GGUFTensor
from modelpack_engine.loaders.parameters import check_parameters, named, shapes_of
from modelpack_engine.loaders.precision import Precision

_MAX_LAYERS = 10_000
# Not parameters of a model: they say how its rope turns.
_ROPE_FREQS = "rope_freqs.weight"
_ROPE_FACTORS = {
    "rope_factors_long.weight": "long_factor",
    "rope_factors_short.weight": "short_factor",
}


@dataclass(frozen=True, slots=True)
class _Target:
    """The parameter that a tensor becomes."""

    path: str
    parameter: str
    shape: tuple[int, ...]

    @property
    def name(self) -> str:
        return f"{self.path}.{self.parameter}"


@dataclass(frozen=True, slots=True)
class _Packing:
    """How the weight of a module is quantised."""

    bits: int
    mode: str = "affine"

    def options(self) -> dict[str, Any]:
        return {"group_size": GROUP_SIZE, "bits": self.bits, "mode": self.mode}


class GGUFLoader:
    """Loads one model. Raises `ModelLoadError` that names what is wrong with the file."""

    def __init__(self, file: GGUFFile) -> None:
        self.file = file
        self.name, self.architecture = architecture_of(file.metadata)
        self.config: Config = self.architecture.config(
            Hyperparameters(self.name, file.metadata, file)
        )
        self._check_layers()
        self._add_rope_factors()
        self._targets = self._find_targets()

    @property
    def dense_elements(self) -> int:
        """The number of all weights."""
        return sum(self.file[name].elements for name in self._targets)

    def load(self, precision: Precision) -> Module:
        """Return the model with its weights, not yet evaluated where MLX is lazy."""
        model: Any = self._build()
        modules = dict(model.named_modules())
        packings = {}
        for name, target in self._targets.items():
            packing = _packing(self.file[name], modules.get(target.path), precision)
            if packing and target.parameter == "weight":
                packings[target.path] = packing
        if packings:
            quantize(
                model,
                class_predicate=lambda path, _: path in packings and packings[path].options(),
            )
        weights: list[tuple[str, mx.array]] = []
        for name, target in self._targets.items():
            packing = packings.get(target.path) if target.parameter == "weight" else None
            weights += self._arrays(self.file[name], target, packing, precision)
        model.load_weights(weights, strict=False)  # names and shapes have been compared
        self._set_rope_frequencies(model)
        return cast(Module, model)

    def _build(self) -> Module:
        model_type = self.config["model_type"]
        module = importlib.import_module(f"mlx_lm.models.{model_type}")
        try:
            model: Module = module.Model(module.ModelArgs.from_dict(self.config))
        except (ArithmeticError, IndexError, TypeError, ValueError) as error:
            raise self._error(f"its metadata make no {model_type} model: {error}") from error
        got = {target.name: target.shape for target in self._targets.values()}
        if hasattr(model, "sanitize"):  # may drop the output layer of a model with tied embeddings
            model.sanitize({name: mx.zeros(shape) for name, shape in got.items()})
        check_parameters(self.file.metadata.path, shapes_of(model), got)
        return model

    def _check_layers(self) -> None:
        layers = self.config["num_hidden_layers"]
        numbers = {
            int(parts[1])
            for name in self.file.names
            if (parts := name.split("."))[0] == "blk" and len(parts) > 1 and parts[1].isdecimal()
        }
        if not 0 < layers <= _MAX_LAYERS or numbers != set(range(layers)):
            raise self._error(
                f"the metadata say {layers} layers, the tensors are of {len(numbers)}",
                hint="the file is incomplete, or a shard of a larger model",
            )

    def _find_targets(self) -> dict[str, _Target]:
        targets, unknown = {}, []
        for name in self.file.names:
            if name == _ROPE_FREQS and self._has_llama3_rope:
                continue
            if name in _ROPE_FACTORS and self.name == "phi3":
                continue
            found = self.architecture.module_path(name)
            if found is None:
                unknown.append(name)
            else:
                targets[name] = _Target(*found, self.file[name].shape)
        if unknown:
            raise self._error(
                f"tensors that {self.name} has no place for: {named(unknown)}",
                hint="it may be a variant of the architecture that is not supported",
            )
        return targets

    @property
    def _has_llama3_rope(self) -> bool:
        scaling = self.config.get("rope_scaling") or {}
        return scaling.get("rope_type") == "llama3" and _ROPE_FREQS in self.file

    def _add_rope_factors(self) -> None:
        """Give phi3 its rope factors, which are tensors in a file and part of the config in MLX."""
        there = [name for name in _ROPE_FACTORS if name in self.file]
        if self.name != "phi3" or not there:
            return
        if len(there) < len(_ROPE_FACTORS):
            raise self._error(f"has {there[0]!r} only, expected long and short rope factors")
        scaling: Config = {"type": "longrope", "rope_type": "longrope"}
        for name, key in _ROPE_FACTORS.items():
            scaling[key] = gguf_blocks.dense(self.file[name]).tolist()
        rotated = int(self.config["head_dim"] * self.config["partial_rotary_factor"])
        if any(len(scaling[key]) != rotated // 2 for key in _ROPE_FACTORS.values()):
            raise self._error(f"expected {rotated // 2} rope factors")
        self.config["rope_scaling"] = scaling

    def _set_rope_frequencies(self, model: Any) -> None:
        """Replace the frequencies of llama3's rope by those that the file's factors give."""
        if not self._has_llama3_rope:
            return
        head_dim = self.config["head_dim"]
        factors = gguf_blocks.dense(self.file[_ROPE_FREQS]).reshape(-1)
        if len(factors) != head_dim // 2:
            raise self._error(f"expected {head_dim // 2} rope factors, got {len(factors)}")
        exponents = np.arange(0, head_dim, 2, dtype=np.float32) / head_dim
        frequencies = mx.array(np.float32(self.config["rope_theta"]) ** exponents * factors)
        for layer in model.layers:
            layer.self_attn.rope._freqs = frequencies

    def _arrays(
        self, tensor: GGUFTensor, target: _Target, packing: _Packing | None, precision: Precision
    ) -> Iterator[tuple[str, mx.array]]:
        *rows, columns = tensor.shape if tensor.shape else (1,)
        if packing is None:
            values = gguf_blocks.dense(tensor)
            if self.architecture.shifted_norms and target.path.endswith("norm"):
                values = values - 1
            yield target.name, mx.array(values).astype(precision.dtype)
            return
        prefix, groups = target.path, columns // GROUP_SIZE
        blocks = gguf_blocks.affine_blocks(tensor)
        if blocks is not None:
            yield f"{prefix}.weight", mx.array(blocks.words().reshape(*rows, -1))
            for name, values in (("scales", blocks.scales), ("biases", blocks.biases)):
                array = mx.array(values.reshape(*rows, groups))
                yield f"{prefix}.{name}", array.astype(precision.dtype)
        elif packing.mode == "mxfp4":
            words, exponents = gguf_blocks.mxfp4_blocks(tensor)
            yield f"{prefix}.weight", mx.array(words.reshape(*rows, -1))
            yield f"{prefix}.scales", mx.array(exponents.reshape(*rows, groups))
        else:
            unpacked = mx.array(gguf_blocks.dense(tensor))
            weight, scales, biases = mx.quantize(unpacked, GROUP_SIZE, packing.bits)
            yield f"{prefix}.weight", weight
            yield f"{prefix}.scales", scales.astype(precision.dtype)
            yield f"{prefix}.biases", biases.astype(precision.dtype)

    def _error(self, message: str, *, hint: str | None = None) -> ModelLoadError:
        return self.file.metadata.error(message, hint=hint)


def _packing(tensor: GGUFTensor, module: Any, precision: Precision) -> _Packing | None:
    """Return how the module is to hold the tensor packed, or None if dense."""
    if precision.dense or module is None or not hasattr(module, "to_quantized"):
        return None
    if gguf_blocks.is_float(tensor.dtype):
        return None
    bits = gguf_blocks.affine_bits(tensor.dtype)
    if bits is not None:
        return _Packing(bits)
    if tensor.dtype == "MXFP4":
        return _Packing(4, "mxfp4")
    return _Packing(8) if precision.requantize else None
