"""Read the matrices of a LoRA or DoRA adapter, for the layers of a loaded model; or merge them.

`read_layers` finds the layer of each target by its name, compares the shapes, and returns the
matrices as `patches.lora` multiplies with them. Experts that are modules of their own in the
adapter are stacked, as mlx-lm stacks their weights; those that are one parameter of transformers
are divided into mlx-lm's layers. `merge` adds the matrices to the weights.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from types import MappingProxyType
from typing import Any, Final

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.switch_layers import SwitchGLU, SwitchMLP

from modelpack.formats.adapter import Adapter, AdapterError, Target, canonical
from modelpack_engine.layers.blocks import BLOCK_LAYERS
from modelpack_engine.models.gguf_adapter import gguf_pairs
from modelpack_engine.models.gguf_architectures import PERMUTED
from modelpack_engine.models.precision import unpack
from modelpack_engine.patches.lora import (
    EMBEDDINGS,
    EXPERTS,
    LINEARS,
    Layers,
    Matrices,
    dense_weight,
)

_EXPERT: Final = re.compile(r"(?P<block>.+)\.experts\.(?P<index>[0-9]{1,9})\.(?P<name>\w+)\Z")
#: Names of experts' layers in Mixtral's checkpoints and what mlx-lm calls them.
_EXPERT_NAMES: Final = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
#: The layers whose rows llama.cpp's converter permutes.
_PERMUTED_LAYERS: Final = ("self_attn.q_proj", "self_attn.k_proj")
#: Parameters of experts in transformers, and the layers of mlx-lm that they are.
_PARAMETERS: Final[Mapping[type, Mapping[str, tuple[str, ...]]]] = {
    SwitchGLU: {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)},
    SwitchMLP: {"up_proj": ("fc1",), "down_proj": ("fc2",)},
}
#: The modules of mlx-lm for models whose gate_up_proj has gates and others in turn.
_INTERLEAVED: Final = ("gpt_oss",)


#: A target by its module's path in the adapter or, for GGUF, in the model; A [..., inputs, rank],
#: and B [..., rank, outputs] with the scale. Both are float32.
_Pair = tuple[Target, mx.array, mx.array]


def read_layers(
    adapter: Adapter,
    model: nn.Module,
    config: Mapping[str, Any] = MappingProxyType({}),
    *,
    dtype: mx.Dtype | None = None,
    weight_of: Callable[[str, Any], mx.array] = lambda path, module: dense_weight(module),
    norm_of: Callable[[str, mx.array, mx.array], mx.array] | None = None,
    shapes: Mapping[str, tuple[int, ...]] = MappingProxyType({}),
) -> dict[str, Matrices]:
    """Return the matrices of an adapter by the path of their layer in `model`.

    They have the type of the layer's outputs, or `dtype`. `config` is the model's, which adapters
    and bases in GGUF need; `weight_of` returns the weight of a module, of which DoRA needs the
    norm, in float32. If the model is divided between devices, `shapes` are those of the whole
    weights by path, and `norm_of` returns the norms of a layer's whole weight with A and B added;
    embeddings are not divided. Raises `AdapterError` for a target that the model lacks, for shapes
    that differ, and for values that are not finite.
    """
    path = str(adapter.weights)
    modules = _Modules(model, adapter, shapes)
    arrays: Any = {}
    if adapter.format == "gguf":
        pairs: Iterable[_Pair] = gguf_pairs(adapter, model, config)
    else:
        with _reading(path):
            arrays = mx.load(path, format="safetensors")
        pairs = ((target, *_matrices(target, arrays)) for target in adapter.targets)
    stacked: dict[str, list[tuple[int, _Pair]]] = defaultdict(list)
    found: dict[str, Matrices] = {}
    for target, a, b in modules.divided(pairs):
        expert = _EXPERT.match(target.module)
        if expert is not None and target.experts is None:
            part = _EXPERT_NAMES.get(expert["name"], expert["name"])
            name = f"{expert['block']}.switch_mlp.{part}"
            stacked[name].append((int(expert["index"]), (target, a, b)))
            continue
        name, module = modules.find(target.module)
        modules.check(target, name, module)
        kind = dtype or dtype_of(module)
        permuted = (
            adapter.format != "gguf" and config.get(PERMUTED) and name.endswith(_PERMUTED_LAYERS)
        )
        if permuted:
            b = _permuted(b, config["head_dim"])
        gain = token_gain = None
        if target.magnitude is not None:
            magnitude = arrays[target.magnitude].reshape(-1).astype(mx.float32)
            if permuted:
                magnitude = _permuted(magnitude, config["head_dim"])
            by_token = isinstance(module, EMBEDDINGS) and adapter.format == "mlx"
            if isinstance(module, EMBEDDINGS):
                norm = mx.linalg.norm(weight_of(name, module) + a @ b, axis=1 if by_token else 0)
            elif norm_of is not None:
                norm = norm_of(name, a, b)
            else:
                norm = mx.linalg.norm(weight_of(name, module) + (a @ b).T, axis=1)
            if magnitude.size != norm.size:
                raise modules.error(
                    f"{target.module}: the magnitude has {magnitude.size} values, expected "
                    f"{norm.size}"
                )
            factor = (magnitude / norm).astype(kind)
            gain, token_gain = (None, factor[:, None]) if by_token else (factor, None)
        if name in found:
            raise modules.error(f"two targets are the module {name} of the model")
        found[name] = Matrices(a.astype(kind), b.astype(kind), gain, token_gain)
    for wanted, experts in stacked.items():
        name, module = modules.find(wanted)
        found[name] = modules.stack(experts, name, module, dtype)
    present = [array for one in found.values() for array in one.arrays().values()]
    finite = [mx.all(mx.isfinite(array)) for array in present]
    with _reading(path):
        mx.eval(present, finite)
    if not all(value.item() for value in finite):
        raise modules.error("the weights have values that are not finite")
    return found


@contextmanager
def _reading(path: str) -> Iterator[None]:
    """Raise `AdapterError` for a file that MLX cannot read, which it does late."""
    try:
        yield
    except (RuntimeError, ValueError) as error:
        raise AdapterError(f"the weights cannot be read: {error}", path=path) from error


def _matrices(target: Target, arrays: Any) -> tuple[mx.array, mx.array]:
    """Return A [..., inputs, rank] and B [..., rank, outputs] with the scale, in float32."""
    a, b = arrays[target.a].astype(mx.float32), arrays[target.b].astype(mx.float32)
    if target.layout != "module":
        a = a.reshape(target.experts, target.rank, target.inputs)
        b = b.reshape(target.outputs, target.rank, target.experts).transpose(2, 0, 1)
    if not target.transposed:
        a, b = a.swapaxes(-1, -2), b.swapaxes(-1, -2)
    return a, b * target.scale


def _permuted(values: mx.array, head_dim: int) -> mx.array:
    """Order the outputs [..., outputs] of queries or keys as llama.cpp's converter does.

    Numbers that are rotated together, from both halves of a head, follow each other.
    """
    halves = values.reshape(*values.shape[:-1], -1, 2, head_dim // 2)
    return halves.swapaxes(-1, -2).reshape(values.shape)


def dtype_of(module: Any) -> mx.Dtype:
    """Return the type of a layer's outputs, which an adapter's matrices have, too."""
    if isinstance(module, BLOCK_LAYERS):
        return module.dtype
    array = module.scales if hasattr(module, "bits") else module.weight
    floats = (mx.float16, mx.bfloat16, mx.float32)
    return array.dtype if array.dtype in floats else mx.bfloat16


class _Modules:
    """The modules of a model by path, and by the part of it that all tools agree on."""

    def __init__(
        self, model: nn.Module, adapter: Adapter, shapes: Mapping[str, tuple[int, ...]]
    ) -> None:
        self._path, self._shapes = str(adapter.weights), shapes
        kinds = (*LINEARS, *EMBEDDINGS, *EXPERTS)
        self._modules = dict(model.named_modules())
        self._all = {n: m for n, m in self._modules.items() if isinstance(m, kinds)}
        self._parameters = [one for one in adapter.targets if one.layout != "module"]
        self._short: dict[str, list[str]] = defaultdict(list)
        for name in self._all:
            self._short[canonical(name)].append(name)
        self._mixtures: dict[str, list[str]] = defaultdict(list)
        for name, module in self._modules.items():
            if isinstance(module, tuple(_PARAMETERS)):
                self._mixtures[_layer(name)].append(name)

    def error(self, message: str) -> AdapterError:
        return AdapterError(message, path=self._path)

    def find(self, wanted: str) -> tuple[str, Any]:
        """Return the path and the module of a target."""
        names = [wanted] if wanted in self._all else self._short.get(canonical(wanted), [])
        if len(names) != 1:
            why = f"names {len(names)} modules of the model" if names else "is not in the model"
            raise self.error(f"target {wanted[:200]} {why}")
        return names[0], self._all[names[0]]

    def _shape(self, name: str, module: Any) -> tuple[int, ...]:
        return self._shapes.get(name) or weight_shape(module)

    def check(self, target: Target, name: str, module: Any) -> None:
        """Raise `AdapterError` unless the target has the module's shape."""
        shape = self._shape(name, module)
        wanted: tuple[int, ...] = (target.outputs, target.inputs)
        if isinstance(module, EMBEDDINGS):
            wanted = (target.inputs, target.outputs)
        if target.experts is not None:
            wanted = (target.experts, *wanted)
        if shape != wanted:
            raise self.error(
                f"{target.module}: the adapter is for a weight of shape {list(wanted)}, but the "
                f"model has {list(shape)}"
            )

    def divided(self, pairs: Iterable[_Pair]) -> Iterator[_Pair]:
        """Yield the pairs; of those of a parameter of experts, one for each layer of mlx-lm."""
        for target, a, b in pairs:
            if target.layout == "module":
                yield target, a, b
                continue
            names, turns = self._layers(target)
            if self._is_exchanged(target):
                a, b = b.swapaxes(1, 2), a.swapaxes(1, 2)
            for index, name in enumerate(names):
                size = b.shape[2] // len(names)
                rows = slice(index, None, len(names)) if turns else slice(index * size, None)
                own = b[..., rows][..., :size]
                layer = replace(
                    target, module=name, inputs=a.shape[1], outputs=size, layout="module"
                )
                yield layer, a, own

    def _layers(self, target: Target) -> tuple[list[str], bool]:
        """Return the layers that a parameter of experts is, and whether their outputs take turns.

        mlx-lm and transformers name the mixture of a layer differently, but there is only one.
        """
        part, layer = target.module.rpartition(".")[2], _layer(target.module)
        found = [
            (path, parts[part])
            for path in self._mixtures[layer]
            for kind, parts in _PARAMETERS.items()
            if isinstance(self._modules[path], kind) and part in parts
        ]
        if len(found) != 1:
            raise self.error(
                f"target {target.module} is not in the model: {layer} has {len(found)} "
                f"mixtures of experts with {part}"
            )
        ((path, parts),) = found
        owner = type(self._modules[path.rpartition(".")[0]])
        files = {kind.__module__.rpartition(".")[2] for kind in owner.__mro__}
        return [f"{path}.{name}" for name in parts], not files.isdisjoint(_INTERLEAVED)

    def _fits(self, target: Target) -> tuple[bool, bool]:
        """Return whether A and B have a parameter's inputs and outputs, and whether exchanged."""
        names, _ = self._layers(target)
        shapes = [self._shape(name, self.find(name)[1]) for name in names]
        count, _, inputs = shapes[0]
        whole = (count, sum(shape[1] for shape in shapes), inputs)
        own = (target.experts, target.outputs, target.inputs)
        other = (target.experts, target.inputs, target.outputs)
        if whole not in (own, other):
            raise self.error(
                f"{target.module}: the adapter is for a weight of shape {list(own)}, but the "
                f"model has {list(whole)}"
            )
        return own == whole, other == whole

    def _is_exchanged(self, target: Target) -> bool:
        """Return whether A has a parameter's outputs and B its inputs: PEFT before 0.19.1.

        That depended on the model's class. If the shape is square, another parameter tells it.
        """
        for one in (target, *self._parameters):
            ordered, exchanged = self._fits(one)
            if ordered != exchanged:
                return exchanged
        if target.layout == "old parameter":
            raise self.error(
                f"{target.module}: PEFT before 0.19.1 may have exchanged its inputs and outputs, "
                "which are equally many"
            )
        return False

    def stack(
        self, experts: list[tuple[int, _Pair]], name: str, module: Any, dtype: mx.Dtype | None
    ) -> Matrices:
        """Return the matrices of single experts, stacked; other experts get zeros."""
        first = experts[0][1][0]
        if not isinstance(module, EXPERTS):
            raise self.error(f"target {first.module} is not an expert of the model")
        count, outputs, inputs = self._shape(name, module)
        rank = max(target.rank for _, (target, _, _) in experts)
        kind = dtype or dtype_of(module)
        a, b = mx.zeros((count, inputs, rank)), mx.zeros((count, rank, outputs))
        for index, (target, own_a, own_b) in experts:
            if target.magnitude is not None:
                raise self.error(f"{target.module}: DoRA of experts is not supported")
            if index >= count or (target.outputs, target.inputs) != (outputs, inputs):
                raise self.error(
                    f"{target.module}: the adapter is for a weight of shape "
                    f"{[target.outputs, target.inputs]}, but the model has {count} experts of "
                    f"{[outputs, inputs]}"
                )
            a[index, :, : target.rank], b[index, : target.rank] = own_a, own_b
        return Matrices(a.astype(kind), b.astype(kind))


