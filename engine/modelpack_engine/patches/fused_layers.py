"""Decoder layers and mixtures of experts by fused kernels, for GPUs.

In a step of few rows, launching a kernel takes the CPU longer than the GPU takes to run it. Layers
whose code reads like Llama's therefore run with joint projections, one kernel for rotation, KV
write and, where rows decode, attention, one for add + RMSNorm, and one for SwiGLU; routers of
experts, up to fourteen kernels in mlx-lm, run as one. Models keep their classes and parameters;
layers that `reads_like` does not recognise run unchanged. `fuse` is the entry point.
"""

from __future__ import annotations

import ast
import inspect
import sys
import textwrap
from collections import Counter
from collections.abc import Callable
from functools import cache, partial
from types import CodeType, FunctionType
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import deepseek_v3, llama, nemotron_h, qwen3, qwen3_moe, qwen3_next
from mlx_lm.models.mla import MultiLinear, QuantizedMultiLinear
from mlx_lm.models.switch_layers import (
    QuantizedSwitchLinear,
    SwiGLU,
    SwitchGLU,
    SwitchLinear,
    SwitchMLP,
)

from modelpack_engine.attention.cache_handle import RowMask
from modelpack_engine.attention.kv_pools import TokenMajorPools
from modelpack_engine.attention.metadata import JointLayers, StepInputs
from modelpack_engine.attention.paged import PagedKV
from modelpack_engine.layers import adapters, dots, expert_kernels, kernels, rotated_attention
from modelpack_engine.layers.adapters import RowAdapters
from modelpack_engine.layers.add_norm import Sums
from modelpack_engine.layers.blocks import BlockSwitchLinear
from modelpack_engine.layers.expert_kernels import Dispatch, Routing, route
from modelpack_engine.layers.kernels import find_rotation, no_rotation, take_rows
from modelpack_engine.layers.matmul import (
    FEW_ROWS,
    Parts,
    embedded,
    multiply,
    multiply_in_parts,
)
from modelpack_engine.layers.weights import (
    Weights,
    can_join,
    join,
    quantised_weights,
    weights_of,
)
from modelpack_engine.patches import functions
from modelpack_engine.patches.modules import Call, ClassSwaps, axes_of_pairs, parsed

#: The type of compiled functions, which have no reference to the original function.
_COMPILED = type(mx.compile(lambda x: x))


def reads_like(module: nn.Module, known: type[nn.Module]) -> bool:
    """Return whether calls of `module` and of instances of `known` compute the same.

    They do if the source is the same, and the global names in it mean the same.
    """
    return class_reads_like(type(module), known)


def class_reads_like(kind: type[nn.Module], known: type[nn.Module], *methods: str) -> bool:
    """Return whether calls of instances of both classes compute the same, as for `reads_like`.

    `methods` are those that the calls use.
    """
    return all(
        hasattr(kind, name) and _reads_like(getattr(kind, name), getattr(known, name))
        for name in ("__call__", *methods)
    )


def _reads_like(one: Any, other: Any) -> bool:
    if not isinstance(one, FunctionType) or not isinstance(other, FunctionType):
        return False
    return one is other or (
        _text(one.__code__) is not None
        and _text(one.__code__) == _text(other.__code__)
        and _means_the_same(one, other)
    )


@cache
def _text(code: CodeType) -> str | None:
    """Return a function's source without annotations and docstring, or None if it has none."""
    try:
        tree = parsed(textwrap.dedent(inspect.getsource(code)))
    except (OSError, TypeError, SyntaxError):
        return None
    definition = tree.body[0]
    if not isinstance(definition, ast.FunctionDef):
        return None
    return _bare(definition)


def _bare(definition: ast.FunctionDef) -> str:
    definition.returns = None
    for argument in (*definition.args.args, *definition.args.kwonlyargs):
        argument.annotation = None
    if ast.get_docstring(definition) is not None:
        del definition.body[0]
    return ast.dump(definition)


def _means_the_same(one: FunctionType, other: FunctionType) -> bool:
    """Return whether both find the same objects under the global names that they use."""
    names = [name for name in other.__code__.co_names if name in other.__globals__]
    return all(_meaning(one, name) == _meaning(other, name) for name in names)


