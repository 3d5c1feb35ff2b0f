"""GGUF files as models of mlx-lm: `GGUFLoader`, and the threads that decode tensors.

Where the precision allows, weights keep their block types (`layers.blocks`); otherwise they go to
MLX's layouts, in 8 bits if no layout of MLX has their codes.

numpy releases the GIL while it computes, so several threads decode a bounded number of bytes ahead;
only the caller's thread calls MLX.
"""

from __future__ import annotations

import importlib
import os
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from typing import Any, cast

import mlx.core as mx
import numpy as np
import numpy.typing as npt
from mlx.nn.layers.base import Module
from mlx.nn.layers.embedding import Embedding
from mlx.nn.layers.linear import Linear
from mlx.nn.layers.quantized import quantize
from mlx.utils import tree_unflatten
from mlx_lm.models.switch_layers import SwitchLinear

from modelpack.formats.adapter import Adapter
from modelpack_engine.cpu import program
from modelpack_engine.cpu.weights import PackedWeights
from modelpack_engine.layers.blocks import BlockType, layer_of
from modelpack_engine.models import gguf_blocks, load_progress, planes
from modelpack_engine.models.adapter import merged_weight, read_layers
from modelpack_engine.models.gguf_architectures import Targets, architecture_of
from modelpack_engine.models.gguf_blocks import GROUP_SIZE, AffineBlocks
from modelpack_engine.models.gguf_file import GGUFFile, GGUFTensor
from modelpack_engine.models.gguf_hyperparameters import Config, Hyperparameters
from modelpack_engine.models.gguf_tensors import Parameter, Source
from modelpack_engine.models.load_budget import TensorBounds, checkpoint
from modelpack_engine.models.precision import (
    Precision,
    check_parameters,
    named,
    shapes_of,
)
from modelpack_engine.patches.corrections import corrected
from modelpack_engine.patches.lora import Layers, Matrices
from modelpack_engine.platform.device import available_memory

#: The most decoded bytes that wait for MLX; with much free memory, a part of that memory.
MAX_AHEAD = 128 * 1024 * 1024
_AHEAD_PART = 128
_MAX_THREADS = 16
# The types of weights that an adapter is merged into; quantised ones become F16.
_MERGED_TYPES = {"F32": mx.float32, "F16": mx.float16, "BF16": mx.bfloat16}
# Bytes of the file that stay in memory while weights are packed.
_MOST_MAPPED = 32 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class Packing:
    """How MLX holds a quantised weight: `bits` per code, and MLX's name of the mode."""

    bits: int
    mode: str = "affine"


@dataclass(frozen=True, slots=True)
class TensorPlan:
    """A parameter to decode, and how it is held: in a layout of MLX, in blocks, or as floats."""

    parameter: Parameter
    packing: Packing | None = None
    blocks: BlockType | None = None

    @property
    def decoded_bytes(self) -> int:
        """The approximate memory for decoding the parameter: by measurement of its peak.

        Codes take a byte each while they move. Two arrays of them exist at once for layouts of MLX,
        and one more if columns are reordered or tensors joined. Two arrays of floats exist where
        tensors are joined as such. MLX moves the codes of blocks: of these, there are the file's
        bytes, and three times those of tensors that are joined.
        """
        parameter = self.parameter
        stored, elements = parameter.stored_bytes, parameter.elements
        moves = parameter.columns is not None or len(parameter.sources) > 1
        if self.blocks:
            return (3 if len(parameter.sources) > 1 else 1) * stored
        packed = self.packing and gguf_blocks.affine_bits(parameter.dtype) is not None
        return (2 + moves) * elements if packed else (4 + 4 * moves) * elements

    def held_bytes(self, dtype: mx.Dtype) -> int:
        """The bytes of the parameter in memory, where floats and scales have a type."""
        elements = self.parameter.elements
        if self.blocks is not None:
            inputs = self.parameter.shape[-1]
            return elements // inputs * self.blocks.words(inputs) * 4
        if self.packing is None:
            return elements * dtype.size
        scales = 1 if self.packing.mode == "mxfp4" else 2 * dtype.size
        return elements * self.packing.bits // 8 + elements // GROUP_SIZE * scales


#: Layers whose weights can be held as stored.
_KEPT_LAYERS = (Linear, Embedding, SwitchLinear)

Decoded = dict[str, npt.NDArray[Any]]


