"""Quantised layers get their input as one matrix of all rows."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import pytest

from modelpack_engine.patches.modules import ClassSwaps, fold_quantised
from tests.engine.runner.models import tiny_llama


def test_folded_layers_compute_the_same_on_two_dimensions(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_llama()
    nn.quantize(model, group_size=32, bits=4)
    rows = mx.array([[1], [2], [3]])
    expected = model(rows)
    swaps = ClassSwaps()
    assert fold_quantised(model, swaps) == 3 * 7 + 1
    dimensions: list[int] = []
    native = mx.quantized_matmul

    def watched(x: mx.array, *args: object, **kwargs: object) -> mx.array:
        dimensions.append(x.ndim)
        return native(x, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(mx, "quantized_matmul", watched)
    found = model(rows)
    assert found.shape == expected.shape
    assert mx.allclose(found, expected, atol=1e-5).item()
    assert dimensions == [2] * (3 * 7 + 1)

    swaps.undo()
    dimensions.clear()
    model(rows)
    assert set(dimensions) == {3}


@pytest.mark.parametrize("dequantise", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_parts_of_a_product_are_added_up_before_the_bias(
    dequantise: bool, bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A layer with its input sharded over devices; here the other device has an equal part."""
    monkeypatch.setattr(mx.distributed, "all_sum", lambda x, group: 2 * x)
    layer = nn.QuantizedShardedToAllLinear(64, 8, bias=bias, group=mx.distributed.init())
    if bias:
        layer.bias = mx.arange(8) / 8
    x = mx.random.normal((3, 1, 64))
    expected = layer(x)
    model = nn.Module()
    model.layer = layer
    assert fold_quantised(model, ClassSwaps(), dequantise=dequantise) == 1
    assert mx.allclose(layer(x), expected, atol=1e-5).item()