def _meaning(function: FunctionType, name: str) -> object:
    """Return the object behind a global name of a function, in a form that can be compared.

    The engine's SwiGLU counts as mlx-lm's; a compiled function is represented by its source.
    """
    meaning = function.__globals__.get(name)
    if meaning is functions.swiglu:
        return functions.native_swiglu
    if type(meaning) is _COMPILED:
        return _definition(function.__module__, name) or meaning
    return meaning


@cache
def _definition(module: str, name: str) -> str | None:
    """Return the source of a function that a module defines, or None if it does not."""
    try:
        tree = parsed(inspect.getsource(sys.modules[module]))
    except (KeyError, OSError, TypeError, SyntaxError):
        return None
    found = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == name]
    return _bare(found[0]) if len(found) == 1 else None


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
    counts: Counter[str] = Counter()
    of_pairs = axes_of_pairs(model)
    mixtures = has_experts(model) and all(
        expert_kernels.verdict(dtype) is None
        for dtype in {kv.layout.dtype for kv in owners.values()}
    )
    last = _last_layer(inner)
    for name, module in list(model.named_modules()):
        if reads_like(module, llama.MLP) and _fuse_mlp(module, sums, step, swaps):
            counts["MLP"] += 1
        elif id(module) in owners and _fuse_attention(
            module, owners[id(module)], of_pairs, sums, swaps
        ):
            counts["attention"] += 1
        elif _is_block(module):
            _fuse_block(module, sums, step, swaps, is_last=module is last)
            counts["block"] += 1
        elif reads_like(module, nemotron_h.NemotronHBlock):
            _fuse_single_block(module, sums, step, swaps)
            counts["block"] += 1
        elif reads_like(module, nemotron_h.NemotronHMLP):
            _fuse_squared_mlp(module, sums, step, swaps)
            counts["MLP"] += 1
        elif fuse_heads(module, step, swaps):
            counts["heads"] += 1
        elif mixtures and fuse_experts(module, step, swaps):
            counts["experts"] += 1
            step.adapters.bypassed += _expert_layers(module)
        elif mixtures and fuse_router(module, sums, step, swaps):
            counts["router"] += 1
            step.adapters.bypassed += [module[name] for name in _ROUTERS if name in module]
        elif type(module) in (nn.Embedding, nn.QuantizedEmbedding):
            _fuse_embedding(module, step, swaps)
            _fuse_head(module, step, swaps, "as_linear")
        elif name.rpartition(".")[2] == "lm_head" and weights_of(module) is not None:
            _fuse_head(module, step, swaps, "__call__")
    if counts["block"]:
        for _, module in model.named_modules():
            if type(module) is nn.RMSNorm:
                _fuse_norm(module, sums, step, swaps)
    return counts


def _is_block(module: nn.Module) -> bool:
    known = (
        llama.TransformerBlock,
        deepseek_v3.DeepseekV3DecoderLayer,
        qwen3_next.Qwen3NextDecoderLayer,
    )
    return any(reads_like(module, kind) for kind in known)


def _last_layer(inner: nn.Module | None) -> nn.Module | None:
    layers = getattr(inner, "layers", None)
    return layers[-1] if isinstance(layers, list) and layers else None


def _fuse_block(
    module: nn.Module, sums: Sums, step: StepInputs, swaps: ClassSwaps, *, is_last: bool
) -> None:
    """Fuse a block; the last one drops rows that are not sampled after its attention."""

    def call(original: Call, block: Any, x: mx.array, mask: Any = None, cache: Any = None) -> Any:
        if not step.fuses_linears or cache is None:
            return original(block, x, mask, cache)
        mixer = block.linear_attn if getattr(block, "is_linear", False) else block.self_attn
        attended = mixer(block.input_layernorm(x), mask, cache)
        if is_last and x.shape[0] == step.num_rows and step.samples_few:
            x, attended = (sums.take(array, step.sample_rows) for array in (x, attended))
            if step.adapters.slots is not None:
                step.adapters.slots = kernels.take(step.adapters.slots, step.sample_rows)
            step.rows_taken = True
        hidden = sums.add(x, attended)
        return sums.add(hidden, block.mlp(block.post_attention_layernorm(hidden)))

    swaps.override(module, call)


def _fuse_single_block(module: nn.Module, sums: Sums, step: StepInputs, swaps: ClassSwaps) -> None:
    """Fuse a block of Nemotron-H: attention, a recurrent layer, an MLP or experts."""

    def call(original: Call, block: Any, x: mx.array, mask: Any = None, cache: Any = None) -> Any:
        if not step.fuses_linears:
            return original(block, x, mask, cache)
        more = {"mask": mask, "cache": cache} if block.block_type in "M*" else {}
        return sums.add(x, block.mixer(block.norm(x), **more))

    swaps.override(module, call)