def arrays_of(
    plans: Collection[TensorPlan], dtype: mx.Dtype, casts: Callable[[str], bool] = lambda name: True
) -> Iterator[tuple[str, mx.array]]:
    """Yield the name and array of each parameter.

    Arrays that are not packed have `dtype`, or if `casts` is false for their names, the type in the
    file. Raises `ModelLoadError` for a type that is not supported.
    """
    with ThreadPoolExecutor(_threads(), thread_name_prefix="decode") as pool:
        waiting: deque[tuple[TensorPlan, Future[Decoded | GGUFTensor]]] = deque()
        ahead, limit = 0, max(MAX_AHEAD, available_memory() // _AHEAD_PART)
        total, done = sum(item.parameter.stored_bytes for item in plans), 0

        def next_arrays() -> Iterator[tuple[str, mx.array]]:
            nonlocal ahead, done
            first, future = waiting.popleft()
            ahead -= first.decoded_bytes
            for name, array in _arrays(first, future.result()):
                floating = mx.issubdtype(array.dtype, mx.floating) and casts(name)
                held = array.astype(dtype) if floating else array
                del array
                mx.eval(held)  # what it is made of, often float32, would stay in memory
                yield name, held
            done += first.parameter.stored_bytes
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


def _decode(item: TensorPlan) -> Decoded | GGUFTensor:
    """Decode a tensor to numpy arrays in their final shapes: its packed parts, or its values.

    A tensor that stays in blocks is only read.
    """
    if item.packing and item.parameter.mixed_bits is not None:
        return _packed(item.parameter.mixed_blocks(), item.parameter.shape)
    tensor = item.parameter.read()
    if item.blocks is not None:
        of_file = np.may_share_memory(tensor.raw, item.parameter.sources[0].tensor.raw)
        return replace(tensor, raw=np.array(tensor.raw)) if of_file else tensor
    if item.packing and item.packing.mode == "mxfp4":
        words, exponents = gguf_blocks.mxfp4_blocks(tensor)
        rows = tensor.shape[:-1]
        return {"weight": words.reshape(*rows, -1), "scales": exponents.reshape(*rows, -1)}
    blocks = gguf_blocks.affine_blocks(tensor) if item.packing else None
    if blocks is not None:
        return _packed(blocks, tensor.shape)
    if not gguf_blocks.is_float(tensor.dtype):
        return {"values": gguf_blocks.dense(tensor)}
    return {"values": gguf_blocks.as_stored(tensor)}


def _packed(blocks: AffineBlocks, shape: tuple[int, ...]) -> Decoded:
    parts = {"weight": blocks.words(), "scales": blocks.scales, "biases": blocks.biases}
    return {name: part.reshape(*shape[:-1], -1) for name, part in parts.items()}


def _arrays(item: TensorPlan, decoded: Decoded | GGUFTensor) -> Iterator[tuple[str, mx.array]]:
    path = item.parameter.path
    if isinstance(decoded, GGUFTensor):
        assert item.blocks is not None
        yield f"{path}.weight", planes.of_blocks(decoded, item.blocks)
        return
    values = decoded.get("values")
    if values is None:
        for name, part in decoded.items():
            yield f"{path}.{name}", mx.array(part)
        return
    array = mx.array(values)
    if array.dtype == mx.uint16:  # bfloat16, which numpy does not have
        array = array.view(mx.bfloat16)
    if item.packing is None:
        yield f"{path}.{item.parameter.name}", array
        return
    quantised = mx.quantize(array, GROUP_SIZE, item.packing.bits)
    yield from zip((f"{path}.weight", f"{path}.scales", f"{path}.biases"), quantised, strict=True)


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
    """Loads one GGUF model. Raises `ModelLoadError`, naming the cause, for errors in the file.

    `with_pictures` chooses classes whose tokens have a position on each axis of a picture, where an
    architecture has one.
    """

    def __init__(self, file: GGUFFile, *, with_pictures: bool = False) -> None:
        self.file = file
        self._error = file.metadata.error
        self.name, self.architecture = architecture_of(file, with_pictures=with_pictures)
        self._values = values = Hyperparameters(self.name, file.metadata, file)
        names = self._used_names(values)
        self.config: Config = self.architecture.config(values)
        self._add_rope_factors()
        self._parameters = self._find_parameters(names, self.architecture.targets)
        self._shapes = self._shapes_of(self._parameters)
        self._scalars = {
            f"{self.architecture.layers}.{at}.{path}": number
            for path, numbers in self.architecture.scalars(values).items()
            for at, number in enumerate(numbers)
        }

    @property
    def dense_elements(self) -> int:
        """The number of weights in all tensors."""
        return sum(parameter.elements for parameter in self._parameters)

    def load(self, precision: Precision) -> Module:
        """Return the model with its weights, which MLX may not have evaluated yet."""
        model = self._build()
        _load_weights(model, self._parameters, precision)
        scalars = [(name, mx.array(at, precision.dtype)) for name, at in self._scalars.items()]
        model.load_weights(scalars, strict=False)
        self._set_rope_frequencies(model)
        return model

    def load_predicting_layer(self, head: Any, precision: Precision) -> None:
        """Load the file's layer for multi-token prediction into `head`, a `models.mtp.MtpHead`.

        Of several layers, it is the first. Embeddings and an output layer of its own are added to
        `head` if they differ from the model's. Raises `ModelLoadError` for a file without a layer,
        and for tensors that are missing, unknown or of the wrong shape.
        """
        layers = self._values.layers
        if not self._values.predicting_layers:
            raise self._error(
                "the file has no layer for multi-token prediction",
                hint="use a file that was converted with it (nextn_predict_layers in its metadata)",
            )
        prefix = f"blk.{layers}."
        names = [
            name for name in self.file.names if name.startswith(prefix) and not self._is_copy(name)
        ]
        if not names:
            raise self._error(
                "the metadata name a layer for multi-token prediction, but there are no tensors "
                f"{prefix}*",
                hint="package the complete file, or all shards of the model",
            )
        parameters = self._find_parameters(names, self.architecture.predicting_targets)
        shape = (head.num_logits, self.config["hidden_size"])
        for parameter in parameters:
            if parameter.path == "embed_tokens":
                head.embed_tokens = Embedding(*shape)
            elif parameter.path == "head":
                head.head = Linear(*shape[::-1], bias=False)
        what = f"{self.file.metadata.path}: blk.{layers}"
        check_parameters(what, shapes_of(head), self._shapes_of(parameters))
        _load_weights(head, parameters, precision)

    def _is_copy(self, name: str) -> bool:
        """Return whether a tensor repeats the model's embeddings or output layer."""
        embeddings, output = "token_embd.weight", "output.weight"
        if name.endswith(".nextn.embed_tokens.weight"):
            model = self.file[embeddings]
        elif name.endswith(".nextn.shared_head_head.weight"):
            model = self.file[output if output in self.file else embeddings]
        else:
            return False
        own = self.file[name]
        return own.dtype == model.dtype and np.array_equal(own.raw, model.raw)

    def skeleton(self) -> Module | None:
        """Return the model without weights if the library for CPUs can run it, else None."""
        model = self._build()
        self._set_rope_frequencies(model)
        if not program.can_run(model):
            return None
        model.set_dtype(mx.float16)  # that of keys and values
        return model

    def packed(self, model: Module, adapter: Adapter | None = None) -> PackedWeights:
        """Return all weights of `skeleton`, packed as they are stored, with an adapter merged.

        Raises `AdapterError` for an adapter that does not fit the model.
        """
        packed, mapped, done = PackedWeights(), 0, 0
        layers = {} if adapter is None else self._layers(model, adapter)
        total = sum(parameter.stored_bytes for parameter in self._parameters)
        for parameter in self._parameters:
            checkpoint()
            name = f"{parameter.path}.{parameter.name}"
            tensor, one = parameter.read(), layers.get(name.removesuffix(".weight"))
            if one is not None:
                tensor = _merged(parameter, tensor, one)
            packed.add_tensor(name, tensor, gguf_blocks.dense)
            done += parameter.stored_bytes
            mapped += parameter.stored_bytes
            if mapped > _MOST_MAPPED:
                self.file.release()
                mapped = 0
            load_progress.read(done / total)
        self.file.release()
        return packed

    def _layers(self, model: Module, adapter: Adapter) -> Layers:
        weights = {found.path: found for found in self._parameters if found.name == "weight"}

        def weight_of(path: str, module: Any) -> mx.array:
            return mx.array(gguf_blocks.dense(weights[path].read()))

        return read_layers(adapter, model, self.config, dtype=mx.float32, weight_of=weight_of)

    def _build(self) -> Module:
        model_type = self.config["model_type"]
        module = importlib.import_module(f"mlx_lm.models.{model_type}")
        bounds = TensorBounds.of((name, self.file[name].shape) for name in self.file.names)
        what = str(self.file.metadata.path)
        bounds.check(self.config, what)
        try:
            made, arguments = corrected(lambda config: (module.Model, module.ModelArgs))(
                self.config
            )
            with bounds.building(what):
                model: Module = made(cast(Any, arguments).from_dict(self.config))
        except (ArithmeticError, IndexError, TypeError, ValueError) as error:
            raise self._error(f"cannot build {model_type} from its metadata: {error}") from error
        if hasattr(model, "sanitize"):  # may drop the output layer of a model with tied embeddings
            model.sanitize({name: mx.zeros(shape) for name, shape in self._shapes.items()})
        shapes = {**self._shapes, **dict.fromkeys(self._scalars, ())}
        check_parameters(self.file.metadata.path, shapes_of(model), shapes)
        return model

    def _shapes_of(self, parameters: Collection[Parameter]) -> dict[str, tuple[int, ...]]:
        return {f"{found.path}.{found.name}": self._shape(found) for found in parameters}

    def _shape(self, parameter: Parameter) -> tuple[int, ...]:
        try:
            return parameter.shape
        except ValueError as error:
            names = ", ".join(source.tensor.name for source in parameter.sources)
            shapes = ", ".join(str(list(source.tensor.shape)) for source in parameter.sources)
            raise self._error(
                f"the shape of {names}, {shapes}, does not fit the metadata",
                hint="convert the model again",
            ) from error

    def _used_names(self, values: Hyperparameters) -> list[str]:
        """Return the names of tensors, without those of layers that predict further tokens."""
        layers, left_out = values.layers, values.predicting_layers
        numbered = {name: _layer(name) for name in self.file.names}
        used = [
            name
            for name, at in numbered.items()
            if (at is None or not 0 <= at - layers < left_out)
            and not self.architecture.is_unused(values, name)
        ]
        numbers = {at for name in used if (at := numbered[name]) is not None}
        if 0 < layers <= _MAX_LAYERS:
            numbers |= self.architecture.empty_layers(values)
        if not 0 < layers <= _MAX_LAYERS or numbers != set(range(layers)):
            raise self._error(
                f"the metadata name {layers} layers, but the tensors are of {len(numbers)}",
                hint="package the complete file, or all shards of the model",
            )
        return used

    def _find_parameters(
        self, names: Collection[str], targets_of: Callable[[str], Targets]
    ) -> list[Parameter]:
        """Return the parameters that tensors become, in the order of the tensors in the file."""
        found: dict[tuple[str, str], list[Source]] = {}
        unknown = []
        for name in names:
            if name == _ROPE_FREQS and self._has_llama3_rope:
                continue
            if name in _ROPE_FACTORS and self.name == "phi3":
                continue
            targets = targets_of(name)
            for path, parameter, target in targets:
                source = Source(self.file[name], target, self.config)
                found.setdefault((path, parameter), []).append(source)
            if not targets:
                unknown.append(name)
        if unknown:
            raise self._error(
                f"{self.name} has no such tensors: {named(unknown)}",
                hint="load another model: this variant of the architecture is not supported",
            )
        return [
            Parameter(path, name, tuple(sorted(sources, key=lambda source: source.target.place)))
            for (path, name), sources in found.items()
        ]

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
            # Some layers of Exaone have none, and some of Nemotron no attention.
            if layer.self_attn is not None and "rope" in layer.self_attn:
                layer.self_attn.rope._freqs = frequencies


def _load_weights(model: Any, parameters: Collection[Parameter], precision: Precision) -> None:
    """Load parameters, whose names and shapes have been compared, into a model or a part of it."""
    modules = dict(model.named_modules())
    plans = [_plan(parameter, modules.get(parameter.path), precision) for parameter in parameters]
    if precision.blocks:
        plans = _within_the_file(plans, modules, precision.dtype)
    in_blocks = []
    for plan in plans:
        if plan.blocks is not None:
            path, module = plan.parameter.path, modules[plan.parameter.path]
            embedding, bias = isinstance(module, Embedding), "bias" in module
            shape = module.weight.shape
            held = layer_of(plan.blocks, shape, precision.dtype, embedding=embedding, bias=bias)
            in_blocks.append((path, held))
    model.update_modules(tree_unflatten(in_blocks))
    packed = {
        plan.parameter.path: {"group_size": GROUP_SIZE, **asdict(plan.packing)}
        for plan in plans
        if plan.packing
    }
    if packed:
        quantize(model, class_predicate=lambda path, _: packed.get(path, False))
    casts = getattr(model, "cast_predicate", lambda name: True)  # mlx-lm's, of its conversion
    model.load_weights(list(arrays_of(plans, precision.dtype, casts)), strict=False)


def _merged(parameter: Parameter, tensor: GGUFTensor, one: Matrices) -> GGUFTensor:
    """Return a weight with an adapter, in float16 unless it is stored in another float."""
    weight = mx.array(gguf_blocks.dense(tensor))
    weight = merged_weight(weight, one, is_embedding=parameter.path.endswith("embed_tokens"))
    dtype = tensor.dtype if tensor.dtype in _MERGED_TYPES else "F16"
    stored = np.array(weight.astype(_MERGED_TYPES[dtype]).reshape(-1).view(mx.uint8))
    return GGUFTensor(tensor.name, dtype, tensor.shape, stored)


def _plan(parameter: Parameter, module: Any, precision: Precision) -> TensorPlan:
    if precision.dense or parameter.name != "weight" or not hasattr(module, "to_quantized"):
        return TensorPlan(parameter)
    if parameter.dtype in precision.blocks and type(module) in _KEPT_LAYERS:
        blocks = planes.block_type(parameter.dtype, parameter.shape, parameter.part)
        if blocks is not None:
            return TensorPlan(parameter, blocks=blocks)
    return TensorPlan(parameter, _packing(parameter, requantize=precision.requantize))


def _packing(parameter: Parameter, *, requantize: bool) -> Packing | None:
    """Return how a weight stays packed, or None if it is loaded dense.

    Those whose columns move by less than a group are dense. Tensors of several types that are not
    all affine are rounded to 8 bits.
    """
    if parameter.part % GROUP_SIZE:
        return None
    if (bits := parameter.mixed_bits) is not None:
        return Packing(bits)
    if parameter.is_quantised and gguf_blocks.is_float(parameter.dtype):
        return Packing(8) if requantize else None
    return packing_of(parameter.dtype, requantize=requantize)


#: How much more than its tensors in the file a model may take in memory.
_MOST_MORE = 1.1
#: Layers in the order in which they are held as stored to save memory, by their last names: first
#: those that are not fused with a norm before them or with other layers. Embeddings come before.
_UNFUSED = ("o_proj", "out_proj", "down_proj")


def _within_the_file(
    plans: list[TensorPlan], modules: Mapping[str, Any], dtype: mx.Dtype
) -> list[TensorPlan]:
    """Hold weights of 4 bits as stored, if the model would take too much memory in MLX's layout.

    MLX has a scale and a bias for each 32 weights: 5 bits a weight instead of 4.5. Kernels for its
    layout are faster with tens of rows, so no more weights than necessary change. None do if that
    is not enough.
    """

    def order(at: int) -> int:
        path = plans[at].parameter.path
        if isinstance(modules[path], Embedding):
            return -1
        name = path.rpartition(".")[2]
        return _UNFUSED.index(name) if name in _UNFUSED else len(_UNFUSED)

    stored = sum(plan.parameter.stored_bytes for plan in plans)
    held = sum(plan.held_bytes(dtype) for plan in plans)
    candidates = [
        at
        for at, plan in enumerate(plans)
        if plan.packing == Packing(4) and type(modules[plan.parameter.path]) in _KEPT_LAYERS
    ]
    changed = list(plans)
    for at in sorted(candidates, key=order):
        if held <= _MOST_MORE * stored:
            break
        parameter = plans[at].parameter
        blocks = planes.block_type(parameter.dtype, parameter.shape, parameter.part)
        if blocks is not None:
            changed[at] = TensorPlan(parameter, blocks=blocks)
            held += changed[at].held_bytes(dtype) - plans[at].held_bytes(dtype)
    return changed if held <= _MOST_MORE * stored else plans


def _layer(tensor: str) -> int | None:
    """Return the number of a tensor's layer, or None for one outside the layers."""
    parts = tensor.split(".")
    numbered = parts[0] == "blk" and len(parts) > 1 and parts[1].isdecimal()
    return int(parts[1]) if numbered else None
