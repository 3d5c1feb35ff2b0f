"""Folded quantised layers: they see all rows of a step as one matrix.

CUDA's quantised product does not fold leading dimensions: [rows, 1, dim] runs as a batch of single
rows, fifteen times slower than [rows, dim] at 128 rows. With many rows, weights are dequantised.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from modelpack_engine.adaptation.swaps import Call, ClassSwaps
from modelpack_engine.fusion.products import multiply, quantised_weights


def fold_quantised(model: nn.Module, swaps: ClassSwaps, *, dequantise: bool = False) -> int:
    """Fold every quantised layer of `model`, the head included; return how many there are.

    `dequantise` says whether weights may be dequantised by our kernel.
    """

    def fold(original: Call, module: Any, x: mx.array) -> Any:
        rows = x.reshape(-1, x.shape[-1])
        if dequantise:
            weights = quantised_weights(module)
            if (group := getattr(module, "group", None)) is None:
                product = multiply(rows, weights)
            else:  # parts of a product: the bias is added to their sum
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