def _fuse_squared_mlp(module: Any, sums: Sums, step: StepInputs, swaps: ClassSwaps) -> None:
    up, down = ready(module.up_proj), ready(module.down_proj)
    of_up, of_down = step.adapters.join(module.up_proj), step.adapters.join(module.down_proj)

    def call(original: Call, mlp: Any, x: mx.array) -> Any:
        if not step.fuses_linears:
            return original(mlp, x)
        if isinstance(up, Weights):
            rows = whole_rows(x, up, of_up, sums, step)
        else:
            rows = up(x.reshape(x.shape[0], -1))
        return project(kernels.squared(rows), down, x, sums, of_down, step)

    swaps.override(module, call)


def _fuse_embedding(module: nn.Module, step: StepInputs, swaps: ClassSwaps) -> None:
    weights = weights_of(module)
    assert weights is not None, "an embedding has weights"
    if weights.bits is None and weights.weight.dtype not in _FLOATS:
        return

    def call(original: Call, embedding: Any, x: mx.array) -> Any:
        rows = None
        if step.fuses_linears and x.dtype == mx.int32:
            rows = embedded(x.reshape(-1), weights)
        return original(embedding, x) if rows is None else rows.reshape(*x.shape, -1)

    swaps.override(module, call)


def _fuse_head(module: nn.Module, step: StepInputs, swaps: ClassSwaps, method: str) -> None:
    """Multiply by the head as by other layers: few rows by our kernels."""
    weights = weights_of(module)
    assert weights is not None, "a linear layer or an embedding"
    weights = weights.ready()

    def call(original: Call, head: Any, x: mx.array) -> Any:
        if not step.active:
            return original(head, x)
        rows = x.reshape(-1, x.shape[-1])
        return multiply(rows, weights).reshape(*x.shape[:-1], -1)

    swaps.override(module, call, method)


def _fuse_norm(module: nn.Module, sums: Sums, step: StepInputs, swaps: ClassSwaps) -> None:
    def call(original: Call, norm: Any, x: mx.array) -> Any:
        if not step.active:
            return original(norm, x)
        out = sums.norm(x, norm["weight"], norm.eps) if x.dtype in _FLOATS else None
        return original(norm, sums.value(x)) if out is None else out

    swaps.override(module, call)


def _fuse_mlp(module: Any, sums: Sums, step: StepInputs, swaps: ClassSwaps) -> bool:
    layers = [module.gate_proj, module.up_proj]
    sizes = {layer["weight"].shape[0] for layer in layers}
    if not can_join(layers) or len(sizes) != 1:
        return False
    joint, down = join(layers), ready(module.down_proj)
    of_gates, of_down = step.adapters.join(*layers), step.adapters.join(module.down_proj)

    def call(original: Call, mlp: Any, x: mx.array) -> Any:
        if not step.fuses_linears:
            return original(mlp, x)
        added = row_adapters(x, of_gates, step)
        if added is None:
            hidden = sums.swiglu(x, joint)
        else:
            hidden = adapters.add(sums.multiply(x, joint, in_rows=True), added, gated=True)
        return project(hidden, down, x, sums, of_down, step)

    swaps.override(module, call)
    return True


