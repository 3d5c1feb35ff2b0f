"""GGUF files as models of mlx-lm: `GGUFLoader`, and the threads that decode tensors.

numpy releases the GIL while it computes, so several threads decode a bounded number of bytes ahead;
only the caller's thread calls MLX.
"""

from __future__ import annotations

import importlib
import os
from collections import deque
from collections.abc import Collection, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any, cast

import mlx.core as mx
import numpy as np
import numpy.typing as npt
from mlx.nn.layers.base import Module
from mlx.nn.layers.quantized import quantize

from modelpack_engine.cpu import program
from modelpack_engine.cpu.weights import PackedWeights
from modelpack_engine.models import gguf_blocks, load_progress
from modelpack_engine.models.gguf_architectures import Config, Hyperparameters, architecture_of
from modelpack_engine.models.gguf_blocks import GROUP_SIZE
from modelpack_engine.models.gguf_file import GGUFFile, GGUFTensor
from modelpack_engine.models.load_budget import TensorBounds, checkpoint
from modelpack_engine.models.precision import (
    Precision,
    available_memory,
    check_parameters,
    named,
    shapes_of,
)
from modelpack_engine.patches.corrections import correct

#: The most decoded bytes that wait for MLX; with much free memory, a part of that memory.
MAX_AHEAD = 128 * 1024 * 1024
_AHEAD_PART = 128
_MAX_THREADS = 16
# Bytes of the file that stay in memory while weights are packed.
_MOST_MAPPED = 32 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class Packing:
    """How MLX holds a quantised weight: `bits` per code, and MLX's name of the mode."""

    bits: int
    mode: str = "affine"


@dataclass(frozen=True, slots=True)
class TensorPlan:
    """How a tensor becomes the parameters of a module.

    `path` and `parameter` name it in the model; `shift` is added to its values.
    """

    tensor: GGUFTensor
    path: str
    parameter: str
    packing: Packing | None = None
    shift: float = 0.0

    @property
    def decoded_bytes(self) -> int:
        """The approximate size of the decoded tensor."""
        packed = self.packing and gguf_blocks.affine_bits(self.tensor.dtype)
        return self.tensor.raw.size * 3 // 2 if packed else self.tensor.elements * 4


Decoded = dict[str, npt.NDArray[Any]]


