"""`fuse_heads`: one matmul per head for all rows equals mlx-lm's matmuls of single rows."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm.models.mla import MultiLinear

from modelpack_engine.patches.fused_layers import fuse_heads
from modelpack_engine.patches.modules import ClassSwaps

HEADS, INPUTS, OUTPUTS = 3, 64, 32


def product(bits: int | None) -> Any:
    mx.random.seed(4)
    layer = MultiLinear(INPUTS, OUTPUTS, HEADS)
    mx.eval(layer.parameters())
    return layer if bits is None else layer.to_quantized(32, bits)


@pytest.mark.parametrize("bits", [None, 4, 8])
@pytest.mark.parametrize("shape", [(5, HEADS, 1), (1, HEADS, 1), (5, HEADS, 2)])
def test_fused_heads_equal_the_layer(bits: int | None, shape: tuple[int, ...]) -> None:
    layer, swaps = product(bits), ClassSwaps()
    x = mx.random.normal((*shape, INPUTS), key=mx.random.key(1))
    expected = layer(x)
    step: Any = SimpleNamespace(active=True)
    assert fuse_heads(layer, step, swaps)
    np.testing.assert_allclose(layer(x), expected, rtol=1e-4, atol=1e-4)
    swaps.undo()
    np.testing.assert_array_equal(layer(x), expected)


def test_fused_heads_without_transpose_equal_the_layer() -> None:
    layer, swaps = product(None), ClassSwaps()
    x = mx.random.normal((5, HEADS, 1, OUTPUTS), key=mx.random.key(1))
    expected = layer(x, transpose=False)
    step: Any = SimpleNamespace(active=True)
    fuse_heads(layer, step, swaps)
    np.testing.assert_allclose(layer(x, transpose=False), expected, rtol=1e-4, atol=1e-4)


def test_calls_outside_of_a_step_are_unchanged() -> None:
    layer, swaps, seen = product(None), ClassSwaps(), list[tuple[int, ...]]()
    kind = type(layer)
    step: Any = SimpleNamespace(active=False)

    class Watched(kind):  # type: ignore[valid-type, misc]
        def __call__(self, x: mx.array, transpose: bool = True) -> Any:
            seen.append(x.shape)
            return kind.__call__(self, x, transpose)

    layer.__class__ = Watched
    fuse_heads(layer, step, swaps)
    x = mx.random.normal((5, HEADS, 1, INPUTS))
    layer(x)
    step.active = True
    layer(x)
    assert seen == [(5, HEADS, 1, INPUTS), (HEADS, 5, INPUTS)]


def test_other_layers_are_not_fused() -> None:
    step: Any = SimpleNamespace(active=True)
    assert not fuse_heads(nn.Linear(8, 8), step, ClassSwaps())