def _fuse_attention(
    module: Any, paged: PagedKV, of_pairs: tuple[int, ...] | None, sums: Sums, swaps: ClassSwaps
) -> bool:
    """Fuse a module that reads like Llama's, whose pairs are rotated by axes `of_pairs`."""
    unturned = reads_like(module, nemotron_h.NemotronHAttention)
    norms, gated = None, reads_like(module, qwen3_next.Qwen3NextAttention)
    if gated or reads_like(module, qwen3.Attention):
        if type(module.q_norm) is not nn.RMSNorm or type(module.k_norm) is not nn.RMSNorm:
            return False
        norms = module.q_norm["weight"], module.k_norm["weight"], module.q_norm.eps
        if module.k_norm.eps != module.q_norm.eps or norms[0].dtype != norms[1].dtype:
            return False
    elif not reads_like(module, llama.Attention) and not unturned:
        return False
    layers = [module.q_proj, module.k_proj, module.v_proj]
    rotation = no_rotation() if unturned else find_rotation(module.rope)
    layout = paged.layout
    dim = layout.key_dim
    heads = _numbers_of_heads(module)
    sizes = [layer["weight"].shape[0] for layer in layers]
    fits = (
        sizes == [(1 + gated) * heads[0] * dim, heads[1] * dim, heads[1] * dim]
        and layout.value_dim == dim
        and layout.key_heads == layout.value_heads == heads[1]
        and dim % 32 == 0
    )
    if rotation is None or not fits:
        return False
    of_values: tuple[Weights, JointLayers] | None = None
    if not can_join(layers):  # GGUF's mixes have more bits for values
        own = weights_of(layers.pop())
        if not can_join(layers) or own is None or kernels.own_values_verdict(layout.dtype):
            return False
        of_values = own.ready(), paged.step.adapters.join(module.v_proj)
    joint, output = join(layers), ready(module.o_proj)
    of_heads = paged.step.adapters.join(*layers)
    of_output = paged.step.adapters.join(module.o_proj)
    scale = module.scale
    axis_of: mx.array | None = None  # as in `rotate_by_axes`, for rotations without scaling
    is_plain = type(getattr(module, "rope", None)) is nn.RoPE
    if of_pairs is not None and is_plain and len(of_pairs) == rotation.dims // 2:
        axis_of = mx.array(of_pairs, mx.int32)
        mx.eval(axis_of)

    def call(
        original: Call, attention: Any, x: mx.array, mask: Any = None, cache: Any = None
    ) -> Any:
        pools = cache.pools if isinstance(cache, PagedKV) else None
        if (
            not isinstance(pools, TokenMajorPools)
            or cache.layout.quantised is not None
            or not cache.step.fuses_linears
            or (cache.step.positions.axes and axis_of is None)
        ):
            return original(attention, x, mask, cache)
        step = cache.step
        if gated or row_adapters(x, of_heads, step) is not None:
            rows = Parts(whole_rows(x, joint, of_heads, sums, step), 1)
        else:
            rows = sums.multiply(x, joint)
        values = None if of_values is None else whole_rows(x, *of_values, sums, step)
        window = mask.window if isinstance(mask, RowMask) else None
        angles, axes = None, [axis.rows for axis in step.positions.axes]
        if not gated and not axes and step.rows_alone:
            found = rotated_attention.attend(
                rows.array, rows.count, x.dtype, pools, step.positions.rows, step.slots, rotation,
                heads, norms, *step.decode_rows(),
                scale=scale, window=cache.seen(window), block_size=step.block_size, values=values,
            )  # fmt: skip
            if found is not None:
                return project(found, output, x, sums, of_output, step)
        if axes and axis_of is not None:
            angles = step.remember(
                ("angles", id(rotation)), partial(rotation.angles_by_axes, axes, axis_of)
            )
        # For fewer rows, a table takes longer than the rotation.
        elif x.shape[0] > FEW_ROWS and rotation.dims:
            angles = step.remember(
                ("angles", id(rotation)), lambda: rotation.angles(step.positions.rows)
            )
        q = kernels.rotate_and_write(
            rows.array, rows.count, x.dtype, pools, step.positions.rows, step.slots, rotation,
            heads, norms, angles, gated=gated, values=values,
        )  # fmt: skip
        out = cache.attend_rows(q, scale=scale, window=window)
        if gated:
            out = kernels.gate_heads(out, rows.array, heads[0])
        return project(out, output, x, sums, of_output, step)

    swaps.override(module, call)
    return True


def _numbers_of_heads(module: Any) -> tuple[int, int]:
    """Return the numbers of query and KV heads, by the names that classes give them."""
    queries = ("n_heads", "num_attention_heads", "num_heads")
    keys = ("n_kv_heads", "num_key_value_heads")
    of_queries, of_keys = (
        next(getattr(module, name) for name in names if hasattr(module, name))
        for names in (queries, keys)
    )
    return of_queries, of_keys


def ready(layer: nn.Module) -> Weights | nn.Module:
    """Return the weights of a linear layer that our kernels support, else the layer itself."""
    weights = weights_of(layer)
    return layer if weights is None else weights.ready()