def _layer(path: str) -> str:
    """Return the part of a path that names the layer, such as `layers.3`."""
    return ".".join(canonical(path).split(".")[:2])


def weight_shape(module: Any) -> tuple[int, ...]:
    """Return the shape of a layer's weight [..., outputs, inputs], unpacked."""
    *outer, inputs = module.weight.shape
    if isinstance(module, BLOCK_LAYERS):
        return (*outer, module.kind.inputs(inputs))
    return (*outer, inputs * 32 // module.bits if hasattr(module, "bits") else inputs)


def merge(model: nn.Module, layers: Layers) -> None:
    """Add an adapter to the weights of a model, which keep their type; MLX evaluates them later.

    Quantised layers that it changes become dense, in the type of their scales or outputs: quantised
    again, they would lose most of a small change.
    """
    unpack(model, None, only=layers)
    modules = dict(model.named_modules())
    for name, one in layers.items():
        module: Any = modules[name]
        weight = merged_weight(module.weight, one, is_embedding=isinstance(module, EMBEDDINGS))
        module.weight = weight.astype(module.weight.dtype)


def merged_weight(weight: mx.array, one: Matrices, *, is_embedding: bool) -> mx.array:
    """Return the weight [..., outputs, inputs] of a layer with an adapter, in float32.

    That of an embedding is [inputs, outputs].
    """
    delta = one.a.astype(mx.float32) @ one.b.astype(mx.float32)
    changed = weight.astype(mx.float32) + (delta if is_embedding else delta.swapaxes(-1, -2))
    if one.token_gain is not None:
        changed = changed * one.token_gain.astype(mx.float32)
    if one.gain is None:
        return changed
    gain = one.gain.astype(mx.float32)
    return changed * (gain if is_embedding else gain[:, None])


def dense_bytes(adapter: Adapter) -> int:
    """Return the bytes of the weights that an adapter changes, in 16 bits."""
    sizes = (target.outputs * target.inputs * (target.experts or 1) for target in adapter.targets)
    return 2 * sum(sizes)
