"""Recurrent layers by fused kernels, in compiled steps on GPUs.

A layer is one product for all of its projections, a convolution with its activation, the
recurrence, a gated norm, and the output's product. Layers whose code reads like Qwen3-Next's,
Qwen3.5's or Nemotron-H's are recognised. `fuse_recurrences` is the entry point.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import nemotron_h, qwen3_5, qwen3_next

from modelpack_engine.attention.metadata import StepInputs
from modelpack_engine.layers import convolution, delta_rule, gated_norm, state_space
from modelpack_engine.layers.add_norm import Sums
from modelpack_engine.layers.segments import LayerStates, fits
from modelpack_engine.layers.weights import Weights, can_join, join, weights_of
from modelpack_engine.patches.fused_layers import (
    class_reads_like,
    project,
    reads_like,
    ready,
    whole_rows,
)
from modelpack_engine.patches.modules import Call, ClassSwaps

#: Added to the squares of the lengths of queries and keys, by mlx-lm's classes.
_EPSILON = 1e-6


def fuse_recurrences(
    model: nn.Module,
    dtype: mx.Dtype,
    view: Callable[[Any], LayerStates | None],
    sums: Sums,
    step: StepInputs,
    swaps: ClassSwaps,
) -> int:
    """Run recurrent layers by fused kernels in steps with segments; return their number.

    The kernels of segments were found to be correct. `dtype` is the type of the rows, and `view`
    returns the states of a layer by its cache, or None for other caches than a step's.
    """
    makers = (_delta_net, _state_space)
    count = 0
    for _, module in list(model.named_modules()):
        known = next((found for make in makers if (found := make(module)) is not None), None)
        if known is None or gated_norm.verdict(dtype) is not None:
            continue
        _fuse(module, known, view, sums, step, swaps)
        count += 1
    return count


@dataclass(frozen=True, slots=True)
class _Layer:
    """A recognised layer: its projections, and how it computes from their joint outputs.

    `compute` takes the joint outputs [rows, all] and the states, and returns rows for `output`.
    """

    projections: list[nn.Module]
    output: nn.Module
    compute: Callable[[mx.array, LayerStates], mx.array]


def _fuse(
    module: nn.Module,
    layer: _Layer,
    view: Callable[[Any], LayerStates | None],
    sums: Sums,
    step: StepInputs,
    swaps: ClassSwaps,
) -> None:
    joint = _joint(layer.projections)
    output = ready(layer.output)
    of_joint = step.adapters.join(*layer.projections)
    of_output = step.adapters.join(layer.output)

    def call(original: Call, own: Any, x: mx.array, mask: Any = None, cache: Any = None) -> Any:
        states = view(cache) if step.fuses_linears else None
        if states is None:
            return original(own, x, mask, cache)
        rows = layer.compute(whole_rows(x, joint, of_joint, sums, step), states)
        states.check()
        return project(rows, output, x, sums, of_output, step)

    swaps.override(module, call)


def _joint(layers: list[nn.Module]) -> Weights:
    if len(layers) > 1:
        return join(layers)
    found = weights_of(layers[0])
    assert found is not None, "the layer was recognised"
    return found.ready()


def _delta_net(module: Any) -> _Layer | None:
    """Return a gated delta net of Qwen's, if `module` is one that the kernels support."""
    kind = ClassSwaps.original(module)
    separate = class_reads_like(kind, qwen3_5.GatedDeltaNet)
    if not separate and not class_reads_like(
        kind, qwen3_next.Qwen3NextGatedDeltaNet, "fix_query_key_value_ordering"
    ):
        return None
    key_heads, heads = module.num_k_heads, module.num_v_heads
    key_dim, dim, each = module.head_k_dim, module.head_v_dim, heads // key_heads
    norm, wide = module.norm, 2 * (key_dim + each * dim)
    if separate:
        if module.sharding_group is not None:
            return None
        layers = [module.in_proj_qkv, module.in_proj_z, module.in_proj_b, module.in_proj_a]
        channels = list(range(module.conv_dim))
        gates = [module.conv_dim + head * dim for head in range(heads)]
        first, per = module.conv_dim + module.value_dim, heads
    else:  # the heads of a key are side by side: query, key, values, gates
        layers = [module.in_proj_qkvz, module.in_proj_ba]
        starts = [head * wide for head in range(key_heads)]
        channels = [first + i for first in starts for i in range(key_dim)]
        channels += [first + key_dim + i for first in starts for i in range(key_dim)]
        values = [first + 2 * key_dim for first in starts]
        channels += [first + i for first in values for i in range(each * dim)]
        gates = [first + (each + i) * dim for first in values for i in range(each)]
        first, per = key_heads * wide, each
    if not (
        can_join(layers)
        and _fits_vectors(layers)
        and _is_kernel(module.conv1d)
        and "bias" not in module.conv1d
        and fits(key_dim)
        and dim % 32 == 0
        and reads_like(norm, qwen3_next.Qwen3NextRMSNormGated)
    ):
        return None
    columns, of_gates = _constant(channels[:: convolution.VECTOR]), _constant(gates)
    scalars = delta_rule.Scalars(
        first + per, first, per, _rates(module.A_log), _floats(module.dt_bias)
    )

    def compute(joint: mx.array, states: LayerStates) -> mx.array:
        weight = module.conv1d["weight"]
        mixed = states.replace(
            (weight.shape[1] - 1, weight.shape[0]),
            lambda before, segments: convolution.by_segments(
                joint, weight, before, segments, columns=columns, activate=True
            ),
        )
        y = states.replace(
            (heads, dim, key_dim),
            lambda before, segments: delta_rule.of_joint(
                mixed, joint, scalars, before, segments, key_heads, _EPSILON
            ),
        )
        return gated_norm.gated_norm(
            y.reshape(-1, heads * dim), joint, of_gates, norm["weight"], norm.eps
        )

    return _Layer(layers, module.out_proj, compute)