def project(
    rows: mx.array,
    by: Weights | nn.Module,
    like: mx.array,
    sums: Sums,
    joint: JointLayers,
    step: StepInputs,
) -> mx.array:
    """Project rows [rows, ...] to the leading shape of `like`; `sums` adds up partial results."""
    if not isinstance(by, Weights):
        return by(rows.reshape(*like.shape[:-1], -1))  # type: ignore[no-any-return]
    shape = (*like.shape[:-1], by.num_outputs)
    added = row_adapters(rows, joint, step)
    parts = sums.multiply(rows, by, in_rows=added is not None)
    if added is not None:
        return sums.of_adapted(parts, added, shape, like.dtype)
    return sums.of_parts(parts, shape, like.dtype)


def whole_rows(
    x: mx.array, by: Weights, joint: JointLayers, sums: Sums, step: StepInputs
) -> mx.array:
    """Return rows x [rows, ...] times the weights, with what adapters add, in x's type."""
    added = row_adapters(x, joint, step)
    if added is None:
        return sums.whole(x, by)
    return adapters.add(sums.multiply(x, by, in_rows=True), added)


def row_adapters(x: mx.array, joint: JointLayers, step: StepInputs) -> RowAdapters | None:
    """Return what the adapters of rows x [rows, ...] add to these layers; None if nothing."""
    slots = step.adapters.slots
    if slots is None or joint.matrices is None:
        return None
    return RowAdapters(x, *joint.matrices, slots, joint.sizes, step.num_decode)


#: The layers of a mixture whose weights a fused router reads.
_ROUTERS = ("gate", "shared_expert_gate")
#: Limits of the kernel, of which each lane holds a 32nd of the experts and all groups.
_MOST_EXPERTS, _MOST_GROUPS = 1024, 32


def fuse_router(module: Any, sums: Sums, step: StepInputs, swaps: ClassSwaps) -> bool:
    """Run a router by one kernel within steps; return whether `module` is, or has, a router."""
    # The routers differ in what Nemotron-H's adds to the sum of sigmoids: 1e-20.
    if reads_like(module, deepseek_v3.MoEGate) or reads_like(module, nemotron_h.MoEGate):
        return _fuse_gate(module, step, swaps)
    if reads_like(module, nemotron_h.NemotronHMoE):
        return _fuse_shared_experts(module, sums, step, swaps)
    if reads_like(module, qwen3_moe.Qwen3MoeSparseMoeBlock):
        return _fuse_experts_block(module, step, swaps, _mixed)
    if reads_like(module, qwen3_next.Qwen3NextSparseMoeBlock):
        gate = ready(module.shared_expert_gate)
        rest = partial(_mixed_and_shared, sums, gate)
        return isinstance(gate, Weights) and _fuse_experts_block(module, step, swaps, rest)
    return False


def _fuse_gate(module: Any, step: StepInputs, swaps: ClassSwaps) -> bool:
    """Fuse a router like DeepSeek V3's: sigmoids and a bias, experts in groups."""
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
        if not step.fuses_experts:
            return original(gate, x)
        return _routed(
            x, Weights.plain(gate.weight), routing, gate.e_score_correction_bias, mx.float32
        )

    swaps.override(module, call)
    return True


def _fuse_experts_block(module: Any, step: StepInputs, swaps: ClassSwaps, rest: Any) -> bool:
    """Fuse Qwen's router, a softmax; `rest` computes the rest of the block."""
    weights = weights_of(module.gate)
    if weights is None or not module.top_k <= weights.num_outputs <= _MOST_EXPERTS:
        return False
    routing = Routing(module.top_k, normed=bool(module.norm_topk_prob))

    def call(original: Call, block: Any, x: mx.array) -> Any:
        if not step.fuses_experts or block.sharding_group is not None:
            return original(block, x)
        weights = weights_of(block.gate)
        assert weights is not None, "the router is a linear layer"
        return rest(block, x, *_routed(x, weights, routing, None, x.dtype))

    swaps.override(module, call)
    return True


def _routed(
    x: mx.array, weights: Weights, routing: Routing, bias: mx.array | None, dtype: mx.Dtype
) -> tuple[mx.array, mx.array]:
    """Return experts and scores [..., top_k] of x [..., in]."""
    logits = multiply_in_parts(x.reshape(-1, x.shape[-1]), weights).array
    shape = (*x.shape[:-1], routing.top_k)
    chosen, scores = route(logits, routing, bias, dtype, x.dtype)
    return chosen.reshape(shape), scores.reshape(shape)


def _mixed(block: Any, x: mx.array, chosen: mx.array, scores: mx.array) -> Any:
    given = block.switch_mlp(x, chosen)
    return (given * scores[..., None]).sum(axis=-2).astype(given.dtype)


