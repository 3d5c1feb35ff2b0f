"""Calls of single modules that the engine replaces, and restores with `ClassSwaps.undo`.

`PATCHES` has the classes of mlx-lm that cannot run on token rows (one token of any sequence a row)
as they are. The other functions replace linear layers and the last layer's output of any model.
Outside of a step, or without a step's caches, the original call runs.
"""

from __future__ import annotations

import ast
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from threading import Lock
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from modelpack_engine.attention.cache_handle import KVHandle
from modelpack_engine.attention.metadata import Positions, StepInputs
from modelpack_engine.attention.paged import PagedKV
from modelpack_engine.kernels import recording
from modelpack_engine.layers.kernels import take_rows
from modelpack_engine.layers.matmul import multiply
from modelpack_engine.layers.weights import quantised_weights

Call = Callable[..., Any]
_parsing = Lock()


def parsed(source: str | bytes) -> ast.Module:
    """Return the syntax tree of a Python source; raises `SyntaxError`.

    Models are loaded in threads, and Python 3.11 counts the depth of all trees together: two at a
    time are a `SystemError` (https://github.com/python/cpython/issues/106905).
    """
    with _parsing:
        return ast.parse(source)


class ClassSwaps:
    """Replaced methods of a model's modules; `undo` restores the classes of the modules.

    A module gets a subclass of its class, and keeps its weights and parameter names.
    """

    def __init__(self) -> None:
        self._made: list[tuple[nn.Module, type[nn.Module], type[nn.Module]]] = []

    def override(self, module: nn.Module, call: Call, method: str = "__call__") -> None:
        """Replace `method` of this instance by `call(original, module, *args, **kwargs)`.

        `original` is the replaced method, as a function of the instance.
        """
        kind = type(module)
        original = getattr(kind, method)

        def replaced(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            return call(original, self, *args, **kwargs)

        made = type(kind.__name__, (kind,), {method: replaced, "swapped_from": kind})
        self._made.append((module, kind, made))
        module.__class__ = made

    @staticmethod
    def original(module: nn.Module) -> type[nn.Module]:
        """Return the class of a module before any of its methods was replaced."""
        kind = type(module)
        while (before := kind.__dict__.get("swapped_from")) is not None:
            kind = before
        return kind

    def undo(self) -> None:
        """Restore the class of every module, but not of those that others have replaced since."""
        while self._made:
            module, original, made = self._made.pop()
            if type(module) is made:
                module.__class__ = original


@dataclass(frozen=True, slots=True)
class Patch:
    """A replaced call of a class: why it is replaced, and when the patch can be removed."""

    call: Call
    reason: str
    until: str


#: Patches by the full name of the class, so that a lookup imports no model.
PATCHES: dict[str, Patch] = {}


def _patches(name: str, reason: str, *, until: str) -> Callable[[Call], Call]:
    def register(call: Call) -> Call:
        PATCHES[f"mlx_lm.models.{name}"] = Patch(call, reason, until)
        return call

    return register


def patch_modules(model: nn.Module, swaps: ClassSwaps) -> dict[str, str]:
    """Patch every module whose class is in `PATCHES`; return class names and reasons."""
    patched: dict[str, str] = {}
    for _, module in model.named_modules():
        kind = type(module)
        patch = PATCHES.get(f"{kind.__module__}.{kind.__qualname__}")
        if patch is not None:
            patched[kind.__name__] = patch.reason
            swaps.override(module, patch.call)
    return patched


@_patches(
    "gemma2.Attention",
    "caps its scores, which MLX's attention function cannot",
    until="mx.fast.scaled_dot_product_attention has a softcap, and mlx-lm passes it",
)
def _gemma2_attention(
    original: Call, module: Any, x: mx.array, mask: Any = None, cache: Any = None
) -> Any:
    if not isinstance(cache, PagedKV):
        return original(module, x, mask, cache)
    rows, length, _ = x.shape

    def heads(projected: mx.array, count: int) -> mx.array:
        return projected.reshape(rows, length, count, -1).transpose(0, 2, 1, 3)

    queries = module.rope(heads(module.q_proj(x), module.n_heads), offset=cache.offset)
    keys = module.rope(heads(module.k_proj(x), module.n_kv_heads), offset=cache.offset)
    cache.update_and_fetch(keys, heads(module.v_proj(x), module.n_kv_heads))
    softcap = module.attn_logit_softcapping
    output = cache.attend(queries, scale=module.scale, softcap=softcap)
    return module.o_proj(output.transpose(0, 2, 1, 3).reshape(rows, length, -1))


@_patches(
    "gpt_bigcode.GPTBigCodeModel",
    "looks up learned positions as one range for all rows",
    until="mlx-lm accepts an offset per row for learned positions",
)
def _gpt_bigcode(original: Call, module: Any, inputs: mx.array, cache: Any = None) -> Any:
    if not cache or not isinstance(cache[0], PagedKV):
        return original(module, inputs, cache)
    hidden = module.wte(inputs) + module.wpe(cache[0].offset)[:, None]
    for layer, layer_cache in zip(module.h, cache, strict=True):
        hidden = layer(hidden, None, cache=layer_cache)
    return module.ln_f(hidden)


@_patches(
    "afm7.KVReuseAttention",
    "derives positions from the number of keys",
    until="mlx-lm takes them from the cache's offset",
)
def _afm7_reuse(
    original: Call, module: Any, x: mx.array, keys: mx.array, values: mx.array, mask: Any = None
) -> Any:
    if not isinstance(keys, KVHandle) or not isinstance(keys.cache, PagedKV):
        return original(module, x, keys, values, mask)
    rows, length, _ = x.shape
    queries = module.q_proj(x).reshape(rows, length, module.n_heads, -1).transpose(0, 2, 1, 3)
    queries = module.q_norm(module.rope(queries, offset=keys.cache.offset))
    output = keys.cache.attend(queries, scale=module.scale)
    return module.out_proj(output.transpose(0, 2, 1, 3).reshape(rows, length, -1))


@_patches(
    "longcat_flash_ngram.NgramEmbedding",
    "keeps a state of varying size at the start of a sequence",
    until="mlx-lm pads the tokens that it keeps",
)
def _longcat_ngrams(original: Call, module: Any, input_ids: mx.array, cache: Any = None) -> Any:
    embedded = original(module, input_ids, cache)
    if cache is not None and (missing := module.n - 1 - cache[0].shape[1]) > 0:
        # Missing tokens count as 0, as does this padding.
        cache[0] = mx.pad(cache[0], [(0, 0), (missing, 0)])
    return embedded


def axes_of_pairs(model: nn.Module) -> tuple[int, ...] | None:
    """Return the axis that rotates each pair of a head's elements: 0 to 2, time, height and width.

    A section of `mrope_section` in the config is the number of pairs that one axis rotates; with
    `mrope_interleaved`, axes take turns. None without M-RoPE.
    """
    text = getattr(getattr(model, "args", None), "text_config", None)
    rope = text.get("rope_scaling") if isinstance(text, dict) else None
    sections = rope.get("mrope_section") if isinstance(rope, dict) else None
    if not isinstance(sections, list) or not isinstance(rope, dict):
        return None
    if rope.get("mrope_interleaved"):  # time, height, width, time, …, and time for the rest
        return tuple(i % 3 if i < 3 * sections[i % 3] else 0 for i in range(sum(sections)))
    return tuple(axis for axis, size in enumerate(sections) for _ in range(size))


@cache
def _selectors(axes: tuple[int, ...], in_pairs: bool, width: int) -> tuple[mx.array, mx.array]:
    """Return which elements of a head, bool [width], height and width rotate.

    With `in_pairs`, pairs are two elements that follow each other.
    """
    axis_of = [axis for axis in axes for _ in range(2)] if in_pairs else [*axes, *axes]
    axis_of += [0] * (width - len(axis_of))
    made = tuple(mx.array([axis == each for axis in axis_of]) for each in (1, 2))
    mx.eval(made)
    return made[0], made[1]


def rotate_by_axes(model: nn.Module, swaps: ClassSwaps) -> None:
    """Rotate rows with M-RoPE positions by them, in models that have `axes_of_pairs`.

    Pair i is elements i and i + dims / 2, or 2 i and 2 i + 1. Elements after the rotated ones stay
    as they are.
    """
    of_pairs = axes_of_pairs(model)
    if of_pairs is None:
        return

    def call(original: Call, module: Any, x: mx.array, offset: Any = 0) -> Any:
        axes = offset.axes if isinstance(offset, Positions) else ()
        if not axes:
            return original(module, x, offset)
        time, height, width = (original(module, x, axis) for axis in axes)
        by_height, by_width = _selectors(of_pairs, module.traditional, x.shape[-1])
        return mx.where(by_height, height, mx.where(by_width, width, time))

    for _, module in model.named_modules():
        if type(module) is nn.RoPE:
            swaps.override(module, call)


def add_to_layers(model: nn.Module, step: StepInputs, swaps: ClassSwaps) -> None:
    """Add `step.additions` to the output of layers, in models that have DeepStack.

    They are the first ones in Qwen3-VL and Qwen3-Omni, and those before each of `added_layers`
    otherwise.
    """
    args: Any = getattr(model, "args", None)
    layers: Any = model.layers
    after = [layer - 1 for layer in getattr(args, "added_layers", ())]
    if getattr(args, "model_type", "") in ("qwen3_omni_moe", "qwen3_vl", "qwen3_vl_moe"):
        after = list(range(len(layers)))

    def call(original: Call, module: Any, x: mx.array, *rest: Any, index: int, **named: Any) -> Any:
        made = original(module, x, *rest, **named)
        if index < len(step.additions):
            made = made + step.additions[index].reshape(made.shape)
        return made

    for index, layer in enumerate(after):
        swaps.override(layers[layer], partial(call, index=index))


def fold_quantised(model: nn.Module, swaps: ClassSwaps, *, dequantise: bool = False) -> int:
    """Flatten the input of every quantised layer to 2-D, the head's too; return their number.

    With `dequantise`, the engine's kernel may dequantise the weights for many rows.
    """

    def fold(original: Call, module: Any, x: mx.array) -> Any:
        rows = x.reshape(-1, x.shape[-1])
        if dequantise:
            weights = quantised_weights(module)
            if (group := getattr(module, "group", None)) is None:
                product = multiply(rows, weights)
            else:  # A sharded layer: the bias is added once, to the sum of the ranks' outputs.
                product = multiply(rows, replace(weights, bias=None))
                product = mx.distributed.all_sum(product, group=group)
                if weights.bias is not None:
                    product = product + weights.bias
        else:
            product = original(module, rows)
        return product.reshape(*x.shape[:-1], -1)

    count = 0
    for _, module in model.named_modules():
        if isinstance(module, (nn.QuantizedLinear, nn.QuantizedShardedToAllLinear)):
            swaps.override(module, fold)
        elif isinstance(module, nn.QuantizedEmbedding):
            swaps.override(module, fold, "as_linear")
        else:
            continue
        count += 1
    return count


#: With fewer rows, or fewer multiplications, waking the second stream's thread takes longer than it
#: saves: the thread that builds the next step needs a processor too.
FEW_ROWS, FEW_PRODUCTS = 4, 3 << 20


def _linear_in_halves(
    first: mx.array,
    second: mx.array,
    stream: mx.Stream,
    original: Call,
    module: nn.Module,
    x: mx.array,
) -> Any:
    outputs = first.shape[1] + second.shape[1]
    if x.size < FEW_ROWS * x.shape[-1] or x.size * outputs < FEW_PRODUCTS:
        return original(module, x)
    # Flattened here once: MLX would flatten and unflatten the input of each half.
    rows = x.reshape(-1, x.shape[-1])
    product = mx.concatenate([rows @ first, mx.matmul(rows, second, stream=stream)], axis=-1)
    if "bias" in module:
        product = product + module["bias"]
    return product.reshape(*x.shape[:-1], -1)


def halve_linears(model: nn.Module, swaps: ClassSwaps, stream: mx.Stream) -> int:
    """Split the linear layers of `model`, the head's too, over two streams; return their number.

    `stream` computes the second half of the outputs.
    """
    count = 0
    for _, module in model.named_modules():
        if type(module) not in (nn.Linear, nn.Embedding):
            continue
        weight = module.weight
        middle = weight.shape[0] // 2
        halves = weight[:middle].T, weight[middle:].T
        method = "__call__" if isinstance(module, nn.Linear) else "as_linear"
        swaps.override(module, partial(_linear_in_halves, *halves, stream), method)
        count += 1
    return count


def take_logit_rows(inner: nn.Module, step: StepInputs, swaps: ClassSwaps) -> None:
    """Make `inner`, the model without its head, return the step's sampled rows only.

    The outer model (head, scaling, softcap) then computes those rows only. Calls outside of a step
    (with a cache of mlx-lm's) are unchanged: `step.active` is false.
    """

    def call(original: Call, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        hidden = original(module, *args, **kwargs)
        if not step.active or not isinstance(hidden, mx.array) or hidden.shape[0] != step.num_rows:
            return hidden
        step.rows_taken = True
        if step.all_rows_sampled:
            return hidden
        step.adapters.take(step.sample_rows)
        if recording.active() is None:
            return hidden[step.sample_rows]
        rows = take_rows(hidden.reshape(len(hidden), -1), step.sample_rows)
        return rows.reshape(-1, *hidden.shape[1:])

    swaps.override(inner, call)
