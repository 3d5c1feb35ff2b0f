"""Loads GGUF files into mlx-lm models.

The names and shapes of all tensors are compared with those of the model before any data is read.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any, cast

import mlx.core as mx
import numpy as np
from mlx.nn.layers.base import Module
from mlx.nn.layers.quantized import quantize

from modelpack_engine.errors import ModelLoadError
from modelpack_engine.loaders import gguf_blocks
from modelpack_engine.loaders.corrections import correct
from modelpack_engine.loaders.gguf_architectures import (
    Config,
    Hyperparameters,
    architecture_of,
)
from modelpack_engine.loaders.gguf_arrays import Wanted, arrays_of, packing_of
from modelpack_engine.loaders.gguf_file import GGUFFile
from modelpack_engine.loaders.parameters import check_parameters, named, shapes_of
from modelpack_engine.loaders.precision import Precision
from modelpack_engine.loaders.tensor_bounds import TensorBounds

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
        wanted = [
            self._wanted(name, target, modules.get(target.path), precision)
            for name, target in self._targets.items()
        ]
        packed = {item.path: item.packing for item in wanted if item.packing}
        if packed:
            quantize(
                model,
                class_predicate=lambda path, _: path in packed and packed[path].options(),
            )
        # Names and shapes have been compared.
        model.load_weights(list(arrays_of(wanted, precision.dtype)), strict=False)
        self._set_rope_frequencies(model)
        return cast(Module, model)

    def _wanted(self, name: str, target: _Target, module: Any, precision: Precision) -> Wanted:
        tensor = self.file[name]
        packing = None
        if not precision.dense and target.parameter == "weight" and hasattr(module, "to_quantized"):
            packing = packing_of(tensor.dtype, requantize=precision.requantize)
        shifted = self.architecture.shifted_norms and target.path.endswith("norm")
        return Wanted(tensor, target.path, target.parameter, packing, -1.0 if shifted else 0.0)

    def _build(self) -> Module:
        model_type = self.config["model_type"]
        module = importlib.import_module(f"mlx_lm.models.{model_type}")
        bounds = TensorBounds.of((name, self.file[name].shape) for name in self.file.names)
        what = str(self.file.metadata.path)
        bounds.check(self.config, what)
        try:
            with bounds.building(what):
                model: Module = module.Model(module.ModelArgs.from_dict(self.config))
                correct(model, self.config)
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

    def _error(self, message: str, *, hint: str | None = None) -> ModelLoadError:
        return self.file.metadata.error(message, hint=hint)