def _mixed_and_shared(
    sums: Sums, gate: Weights, block: Any, x: mx.array, chosen: mx.array, scores: mx.array
) -> Any:
    """Return the experts' sum, and what a shared expert adds by a gate for each row."""
    rows = _mixed(block, x, chosen, scores).reshape(-1, x.shape[-1])
    gates = multiply(x.reshape(rows.shape[0], -1), gate)
    shared = sums.parts(block.shared_expert(x))
    return kernels.add_rows(rows, shared.array, shared.count, gates).reshape(x.shape)


def _fuse_shared_experts(module: Any, sums: Sums, step: StepInputs, swaps: ClassSwaps) -> bool:
    """Fuse Nemotron-H's experts: their sum, and the experts that all rows share."""
    if module.moe_latent_size is not None or module.config.n_shared_experts is None:
        return False

    def call(original: Call, block: Any, x: mx.array) -> Any:
        if not step.fuses_experts:
            return original(block, x)
        rows = _mixed(block, x, *block.gate(x)).reshape(-1, x.shape[-1])
        shared = sums.parts(block.shared_experts(x))
        return kernels.add_rows(rows, shared.array, shared.count).reshape(x.shape)

    swaps.override(module, call)
    return True


#: The most pairs of row and expert that are not sorted by expert.
_FEW_PAIRS = 16


def has_experts(model: nn.Module) -> bool:
    """Return whether a model has experts; their kernels take seconds to compile."""
    return any(_expert_layers(module) for _, module in model.named_modules())


def _expert_layers(module: Any) -> list[Any]:
    """Return the layers of experts, the last one last; none of a module that is not fused."""
    kind: Any = ClassSwaps.original(module)
    if kind is SwitchGLU:
        return [module.gate_proj, module.up_proj, module.down_proj]
    if kind is SwitchMLP and type(module.activation) is nn.ReLU2:
        return [module.fc1, module.fc2]
    return []


def fuse_experts(module: nn.Module, step: StepInputs, swaps: ClassSwaps) -> bool:
    """Run experts by fused kernels within steps; return whether `module` has experts."""
    layers = _expert_layers(module)
    kinds = (SwitchLinear, QuantizedSwitchLinear, BlockSwitchLinear)
    if not layers or any(type(layer) not in kinds for layer in layers):
        return False

    def call(original: Call, experts: Any, x: mx.array, indices: mx.array) -> Any:
        if not step.fuses_experts or x.dtype not in _FLOATS:
            return original(experts, x, indices)
        rows = x.reshape(-1, x.shape[-1])
        chosen = indices.reshape(rows.shape[0], -1).astype(mx.uint32)
        if indices.size <= _FEW_PAIRS:
            few = _few_expert_outputs(experts, rows, chosen, indices.shape)
            return original(experts, x, indices) if few is None else few
        given, sent = _expert_outputs(experts, rows, chosen)
        in_order = take_rows(given, sent.place).reshape(*indices.shape, -1)
        return _ExpertRows.of(in_order, lambda *by: expert_kernels.combine(given, sent.place, *by))

    swaps.override(module, call)
    return True


def _few_expert_outputs(
    experts: Any, rows: mx.array, chosen: mx.array, shape: tuple[int, ...]
) -> mx.array | None:
    """Return the outputs of few rows' experts; None if our kernels do not compute them."""
    *layers, last = _expert_layers(experts)
    (first, *others), down = [*map(_weights_of, layers)], _weights_of(last)
    if first is None or type(experts.activation) not in (SwiGLU, nn.ReLU2):
        return None
    if any(other is None or _kind(other) != _kind(first) for other in others) or not all(
        dots.fits(rows, weights)
        and dots.experts_verdict(rows.dtype, weights.bits or 16, weights.group_size or 64) is None
        for weights in (first, down)
        if weights is not None
    ):
        return None
    hidden = dots.multiply_experts(rows, first, others[0] if others else None, chosen)
    if not others:
        hidden = kernels.squared(hidden.reshape(chosen.size, -1)).reshape(hidden.shape)
    if down is None:
        pairs = hidden.reshape(chosen.size, 1, -1)
        outputs: mx.array = last(pairs, chosen.reshape(-1))
        return outputs.reshape(*shape, -1)
    given = dots.multiply_experts(
        hidden.reshape(chosen.size, -1), down, None, chosen.reshape(-1, 1)
    )
    return _ExpertRows.of(
        given.reshape(*shape, -1), lambda *by: dots.sum_experts(hidden, down, chosen, *by)
    )


