"""Linear layers in halves: two streams of the CPU compute one half of the outputs each.

At the few rows of a decoding step a layer waits for its weights to come from memory, and one core
cannot ask for them as fast as the memory answers two. The halves are views: no weight is copied.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from modelpack_engine.adaptation.swaps import Call, ClassSwaps

#: With fewer rows, or fewer multiplications, waking the second stream's thread takes longer than it
#: saves: the thread that builds the next step needs a processor too.
FEW_ROWS, FEW_PRODUCTS = 4, 3 << 20


def _multiply(
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
    # Folded once: a product of more than two dimensions is folded and unfolded by MLX, each half.
    rows = x.reshape(-1, x.shape[-1])
    product = mx.concatenate([rows @ first, mx.matmul(rows, second, stream=stream)], axis=-1)
    if "bias" in module:
        product = product + module["bias"]
    return product.reshape(*x.shape[:-1], -1)


def halve_linears(model: nn.Module, swaps: ClassSwaps, stream: mx.Stream) -> int:
    """Let linear layers of `model`, the head included, run in halves; return how many there are.

    `stream` computes the second halves.
    """
    count = 0
    for _, module in model.named_modules():
        if type(module) not in (nn.Linear, nn.Embedding):
            continue
        weight = module.weight
        middle = weight.shape[0] // 2
        halves = weight[:middle].T, weight[middle:].T
        method = "__call__" if isinstance(module, nn.Linear) else "as_linear"
        swaps.override(module, partial(_multiply, *halves, stream), method)
        count += 1
    return count
