"""In which numbers a model is held, and how quantised modules become dense ones.

On a CPU everything is float32 and dense where memory allows: MLX's matrix product of float32 is
BLAS, those of float16 and of quantised weights are its own loops, two to sixty times slower. On a
GPU weights stay as they are packed.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
from mlx.nn.layers.base import Module
from mlx.nn.layers.embedding import Embedding
from mlx.nn.layers.linear import Linear
from mlx.nn.layers.quantized import QuantizedEmbedding, QuantizedLinear
from mlx.utils import tree_unflatten

from modelpack_engine.load_budget import checkpoint
from modelpack_engine.loaders.parameters import parameters_of

_MEBIBYTE = 1 << 20
# What a dense model may take of the memory that is free; the KV cache needs some too.
_SHARE = 0.8


@dataclass(frozen=True, slots=True)
class Precision:
    """How weights are held.

    `dtype` is that of whatever is not packed, and of scales. `dense` unpacks quantised weights.
    `requantize` holds what MLX cannot pack without loss (Q6_K, IQ…) in 8 bits rather than 16.
    """

    dtype: mx.Dtype
    dense: bool
    requantize: bool = True


def fits(num_bytes: int) -> bool:
    """Whether weights of this size leave room in the memory that is free now."""
    free = available_memory()
    return free is None or num_bytes <= _SHARE * free


def available_memory() -> int | None:
    """Return the bytes of memory that programs can still get, or None where nobody knows."""
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            for line in lines:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
    except (OSError, ValueError):
        pass
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError):
        return None


def evaluate(model: Module) -> int:
    """Compute all weights, a few at a time so that little is held twice; return their bytes."""
    arrays = [array for _, array in parameters_of(model)]
    batch: list[mx.array] = []
    pending = 0
    for array in arrays:
        batch.append(array)
        pending += array.nbytes
        if pending > 256 * _MEBIBYTE:
            checkpoint()
            mx.eval(batch)
            batch, pending = [], 0
    mx.eval(batch)
    return sum(array.nbytes for array in arrays)


def set_dtype(model: Any, dtype: mx.Dtype) -> None:
    """Make all floating-point parameters `dtype`, the scales of packed weights too."""
    model.set_dtype(dtype)


def dense_bytes(model: Any, itemsize: int) -> int:
    """Return how many bytes the weights would take with every module unpacked."""
    total = 0
    for _, module in model.named_modules():
        own = {name: value for name, value in module.items() if isinstance(value, mx.array)}
        if _is_packed(module):
            total += own.pop("weight").size * 32 // module.bits
            own = {name: own[name] for name in own if name == "bias"}
        total += sum(array.size for array in own.values())
    return total * itemsize


def unpack(model: Any, dtype: mx.Dtype | None) -> Sequence[str]:
    """Replace quantised modules by dense ones; return the paths of those left as they are.

    The product of scale and code is taken in `dtype`, or in the dtype of the scales if None.
    """
    from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear

    kinds: dict[type, Any] = {
        QuantizedLinear: Linear,
        QuantizedEmbedding: Embedding,
        QuantizedSwitchLinear: SwitchLinear,
    }
    replaced: list[tuple[str, Module]] = []
    left: list[str] = []
    for path, module in model.named_modules():
        if not _is_packed(module):
            continue
        kind = kinds.get(type(module))
        if kind is None:
            left.append(path)
        else:
            replaced.append((path, _unpacked(module, kind, dtype)))
    model.update_modules(tree_unflatten(replaced))
    return left


def _is_packed(module: Module) -> bool:
    return "scales" in module and hasattr(module, "bits") and hasattr(module, "group_size")


def _unpacked(module: Any, kind: Any, dtype: mx.Dtype | None) -> Any:
    scales, biases = module["scales"], module.get("biases")
    if biases is not None and dtype is not None:
        scales, biases = scales.astype(dtype), biases.astype(dtype)
    options = {}
    if module.get("global_scale") is not None:
        options["global_scale"] = module["global_scale"]
    weight = mx.dequantize(
        module["weight"],
        scales,
        biases,
        module.group_size,
        module.bits,
        mode=getattr(module, "mode", "affine"),
        **options,
    )
    # Tiny, then filled: the class sets up what else it has.
    dense = kind(*(1,) * weight.ndim, **({} if kind is Embedding else {"bias": False}))
    dense.weight = weight if dtype is None else weight.astype(dtype)
    if "bias" in module:
        dense.bias = module["bias"]
    return dense
