"""Decoder layers by fused kernels, for GPUs.

In a step of few rows, launching a kernel takes the CPU longer than the GPU takes to run it. So
layers whose code reads like Llama's (`recognition`) run with joint projections, one kernel for
rotation and KV write, one for add + RMSNorm, and one for SwiGLU. Models keep their classes and
parameters; layers that are not recognised run unchanged. `fuse` is the entry point.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import deepseek_v3, llama, qwen3
from mlx_lm.models.mla import MultiLinear, QuantizedMultiLinear

from modelpack_engine.attention.cache_handle import RowMask
from modelpack_engine.attention.kv_pools import TokenMajorPools
from modelpack_engine.attention.metadata import StepInputs
from modelpack_engine.attention.paged import PagedKV
from modelpack_engine.layers import expert_kernels, kernels
from modelpack_engine.layers.add_norm import Sums
from modelpack_engine.layers.kernels import find_rotation
from modelpack_engine.layers.matmul import (
    FEW_ROWS,
    Weights,
    can_join,
    join,
    multiply_in_parts,
    swiglu,
    weights_of,
)
from modelpack_engine.patches.class_swaps import Call, ClassSwaps
from modelpack_engine.patches.experts import fuse_experts, fuse_router, has_experts
from modelpack_engine.patches.recognition import reads_like


def fuse_heads(module: nn.Module, step: StepInputs, swaps: ClassSwaps) -> bool:
    """Multiply all rows of a step by head in one matmul; return whether `module` is such a layer.

    mlx-lm's latent attention multiplies [rows, heads, 1, in] by [heads, in, out]. On CUDA that is
    rows times heads matmuls of one row, and each reads the weights again: 0.12 ms for 64 rows of
    DeepSeek's shape. With heads first, it is one matmul per head.
    """
    if not isinstance(module, MultiLinear | QuantizedMultiLinear):
        return False

    def call(original: Call, heads: Any, x: mx.array, transpose: bool = True) -> Any:
        if not step.active or x.ndim != 4 or x.shape[2] != 1 or x.shape[0] == 1:
            return original(heads, x, transpose)
        by_heads = mx.contiguous(x[:, :, 0].swapaxes(0, 1))
        return original(heads, by_heads, transpose).swapaxes(0, 1)[:, :, None]

    swaps.override(module, call)
    return True


_FLOATS = (mx.float16, mx.bfloat16, mx.float32)


def fuse(
    model: nn.Module,
    owners: dict[int, PagedKV],
    sums: Sums,
    step: StepInputs,
    swaps: ClassSwaps,
    inner: nn.Module | None = None,
) -> dict[str, int]:
    """Run the recognised layers of `model` by fused kernels within steps.

    `owners` are the caches of attention modules, by the modules' identity; `inner` is the model
    without its head. Returns the number of fused layers by kind. Calls outside of a step are
    unchanged.
    """
    counts: dict[str, int] = {}

    def count(kind: str) -> None:
        counts[kind] = counts.get(kind, 0) + 1

    blocks = False
    mixtures = has_experts(model) and all(
        expert_kernels.verdict(dtype) is None
        for dtype in {kv.layout.dtype for kv in owners.values()}
    )
    last = _last_layer(inner)
    for _, module in list(model.named_modules()):
        if reads_like(module, llama.MLP) and _fuse_mlp(module, sums, step, swaps):
            count("MLP")
        elif id(module) in owners and _fuse_attention(module, owners[id(module)], sums, swaps):
            count("attention")
        elif _is_block(module):
            _fuse_block(module, sums, step, swaps, is_last=module is last)
            blocks = True
            count("block")
        elif fuse_heads(module, step, swaps):
            count("heads")
        elif mixtures and fuse_experts(module, step, swaps):
            count("experts")
        elif mixtures and fuse_router(module, step, swaps):
            count("router")
        elif type(module) is nn.Embedding:
            _fuse_embedding(module, step, swaps)
    if blocks:
        for _, module in model.named_modules():
            if type(module) is nn.RMSNorm:
                _fuse_norm(module, sums, step, swaps)
    return counts


def _is_block(module: nn.Module) -> bool:
    return reads_like(module, llama.TransformerBlock) or reads_like(
        module, deepseek_v3.DeepseekV3DecoderLayer
    )


def _last_layer(inner: nn.Module | None) -> nn.Module | None:
    layers = getattr(inner, "layers", None)
    return layers[-1] if isinstance(layers, list) and layers else None


def _fuse_block(
    module: nn.Module, sums: Sums, step: StepInputs, swaps: ClassSwaps, *, is_last: bool
) -> None:
    """Fuse a block; the last one drops rows that are not sampled after its attention."""

    def call(original: Call, block: Any, x: mx.array, mask: Any = None, cache: Any = None) -> Any:
        if not step.active or cache is None:
            return original(block, x, mask, cache)
        attended = block.self_attn(block.input_layernorm(x), mask, cache)
        if is_last and x.shape[0] == step.num_rows and step.samples_few:
            x, attended = (sums.take(array, step.sample_rows) for array in (x, attended))
            step.rows_taken = True
        hidden = sums.add(x, attended)
        return sums.add(hidden, block.mlp(block.post_attention_layernorm(hidden)))

    swaps.override(module, call)


def _fuse_embedding(module: nn.Module, step: StepInputs, swaps: ClassSwaps) -> None:
    def call(original: Call, embedding: Any, x: mx.array) -> Any:
        table = embedding["weight"]
        if not step.active or x.dtype != mx.int32 or table.dtype not in _FLOATS:
            return original(embedding, x)
        return kernels.take_rows(table, x.reshape(-1)).reshape(*x.shape, -1)

    swaps.override(module, call)


def _fuse_norm(module: nn.Module, sums: Sums, step: StepInputs, swaps: ClassSwaps) -> None:
    def call(original: Call, norm: Any, x: mx.array) -> Any:
        terms = sums.terms(x) if step.active else None
        if terms is None or x.dtype not in _FLOATS or terms[0].dtype != x.dtype:
            return original(norm, sums.value(x) if step.active else x)
        a, parts = terms
        total, out = kernels.add_norm(a, parts.array, parts.count, norm["weight"], norm.eps)
        sums.set_made(x, total)
        return out

    swaps.override(module, call)


def _fuse_mlp(module: Any, sums: Sums, step: StepInputs, swaps: ClassSwaps) -> bool:
    layers = [module.gate_proj, module.up_proj]
    sizes = {layer["weight"].shape[0] for layer in layers}
    if not can_join(layers) or len(sizes) != 1:
        return False
    joint, down = join(layers), _ready(module.down_proj)

    def call(original: Call, mlp: Any, x: mx.array) -> Any:
        if not step.active:
            return original(mlp, x)
        found = swiglu(x, joint)
        return _project(found, down, x, sums)

    swaps.override(module, call)
    return True


def _fuse_attention(module: Any, paged: PagedKV, sums: Sums, swaps: ClassSwaps) -> bool:
    norms = None
    if reads_like(module, qwen3.Attention):
        if type(module.q_norm) is not nn.RMSNorm or type(module.k_norm) is not nn.RMSNorm:
            return False
        norms = module.q_norm["weight"], module.k_norm["weight"], module.q_norm.eps
        if module.k_norm.eps != module.q_norm.eps or norms[0].dtype != norms[1].dtype:
            return False
    elif not reads_like(module, llama.Attention):
        return False
    layers = [module.q_proj, module.k_proj, module.v_proj]
    rotation = find_rotation(module.rope)
    layout = paged.layout
    dim = layout.key_dim
    heads = module.n_heads, module.n_kv_heads
    sizes = [layer["weight"].shape[0] for layer in layers]
    fits = (
        sizes == [heads[0] * dim, heads[1] * dim, heads[1] * dim]
        and layout.value_dim == dim
        and layout.key_heads == layout.value_heads == heads[1]
        and dim % 32 == 0
    )
    if rotation is None or not fits or not can_join(layers):
        return False
    joint, output = join(layers), _ready(module.o_proj)
    scale = module.scale

    def call(
        original: Call, attention: Any, x: mx.array, mask: Any = None, cache: Any = None
    ) -> Any:
        pools = cache.pools if isinstance(cache, PagedKV) else None
        if not isinstance(pools, TokenMajorPools) or cache.layout.quantised is not None:
            return original(attention, x, mask, cache)
        rows = multiply_in_parts(x, joint)
        window = mask.window if isinstance(mask, RowMask) else None
        step = cache.step
        angles = None
        if x.shape[0] > FEW_ROWS:  # fewer rows are rotated sooner than a table is made
            angles = step.remember(
                ("angles", id(rotation)), lambda: rotation.angles(step.positions)
            )
        q = kernels.rotate_and_write(
            rows.array,
            rows.count,
            x.dtype,
            pools,
            step.positions,
            step.slots,
            rotation,
            heads,
            norms,
            angles,
        )
        out = cache.attend_rows(q, scale=scale, window=window)
        return _project(out, output, x, sums)

    swaps.override(module, call)
    return True


def _ready(layer: nn.Module) -> Weights | nn.Module:
    """Return the weights of a linear layer that our kernels support, else the layer itself."""
    weights = weights_of(layer)
    return layer if weights is None else weights.ready()


def _project(rows: mx.array, by: Weights | nn.Module, like: mx.array, sums: Sums) -> mx.array:
    """Project rows [rows, ...] to the leading shape of `like`; `sums` adds up partial results."""
    if not isinstance(by, Weights):
        return by(rows.reshape(*like.shape[:-1], -1))  # type: ignore[no-any-return]
    shape = (*like.shape[:-1], by.num_outputs)
    return sums.of_parts(multiply_in_parts(rows, by), shape, like.dtype)
