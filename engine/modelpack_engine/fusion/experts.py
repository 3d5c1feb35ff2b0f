"""Experts: mixtures of them on the rows of a step, in the order of experts throughout.

mlx-lm's `SwitchGLU` sorts pairs of rows and experts, gathers, multiplies three times, and sorts
back; what calls it takes the rows' scores times that, and sums. Here one kernel sorts, products
find their rows themselves, and one kernel sums: what is returned knows what it was made of.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.switch_layers import (
    QuantizedSwitchLinear,
    SwiGLU,
    SwitchGLU,
    SwitchLinear,
)

from modelpack_engine.adaptation.swaps import Call, ClassSwaps
from modelpack_engine.attention.step import StepInputs
from modelpack_engine.fusion import expert_kernels, expert_products
from modelpack_engine.fusion.expert_kernels import Dispatch
from modelpack_engine.fusion.kernels import take_rows
from modelpack_engine.fusion.products import Weights, quantised_weights

#: With fewer pairs, MLX's own way is the shorter one.
_FEWEST_PAIRS = 16
_FLOATS = (mx.float16, mx.bfloat16, mx.float32)


def has_experts(model: nn.Module) -> bool:
    """Return whether a model has mixtures of experts: kernels take seconds to compile."""
    return any(type(module) is SwitchGLU for _, module in model.named_modules())


def fuse_experts(module: nn.Module, step: StepInputs, swaps: ClassSwaps) -> bool:
    """Let experts answer a step's calls by fused kernels; return whether `module` is some."""
    if type(module) is not SwitchGLU:
        return False
    layers = [module.gate_proj, module.up_proj, module.down_proj]
    if any(type(layer) not in (SwitchLinear, QuantizedSwitchLinear) for layer in layers):
        return False

    def call(original: Call, experts: Any, x: mx.array, indices: mx.array) -> Any:
        if not step.active or indices.size < _FEWEST_PAIRS or x.dtype not in _FLOATS:
            return original(experts, x, indices)
        rows = x.reshape(-1, x.shape[-1])
        chosen = indices.reshape(rows.shape[0], -1).astype(mx.uint32)
        given, sent = _give(experts, rows, chosen)
        return _ExpertRows.of(given, sent.place, (*indices.shape, given.shape[-1]))

    swaps.override(module, call)
    return True


def _give(experts: Any, rows: mx.array, chosen: mx.array) -> tuple[mx.array, Dispatch]:
    """Return what the experts of rows give, in their order, and what that order is."""
    gate, up, down = (
        _weights_of(layer) for layer in (experts.gate_proj, experts.up_proj, experts.down_proj)
    )
    count, pairs = gate.weight.shape[0], chosen.size
    sent = expert_kernels.dispatch(chosen, count, expert_products.tile_for(pairs, count))
    swiglu = type(experts.activation) is SwiGLU
    alike = _kind(gate) == _kind(up)
    if not (alike and expert_products.takes(rows, gate, pairs, swiglu=swiglu)):
        wide = _one_by_one(take_rows(rows, sent.source))
        hidden = experts.activation(
            *(layer(wide, sent.experts, True) for layer in (experts.up_proj, experts.gate_proj))
        )[:, 0]
    elif swiglu:
        hidden = expert_products.multiply(rows, gate, sent, gather=True, multiplied=up)
    else:
        hidden = experts.activation(
            *(expert_products.multiply(rows, weights, sent, gather=True) for weights in (up, gate))
        )
    if expert_products.takes(hidden, down, pairs, swiglu=swiglu):
        return expert_products.multiply(hidden, down, sent), sent
    return experts.down_proj(_one_by_one(hidden), sent.experts, True)[:, 0], sent


def _one_by_one(rows: mx.array) -> mx.array:
    """Return rows [n, dim] as [n, 1, dim].

    Not by `rows[:, None]`: that axis has a stride of 1, which MLX's `gather_mm` on CUDA takes for
    the distance of the rows, if their experts are sorted (seen with MLX 0.32.4).
    """
    return rows.reshape(rows.shape[0], 1, -1)


def _weights_of(layer: Any) -> Weights:
    if type(layer) is QuantizedSwitchLinear:
        return quantised_weights(layer)
    return Weights.plain(layer["weight"], layer.get("bias"))


def _kind(weights: Weights) -> tuple[Any, ...]:
    return (
        weights.weight.shape, weights.bits, weights.group_size, weights.mode, weights.bias is None,
    )  # fmt: skip


class _ExpertRows(mx.array):
    """What experts gave [..., each, dim]; times scores and summed over `each`, by one kernel."""

    given: mx.array
    place: mx.array

    @classmethod
    def of(cls, given: mx.array, place: mx.array, shape: tuple[int, ...]) -> _ExpertRows:
        made = cls(take_rows(given, place).reshape(shape))
        made.given, made.place = given, place
        return made

    def __mul__(self, other: Any) -> Any:
        product = mx.array.__mul__(self, other)
        if not isinstance(other, mx.array) or other.shape != (*self.shape[:-1], 1):
            return product
        made = _Weighted(product)
        made.rows, made.scores = self, other.reshape(-1, self.shape[-2])
        return made

    __rmul__ = __mul__


class _Weighted(mx.array):
    """What experts gave, times scores [rows, each]."""

    rows: _ExpertRows
    scores: mx.array

    def sum(self, axis: Any = None, keepdims: bool = False, **kwargs: Any) -> Any:
        if axis not in (-2, self.ndim - 2) or keepdims or kwargs:
            return mx.array.sum(self, axis, keepdims, **kwargs)
        made = _Combined(self._combined(self.dtype))
        made.weighted = self
        return made

    def _combined(self, dtype: mx.Dtype) -> mx.array:
        rows = self.rows
        total = expert_kernels.combine(rows.given, rows.place, self.scores, dtype)
        return total.reshape(*self.shape[:-2], -1)


class _Combined(mx.array):
    """The sum over experts; in another type, by a kernel that puts out that type."""

    weighted: _Weighted

    def astype(self, dtype: mx.Dtype, *args: Any, **kwargs: Any) -> mx.array:
        if dtype == self.dtype or dtype not in _FLOATS or args or kwargs:
            return mx.array.astype(self, dtype, *args, **kwargs)
        return self.weighted._combined(dtype)
