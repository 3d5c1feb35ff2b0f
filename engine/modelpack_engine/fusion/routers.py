"""Routers: how rows find their experts, by one kernel where mlx-lm's models have up to fourteen."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
from mlx_lm.models import deepseek_v3, qwen3_moe, qwen3_next

from modelpack_engine.adaptation.swaps import Call, ClassSwaps
from modelpack_engine.attention.step import StepInputs
from modelpack_engine.fusion.expert_kernels import Routing, route
from modelpack_engine.fusion.products import Weights, multiply, weights_of
from modelpack_engine.fusion.recognise import reads_like

#: A lane of the kernel keeps a 32nd of these, and all groups.
_MOST_EXPERTS, _MOST_GROUPS = 1024, 32


def fuse_router(module: Any, step: StepInputs, swaps: ClassSwaps) -> bool:
    """Let a router answer a step's calls by a kernel; return whether `module` is, or has, one."""
    if reads_like(module, deepseek_v3.MoEGate):
        return _fuse_gate(module, step, swaps)
    if reads_like(module, qwen3_moe.Qwen3MoeSparseMoeBlock):
        return _fuse_block(module, step, swaps, _mixed)
    if reads_like(module, qwen3_next.Qwen3NextSparseMoeBlock):
        return _fuse_block(module, step, swaps, _mixed_and_shared)
    return False


def _fuse_gate(module: Any, step: StepInputs, swaps: ClassSwaps) -> bool:
    """DeepSeek V3's: sigmoids and a bias, experts in groups."""
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
    """Qwen's: softmax, and the rest of the block as `answer` has it."""
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
