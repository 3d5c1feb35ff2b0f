"""Read the matrices of a LoRA or DoRA adapter, for the layers of a loaded model.

`read_layers` finds the layer of each target by its name, compares the shapes, and returns the
matrices as `patches.lora` multiplies with them. Experts that are modules of their own in the
adapter are stacked, as mlx-lm stacks their weights.
"""

from __future__ import annotations

import re
from collections import defaultdict
from typing import Any, Final

import mlx.core as mx
import mlx.nn as nn

from modelpack.formats.adapter import Adapter, AdapterError, Target, canonical
from modelpack_engine.patches.lora import EMBEDDINGS, EXPERTS, LINEARS, Matrices, dense_weight

_EXPERT: Final = re.compile(r"(?P<block>.+)\.experts\.(?P<index>\d+)\.(?P<name>\w+)\Z")
#: Names of experts' layers in Mixtral's checkpoints and what mlx-lm calls them.
_EXPERT_NAMES: Final = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}


def read_layers(
    adapter: Adapter, model: nn.Module, *, dtype: mx.Dtype | None = None
) -> dict[str, Matrices]:
    """Return the matrices of an adapter by the path of their layer in `model`.

    They have the type of the layer's outputs, or `dtype`. Raises `AdapterError` for a target that
    the model lacks, for shapes that differ, and for values that are not finite.
    """
    if adapter.format == "gguf":
        raise AdapterError(
            "GGUF adapters cannot be served", path=str(adapter.weights),
            hint="use the adapter as PEFT wrote it",
        )  # fmt: skip
    modules = _Modules(model, str(adapter.weights))
    arrays: Any = mx.load(str(adapter.weights), format="safetensors")
    stacked: dict[str, list[tuple[int, Target]]] = defaultdict(list)
    found: dict[str, Matrices] = {}
    for target in adapter.targets:
        expert = _EXPERT.match(target.module)
        if expert is not None and target.experts is None:
            part = _EXPERT_NAMES.get(expert["name"], expert["name"])
            stacked[f"{expert['block']}.switch_mlp.{part}"].append((int(expert["index"]), target))
            continue
        name, module = modules.find(target.module)
        modules.check(target, module)
        kind = dtype or _dtype_of(module)
        a, b = _matrices(target, arrays)
        gain = None
        if target.magnitude is not None:
            weight = dense_weight(module) + (a @ b).T
            magnitude = arrays[target.magnitude].reshape(-1).astype(mx.float32)
            gain = (magnitude / mx.linalg.norm(weight, axis=1)).astype(kind)
        found[name] = Matrices(a.astype(kind), b.astype(kind), gain)
    for wanted, experts in stacked.items():
        name, module = modules.find(wanted)
        found[name] = modules.stack(experts, module, arrays, dtype)
    every = [array for one in found.values() for array in (one.a, one.b, one.gain)]
    present = [array for array in every if array is not None]
    finite = [mx.all(mx.isfinite(array)) for array in present]
    mx.eval(present, finite)
    if not all(value.item() for value in finite):
        raise AdapterError("the weights have values that are not finite", path=str(adapter.weights))
    return found


def _matrices(target: Target, arrays: Any) -> tuple[mx.array, mx.array]:
    """Return A [..., inputs, rank] and B [..., rank, outputs] with the scale, in float32."""
    a, b = arrays[target.a].astype(mx.float32), arrays[target.b].astype(mx.float32)
    if not target.transposed:
        a, b = a.swapaxes(-1, -2), b.swapaxes(-1, -2)
    return a, b * target.scale


def _dtype_of(module: Any) -> mx.Dtype:
    array = module.scales if hasattr(module, "bits") else module.weight
    floats = (mx.float16, mx.bfloat16, mx.float32)
    return array.dtype if array.dtype in floats else mx.bfloat16


class _Modules:
    """The modules of a model by path, and by the part of it that all tools agree on."""

    def __init__(self, model: nn.Module, path: str) -> None:
        self._path = path
        kinds = (*LINEARS, *EMBEDDINGS, *EXPERTS)
        self._all = {n: m for n, m in model.named_modules() if isinstance(m, kinds)}
        self._short: dict[str, list[str]] = defaultdict(list)
        for name in self._all:
            self._short[canonical(name)].append(name)

    def error(self, message: str) -> AdapterError:
        return AdapterError(message, path=self._path)

    def find(self, wanted: str) -> tuple[str, Any]:
        """Return the path and the module of a target."""
        names = [wanted] if wanted in self._all else self._short.get(canonical(wanted), [])
        if len(names) != 1:
            why = f"names {len(names)} modules of the model" if names else "is not in the model"
            raise self.error(f"target {wanted} {why}")
        return names[0], self._all[names[0]]

    def check(self, target: Target, module: Any) -> None:
        """Raise `AdapterError` unless the target has the module's shape."""
        shape = _shape(module)
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

    def stack(
        self,
        experts: list[tuple[int, Target]],
        module: Any,
        arrays: Any,
        dtype: mx.Dtype | None,
    ) -> Matrices:
        """Return the matrices of single experts, stacked; other experts get zeros."""
        first = experts[0][1]
        if not isinstance(module, EXPERTS):
            raise self.error(f"target {first.module} is not an expert of the model")
        count, outputs, inputs = _shape(module)
        rank = max(target.rank for _, target in experts)
        kind = dtype or _dtype_of(module)
        a, b = mx.zeros((count, inputs, rank)), mx.zeros((count, rank, outputs))
        for index, target in experts:
            if target.magnitude is not None:
                raise self.error(f"{target.module}: DoRA of experts is not supported")
            if index >= count or (target.outputs, target.inputs) != (outputs, inputs):
                raise self.error(
                    f"{target.module}: the adapter is for a weight of shape "
                    f"{[target.outputs, target.inputs]}, but the model has {count} experts of "
                    f"{[outputs, inputs]}"
                )
            own_a, own_b = _matrices(target, arrays)
            a[index, :, : target.rank], b[index, : target.rank] = own_a, own_b
        return Matrices(a.astype(kind), b.astype(kind))


def _shape(module: Any) -> tuple[int, ...]:
    """Return the shape of a layer's weight, unpacked."""
    *outer, inputs = module.weight.shape
    return (*outer, inputs * 32 // module.bits if hasattr(module, "bits") else inputs)