def _state_space(module: Any) -> _Layer | None:
    """Return a Mamba-2 mixer of Nemotron-H, if `module` is one that the kernels support."""
    kind = ClassSwaps.original(module)
    if not class_reads_like(kind, nemotron_h.NemotronHMamba2Mixer, "_conv", "_ssm"):
        return None
    heads, dim, groups = module.num_heads, module.head_dim, module.n_groups
    size, width, channels = module.ssm_state_size, module.intermediate_size, module.conv_dim
    norm = module.norm
    if not (
        weights_of(module.in_proj) is not None
        and _fits_vectors([module.in_proj])
        and _is_kernel(module.conv1d)
        and fits(size)
        and all(n % convolution.VECTOR == 0 for n in (width, channels))
        and reads_like(norm, nemotron_h.MambaRMSNormGated)
        and norm.group_size % 32 == 0
    ):
        return None
    columns = _constant(range(width, width + channels, convolution.VECTOR))
    of_gates = _constant(range(0, width, norm.group_size))
    steps = state_space.Steps(
        width + channels, _floats(module.dt_bias), *map(float, module.time_step_limit)
    )
    a, d = _rates(module.A_log), _floats(module.D)

    def compute(joint: mx.array, states: LayerStates) -> mx.array:
        weight = module.conv1d["weight"]
        mixed = states.replace(
            (weight.shape[1] - 1, weight.shape[0]),
            lambda before, segments: convolution.by_segments(
                joint, weight, before, segments, columns=columns,
                bias=module.conv1d.get("bias"), activate=True,
            ),
        )  # fmt: skip
        y = states.replace(
            (heads, dim, size),
            lambda before, segments: state_space.of_joint(
                mixed, joint, steps, a, d, before, segments, groups
            ),
        )
        return gated_norm.gated_norm(
            y.reshape(-1, width), joint, of_gates, norm.weight, norm.eps, before=True
        )

    return _Layer([module.in_proj], module.out_proj, compute)


def _fits_vectors(layers: list[Any]) -> bool:
    """Return whether rows of the layers' joint outputs begin where kernels can load vectors."""
    columns: int = sum(layer["weight"].shape[0] for layer in layers)
    return columns % convolution.VECTOR == 0


def _is_kernel(conv: nn.Module) -> bool:
    """Return whether a convolution is a short one, by channel, as the kernel computes it."""
    weight: mx.array = conv["weight"]
    how: Any = conv
    return (
        type(conv) is nn.Conv1d
        and (how.stride, how.padding, how.dilation) == (1, 0, 1)
        and weight.shape[2] == 1
        and weight.shape[1] <= convolution.LONGEST
    )


def _rates(logarithms: mx.array) -> mx.array:
    return _floats(-mx.exp(logarithms.astype(mx.float32)))


def _floats(array: mx.array) -> mx.array:
    made = array.astype(mx.float32)
    mx.eval(made)
    return made


def _constant(numbers: Any) -> mx.array:
    made = mx.array(list(numbers), mx.int32)
    mx.eval(made)
    return made