def arrays_of(plans: Collection[TensorPlan], dtype: mx.Dtype) -> Iterator[tuple[str, mx.array]]:
    """Yield the name and array of each parameter; arrays that are not packed have `dtype`.

    Raises `ModelLoadError` for a type that is not supported.
    """
    with ThreadPoolExecutor(_threads(), thread_name_prefix="decode") as pool:
        waiting: deque[tuple[TensorPlan, Future[Decoded]]] = deque()
        ahead, limit = 0, max(MAX_AHEAD, (available_memory() or 0) // _AHEAD_PART)
        total, done = sum(item.tensor.raw.size for item in plans), 0

        def next_arrays() -> Iterator[tuple[str, mx.array]]:
            nonlocal ahead, done
            first, future = waiting.popleft()
            ahead -= first.decoded_bytes
            yield from _arrays(first, future.result(), dtype)
            done += first.tensor.raw.size
            load_progress.read(done / total if total else 1)

        for item in plans:
            waiting.append((item, pool.submit(_decode, item)))
            ahead += item.decoded_bytes
            while waiting and ahead > limit:
                yield from next_arrays()
        while waiting:
            yield from next_arrays()


def packing_of(dtype: str, *, requantize: bool) -> Packing | None:
    """Return how tensors of this type stay packed, or None if they are loaded dense."""
    if gguf_blocks.is_float(dtype):
        return None
    bits = gguf_blocks.affine_bits(dtype)
    if bits is not None:
        return Packing(bits)
    if dtype == "MXFP4":
        return Packing(4, "mxfp4")
    return Packing(8) if requantize else None


def _decode(item: TensorPlan) -> Decoded:
    """Decode a tensor to numpy arrays in their final shapes: its packed parts, or its values."""
    tensor = item.tensor
    *rows, columns = tensor.shape or (1,)
    groups = (*rows, columns // GROUP_SIZE)
    if item.packing and item.packing.mode == "mxfp4":
        words, exponents = gguf_blocks.mxfp4_blocks(tensor)
        return {"weight": words.reshape(*rows, -1), "scales": exponents.reshape(groups)}
    blocks = gguf_blocks.affine_blocks(tensor) if item.packing else None
    if blocks is not None:
        return {
            "weight": blocks.words().reshape(*rows, -1),
            "scales": blocks.scales.reshape(groups),
            "biases": blocks.biases.reshape(groups),
        }
    if item.shift or not gguf_blocks.is_float(tensor.dtype):
        return {"values": gguf_blocks.dense(tensor) + np.float32(item.shift)}
    return {"values": gguf_blocks.as_stored(tensor)}


def _arrays(item: TensorPlan, decoded: Decoded, dtype: mx.Dtype) -> Iterator[tuple[str, mx.array]]:
    values = decoded.get("values")
    if values is None:
        for name, part in decoded.items():
            array = mx.array(part)
            floating = mx.issubdtype(array.dtype, mx.floating)
            yield f"{item.path}.{name}", array.astype(dtype) if floating else array
        return
    array = mx.array(values)
    if array.dtype == mx.uint16:  # bfloat16, which numpy does not have
        array = array.view(mx.bfloat16)
    if item.packing is None:
        yield f"{item.path}.{item.parameter}", array.astype(dtype)
        return
    weight, scales, biases = mx.quantize(array, GROUP_SIZE, item.packing.bits)
    yield f"{item.path}.weight", weight
    yield f"{item.path}.scales", scales.astype(dtype)
    yield f"{item.path}.biases", biases.astype(dtype)


def _threads() -> int:
    affinity = getattr(os, "sched_getaffinity", None)
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    return min(cores, _MAX_THREADS)


_MAX_LAYERS = 10_000
# Tensors that are not parameters of the model: they configure its rotary embedding.
_ROPE_FREQS = "rope_freqs.weight"
_ROPE_FACTORS = {
    "rope_factors_long.weight": "long_factor",
    "rope_factors_short.weight": "short_factor",
}


class GGUFLoader:
    """Loads one GGUF model. Raises `ModelLoadError`, naming the cause, for errors in the file."""

    def __init__(self, file: GGUFFile) -> None:
        self.file = file
        self._error = file.metadata.error
        self.name, self.architecture = architecture_of(file.metadata)
        self.config: Config = self.architecture.config(
            Hyperparameters(self.name, file.metadata, file)
        )
        self._check_layers()
        self._add_rope_factors()
        self._targets = self._find_targets()

    @property
    def dense_elements(self) -> int:
        """The number of weights in all tensors."""
        return sum(self.file[name].elements for name in self._targets)

    def load(self, precision: Precision) -> Module:
        """Return the model with its weights, which MLX may not have evaluated yet."""
        model: Any = self._build()
        modules = dict(model.named_modules())
        plans = [
            self._plan(self.file[name], path, parameter, modules.get(path), precision)
            for name, (path, parameter) in self._targets.items()
        ]
        packed = {
            plan.path: {"group_size": GROUP_SIZE, **asdict(plan.packing)}
            for plan in plans
            if plan.packing
        }
        if packed:
            quantize(model, class_predicate=lambda path, _: packed.get(path, False))
        # Not strict, because `_build` has compared names and shapes.
        model.load_weights(list(arrays_of(plans, precision.dtype)), strict=False)
        self._set_rope_frequencies(model)
        return cast(Module, model)

    def skeleton(self) -> Module | None:
        """Return the model without weights if the library for CPUs can run it, else None."""
        model = self._build()
        self._set_rope_frequencies(model)
        if not program.can_run(model):
            return None
        model.set_dtype(mx.float16)  # that of keys and values
        return model

    def packed(self) -> PackedWeights:
        """Return all weights, packed as they are stored."""
        packed, mapped, done = PackedWeights(), 0, 0
        total = sum(self.file[name].raw.size for name in self._targets)
        for name, (path, parameter) in self._targets.items():
            checkpoint()
            tensor = self.file[name]
            packed.add_tensor(f"{path}.{parameter}", tensor, gguf_blocks.dense)
            if self.architecture.shifted_norms and path.endswith("norm"):
                packed.vectors[f"{path}.{parameter}"] -= 1
            done += tensor.raw.size
            mapped += tensor.raw.size
            if mapped > _MOST_MAPPED:
                self.file.release()
                mapped = 0
            load_progress.read(done / total)
        self.file.release()
        return packed

    def _plan(
        self, tensor: GGUFTensor, path: str, parameter: str, module: Any, precision: Precision
    ) -> TensorPlan:
        packing = None
        if not precision.dense and parameter == "weight" and hasattr(module, "to_quantized"):
            packing = packing_of(tensor.dtype, requantize=precision.requantize)
        shifted = self.architecture.shifted_norms and path.endswith("norm")
        return TensorPlan(tensor, path, parameter, packing, -1.0 if shifted else 0.0)

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
            raise self._error(f"cannot build {model_type} from its metadata: {error}") from error
        got = {".".join(target): self.file[name].shape for name, target in self._targets.items()}
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
                f"the metadata name {layers} layers, but the tensors are of {len(numbers)}",
                hint="package the complete file, or all shards of the model",
            )

    def _find_targets(self) -> dict[str, tuple[str, str]]:
        """Return the path of the module, and the name of the parameter, of each tensor."""
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
                targets[name] = found
        if unknown:
            raise self._error(
                f"{self.name} has no such tensors: {named(unknown)}",
                hint="load another model: this variant of the architecture is not supported",
            )
        return targets

    @property
    def _has_llama3_rope(self) -> bool:
        scaling = self.config.get("rope_scaling") or {}
        return scaling.get("rope_type") == "llama3" and _ROPE_FREQS in self.file

    def _add_rope_factors(self) -> None:
        """Copy phi3's rope factors from tensors to the config, where mlx-lm reads them."""
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
        """Replace the frequencies of llama3's rope by those computed from the file's factors."""
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