def _expert_outputs(experts: Any, rows: mx.array, chosen: mx.array) -> tuple[mx.array, Dispatch]:
    """Return the experts' outputs, sorted by expert, and the dispatch that maps them to rows."""
    *layers, last = _expert_layers(experts)
    first, down = [*map(_weights_of, layers)], _weights_of(last)
    count, pairs = last["weight"].shape[0], chosen.size
    swiglu = type(experts.activation) is SwiGLU
    given = [weights for weights in first if weights is not None]
    tile = None
    if len(given) == len(layers) and len(set(map(_kind, given))) == 1:
        tile = expert_kernels.tile_for(rows, given[0], pairs, swiglu=swiglu)
    smallest = expert_kernels.SMALLEST_TILE
    smallest = smallest if pairs <= smallest * count else 2 * smallest
    sent = expert_kernels.dispatch(chosen, count, tile or smallest)
    if tile and swiglu:
        gate, up = given
        hidden = expert_kernels.multiply(rows, gate, sent, gather=True, multiplied=up)
    else:
        made = [
            expert_kernels.multiply(rows, weights, sent, gather=True)
            if tile and weights is not None
            else _by_layer(layer, rows, sent)
            for layer, weights in zip(layers, first, strict=True)
        ]  # gates before ups, of which the activation takes the ups first
        squares = len(layers) == 1
        hidden = kernels.squared(made[0]) if squares else experts.activation(*reversed(made))
    wanted = down and expert_kernels.tile_for(hidden, down, pairs, swiglu=swiglu)
    if tile and down is not None and tile == wanted:
        return expert_kernels.multiply(hidden, down, sent), sent
    return _by_layer(last, hidden, sent, gather=False), sent


def _by_layer(layer: Any, rows: mx.array, sent: Dispatch, *, gather: bool = True) -> mx.array:
    """Return rows times the weights of their experts, sorted by expert, as the layer does it.

    With `gather`, rows are in their original order.
    """
    if isinstance(layer, BlockSwitchLinear):
        found = layer.of_spans(rows, sent.spans, sent.tile, sent.source if gather else None)
        if found is not None:
            return found
    wide = take_rows(rows, sent.source) if gather else rows
    outputs: mx.array = layer(_one_by_one(wide), sent.experts, True)
    return outputs[:, 0]


def _one_by_one(rows: mx.array) -> mx.array:
    """Return rows [n, dim] as [n, 1, dim].

    Not by `rows[:, None]`: that axis has a stride of 1, which MLX's `gather_mm` on CUDA uses as
    the stride of the rows if the experts are sorted (seen with MLX 0.32.4).
    """
    return rows.reshape(rows.shape[0], 1, -1)


def _weights_of(layer: Any) -> Weights | None:
    """Return the parameters of a layer of experts, None for a block type; adapters swap classes."""
    if isinstance(layer, BlockSwitchLinear):
        return None
    if isinstance(layer, QuantizedSwitchLinear):
        return quantised_weights(layer)
    return Weights.plain(layer["weight"], layer.get("bias"))


def _kind(weights: Weights) -> tuple[Any, ...]:
    return (
        weights.weight.shape, weights.bits, weights.group_size, weights.mode, weights.bias is None,
    )  # fmt: skip


class _ExpertRows(mx.array):
    """Outputs of experts [..., each, dim]; multiplied by scores and summed by one kernel.

    `combined` returns the sums [rows, dim] for scores [rows, each], in a type.
    """

    combined: Callable[[mx.array, mx.Dtype], mx.array]

    @classmethod
    def of(cls, given: mx.array, combined: Callable[[mx.array, mx.Dtype], mx.array]) -> _ExpertRows:
        made = cls(given)
        made.combined = combined
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
        return self.rows.combined(self.scores, dtype).reshape(*self.shape[:-2], -1)


class _Combined(mx.array):
    """The sum over experts; `astype` has the kernel write the type.

    Also for the same type: this array is a copy of the kernel's, as any object of a subclass is.
    """

    weighted: _Weighted

    def astype(self, dtype: mx.Dtype, *args: Any, **kwargs: Any) -> mx.array:
        if dtype not in _FLOATS or args or kwargs:
            return mx.array.astype(self, dtype, *args, **kwargs)
        return self.weighted._combined(dtype)
