"""Mixtures of experts by fused kernels: routers (up to fourteen kernels in mlx-lm) and experts."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import deepseek_v3, qwen3_moe, qwen3_next
from mlx_lm.models.switch_layers import (
    QuantizedSwitchLinear,
    SwiGLU,
    SwitchGLU,
    SwitchLinear,
)

from modelpack_engine.attention.metadata import StepInputs
from modelpack_engine.layers import expert_kernels, expert_matmul
from modelpack_engine.layers.expert_kernels import Dispatch, Routing, route
from modelpack_engine.layers.kernels import take_rows
from modelpack_engine.layers.matmul import Weights, multiply, quantised_weights, weights_of
from modelpack_engine.patches.class_swaps import Call, ClassSwaps
from modelpack_engine.patches.recognition import reads_like

#: A lane of the kernel keeps a 32nd of these, and all groups.
_MOST_EXPERTS, _MOST_GROUPS = 1024, 32


def fuse_router(module: Any, step: StepInputs, swaps: ClassSwaps) -> bool:
    """Run a router by one kernel within steps; return whether `module` is, or has, a router."""
    if reads_like(module, deepseek_v3.MoEGate):
        return _fuse_gate(module, step, swaps)
    if reads_like(module, qwen3_moe.Qwen3MoeSparseMoeBlock):
        return _fuse_block(module, step, swaps, _mixed)
    if reads_like(module, qwen3_next.Qwen3NextSparseMoeBlock):
        return _fuse_block(module, step, swaps, _mixed_and_shared)
    return False


def _fuse_gate(module: Any, step: StepInputs, swaps: ClassSwaps) -> bool:
    """Fuse DeepSeek V3's router: sigmoids and a bias, experts in groups."""
    experts, groups = module.weight.shape[0], module.n_group
    routing = Routing(
        module.top_k,
        normed=bool(module.top_k > 1 and module.norm_topk_prob),
        sigmoid=True,
        groups=groups,
        keep=module.topk_group if groups > 1 else 1,
        factor=float(module.routed_scaling_factor),
    )
    fits = experts <= _MOST_EXPERTS and groups <= _MOST_GROUPS and routing.top_k <= experts
    if not fits or (groups > 1 and (experts % groups or experts < 2 * groups)):
        return False

    def call(original: Call, gate: Any, x: mx.array) -> Any:
        if not step.active:
            return original(gate, x)
        return _routed(
            x, Weights.plain(gate.weight), routing, gate.e_score_correction_bias, mx.float32
        )

    swaps.override(module, call)
    return True


def _fuse_block(module: Any, step: StepInputs, swaps: ClassSwaps, answer: Any) -> bool:
    """Fuse Qwen's router, a softmax; `answer` computes the rest of the block."""
    weights = weights_of(module.gate)
    if weights is None or not module.top_k <= weights.num_outputs <= _MOST_EXPERTS:
        return False
    routing = Routing(module.top_k, normed=bool(module.norm_topk_prob))

    def call(original: Call, block: Any, x: mx.array) -> Any:
        if not step.active or block.sharding_group is not None:
            return original(block, x)
        weights = weights_of(block.gate)
        assert weights is not None, "a linear layer stays one"
        return answer(block, x, *_routed(x, weights, routing, None, x.dtype))

    swaps.override(module, call)
    return True


def _routed(
    x: mx.array, weights: Weights, routing: Routing, bias: mx.array | None, dtype: mx.Dtype
) -> tuple[mx.array, mx.array]:
    """Return experts and scores [..., top_k] of x [..., in]."""
    logits = multiply(x.reshape(-1, x.shape[-1]), weights)
    shape = (*x.shape[:-1], routing.top_k)
    chosen, scores = route(logits, routing, bias, dtype)
    return chosen.reshape(shape), scores.reshape(shape)


def _mixed(block: Any, x: mx.array, chosen: mx.array, scores: mx.array) -> Any:
    given = block.switch_mlp(x, chosen)
    return (given * scores[..., None]).sum(axis=-2).astype(given.dtype)


def _mixed_and_shared(block: Any, x: mx.array, chosen: mx.array, scores: mx.array) -> Any:
    given = (block.switch_mlp(x, chosen) * scores[..., None]).sum(axis=-2)
    shared = mx.sigmoid(block.shared_expert_gate(x)) * block.shared_expert(x)
    return given + shared


#: With fewer pairs of row and expert, MLX's own kernels are faster.
_FEWEST_PAIRS = 16
_FLOATS = (mx.float16, mx.bfloat16, mx.float32)


def has_experts(model: nn.Module) -> bool:
    """Return whether a model has experts; their kernels take seconds to compile."""
    return any(type(module) is SwitchGLU for _, module in model.named_modules())


def fuse_experts(module: nn.Module, step: StepInputs, swaps: ClassSwaps) -> bool:
    """Run experts by fused kernels within steps; return whether `module` has experts."""
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
    """Return the experts' outputs, sorted by expert, and the dispatch that maps them to rows."""
    gate, up, down = (
        _weights_of(layer) for layer in (experts.gate_proj, experts.up_proj, experts.down_proj)
    )
    count, pairs = gate.weight.shape[0], chosen.size
    sent = expert_kernels.dispatch(chosen, count, expert_matmul.tile_for(pairs, count))
    swiglu = type(experts.activation) is SwiGLU
    alike = _kind(gate) == _kind(up)
    if not (alike and expert_matmul.takes(rows, gate, pairs, swiglu=swiglu)):
        wide = _one_by_one(take_rows(rows, sent.source))
        hidden = experts.activation(
            *(layer(wide, sent.experts, True) for layer in (experts.up_proj, experts.gate_proj))
        )[:, 0]
    elif swiglu:
        hidden = expert_matmul.multiply(rows, gate, sent, gather=True, multiplied=up)
    else:
        hidden = experts.activation(
            *(expert_matmul.multiply(rows, weights, sent, gather=True) for weights in (up, gate))
        )
    if expert_matmul.takes(hidden, down, pairs, swiglu=swiglu):
        return expert_matmul.multiply(hidden, down, sent), sent
    return experts.down_proj(_one_by_one(hidden), sent.experts, True)[:, 0], sent


def _one_by_one(rows: mx.array) -> mx.array:
    """Return rows [n, dim] as [n, 1, dim].

    Not by `rows[:, None]`: that axis has a stride of 1, which MLX's `gather_mm` on CUDA uses as
    the stride of the rows if the experts are sorted (seen with MLX 0.32.4).
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
    """Outputs of experts [..., each, dim]; multiplied by scores and summed by one kernel."""

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
    """Outputs of experts multiplied by scores [rows, each]."""

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
    """The sum over experts; `astype` has the kernel write the other type."""

    weighted: _Weighted

    def astype(self, dtype: mx.Dtype, *args: Any, **kwargs: Any) -> mx.array:
        if dtype == self.dtype or dtype not in _FLOATS or args or kwargs:
            return mx.array.astype(self, dtype, *args, **kwargs)
        return self.weighted._combined(dtype)
