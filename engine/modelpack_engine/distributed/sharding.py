"""shard: reduce a model to the part of this rank, by mlx-lm's own division of its layers."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
from mlx.nn.layers.base import Module
from mlx.nn.layers.distributed import AllToShardedLinear, QuantizedAllToShardedLinear
from mlx.nn.layers.linear import Linear
from mlx.nn.layers.quantized import QuantizedLinear
from mlx.utils import tree_map, tree_unflatten

from modelpack_engine.errors import ModelLoadError
from modelpack_engine.models.adapter import weight_shape
from modelpack_engine.patches.lora import EMBEDDINGS, EXPERTS, LINEARS, Matrices

_HEADS = ("num_attention_heads", "n_heads", "n_head")
_KV_HEADS = ("num_key_value_heads", "n_kv_heads")
# Exceptions that a model's `shard` may raise for sizes that it does not support.
_FAILURES = (ArithmeticError, AssertionError, AttributeError, LookupError, TypeError, ValueError)


@dataclass(frozen=True, slots=True)
class Division:
    """A rank's part of a layer whose whole weight has `shape` [..., outputs, inputs].

    `rows` are the indices of its outputs, int32, `columns` the range of its inputs, and `experts`
    that of its experts. None is all.
    """

    shape: tuple[int, ...]
    rows: mx.array | None = None
    columns: slice | None = None
    experts: slice | None = None

    def part(self, whole: Matrices) -> Matrices:
        """Return what this rank needs of an adapter's matrices for the layer."""
        a, b, gain = whole.a, whole.b, whole.gain
        if self.experts is not None:
            a, b = a[self.experts], b[self.experts]
        if self.columns is not None:
            a = a[..., self.columns, :]
        if self.rows is not None:
            b = b[..., self.rows]
            gain = None if gain is None else gain[self.rows]
        return Matrices(a, b, gain, whole.token_gain)  # embeddings are not divided


#: How the layers that may have adapters are divided, by path.
Divisions = Mapping[str, Division]


def shard(model: Module, config: Mapping[str, Any], group: mx.distributed.Group) -> Divisions:
    """Leave in `model` only what this rank of `group` computes; its weights are not evaluated.

    Returns how the layers are divided that may have adapters. Raises `ModelLoadError` for an
    architecture that mlx-lm cannot divide, and for sizes that cannot be divided by the number of
    ranks.
    """
    size = group.size()
    name = str(config.get("model_type") or type(model).__module__.rpartition(".")[2])
    divide = getattr(model, "shard", None)
    if divide is None:
        raise ModelLoadError(
            f"mlx-lm cannot divide the architecture {name!r} between devices",
            hint="serve it on one device, without --tensor-parallel-size",
        )
    check_sizes(name, config, size)
    shapes = _shapes(model)
    try:
        marked = _marked(model, shapes, size)
        marked.shard(group)
        divide(group)
    except _FAILURES as error:
        why = str(error) or type(error).__name__
        raise ModelLoadError(
            f"{name} cannot be divided between {size} devices: {why}",
            hint="choose a number that divides all its layers, or one device",
        ) from error
    _make_plain(model)
    # A part that is a view would keep the whole tensor in memory.
    model.update(tree_map(mx.contiguous, model.parameters()))
    return _divisions(model, marked, shapes, group.rank())


def _shapes(model: Module) -> dict[str, tuple[int, ...]]:
    kinds = (*LINEARS, *EMBEDDINGS, *EXPERTS)
    return {
        path: weight_shape(module)
        for path, module in model.named_modules()
        if isinstance(module, kinds)
    }


def _marked(model: Module, shapes: Mapping[str, tuple[int, ...]], size: int) -> Any:
    """Return a copy of a model whose weights have the index of each output in place of its values.

    Dividing it as the model shows which outputs a rank has: fused layers are divided in segments.
    Their weights have as few inputs and experts as `size` ranks can share.
    """
    marked: Any = copy.deepcopy(model)
    for path, module in marked.named_modules():
        if path not in shapes or isinstance(module, EMBEDDINGS):
            continue
        outputs = shapes[path][-2]
        leading = (size,) if isinstance(module, EXPERTS) else ()
        groups = {"weight": size}
        if hasattr(module, "bits"):
            groups = {name: size for name in ("scales", "biases") if name in module}
            groups["weight"] = size * module.group_size * module.bits // 32
        marks = mx.arange(outputs, dtype=mx.int32)[:, None]
        for name, inputs in groups.items():
            module[name] = mx.broadcast_to(marks, (*leading, outputs, inputs))
    return marked


def _divisions(
    model: Module, marked: Module, shapes: Mapping[str, tuple[int, ...]], rank: int
) -> dict[str, Division]:
    modules, marks = dict(model.named_modules()), dict(marked.named_modules())
    found = {}
    for path, whole in shapes.items():
        *leading, outputs, inputs = weight_shape(modules[path])
        rows = columns = experts = None
        if outputs != whole[-2]:
            weight: mx.array = marks[path]["weight"]
            rows = weight.reshape(-1, *weight.shape[-2:])[0, :, 0]
        if inputs != whole[-1]:
            columns = slice(rank * inputs, (rank + 1) * inputs)
        if leading and leading[0] != whole[0]:
            experts = slice(rank * leading[0], (rank + 1) * leading[0])
        found[path] = Division(whole, rows, columns, experts)
    mx.eval([one.rows for one in found.values() if one.rows is not None])
    return found


def _make_plain(model: Module) -> None:
    """Replace layers with divided outputs by linear layers, which compute the same.

    MLX's classes prepare for gradients in each call, and the engine's patches for linear layers
    (`modelpack_engine.patches`) do not apply to them.
    """
    plain: list[tuple[str, Module]] = []
    for path, module in model.named_modules():
        made: Any
        if isinstance(module, AllToShardedLinear):
            made = Linear(1, 1, bias="bias" in module)
        elif isinstance(module, QuantizedAllToShardedLinear):
            how: Any = module
            made = QuantizedLinear(
                how.group_size, 1, "bias" in module, how.group_size, how.bits, how.mode
            )
        else:
            continue
        for name, value in module.items():
            if isinstance(value, mx.array):
                made[name] = value
        plain.append((path, made))
    model.update_modules(tree_unflatten(plain))


def check_sizes(name: str, config: Mapping[str, Any], size: int) -> None:
    """Raise `ModelLoadError` unless a model's heads can be divided by `size`."""
    inner = config.get("text_config")
    for part in (config, inner if isinstance(inner, dict) else {}):
        _check(name, "attention heads", _first(part, _HEADS), size)
        # All heads share a latent, and mlx-lm repeats heads of Qwen 3.5 if there are more ranks.
        latent = part.get("kv_lora_rank") is not None
        kv_heads = _first(part, _KV_HEADS)
        repeated = name.startswith("qwen3_5") and kv_heads is not None and size % kv_heads == 0
        if not latent and not repeated:
            _check(name, "key-value heads", kv_heads, size)


def _check(name: str, what: str, count: int | None, size: int) -> None:
    if count is not None and count % size:
        fitting = [n for n in range(2, count + 1) if count % n == 0]
        raise ModelLoadError(
            f"{name} has {count} {what}, which {size} devices cannot share equally",
            hint=f"choose one of {fitting}, or one device" if fitting else "use one device",
        )


def _first(part: Mapping[str, Any], names: tuple[str, ...]) -> int | None:
    for name in names:
        value = part.get(name)
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
    return None
