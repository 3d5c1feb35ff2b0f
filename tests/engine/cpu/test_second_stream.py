"""Work on two CPU streams gives the same results as on one."""

from __future__ import annotations

import ctypes
import sys

import mlx.core as mx
import mlx.nn as nn
import pytest

from modelpack_engine.attention import gather, metadata
from modelpack_engine.attention.metadata import StepInputs
from modelpack_engine.patches import modules as layers
from modelpack_engine.patches.modules import ClassSwaps
from modelpack_engine.platform.device import keep_freed_memory


class Layers(nn.Module):
    """A model with a tied head, linear layers with and without a bias, and a quantised one."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(33, 16)
        self.biased = nn.Linear(16, 11)
        self.plain = nn.Linear(11, 16, bias=False)
        self.quantised = nn.QuantizedLinear(64, 8)

    def __call__(self, tokens: mx.array) -> mx.array:
        x = self.plain(self.biased(self.embedding(tokens)))
        return self.embedding.as_linear(x)


@pytest.mark.parametrize("rows", [1, 3, 4, 20])
def test_halves(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    mx.random.seed(0)
    monkeypatch.setattr(layers, "FEW_PRODUCTS", 0)
    model, swaps = Layers(), ClassSwaps()
    tokens = mx.arange(rows)[:, None]
    expected = model(tokens)
    stream = mx.new_stream(mx.cpu)
    assert layers.halve_linears(model, swaps, stream) == 3
    assert mx.allclose(model(tokens), expected, atol=1e-6).item()
    swaps.undo()
    assert type(model.biased) is nn.Linear
    assert mx.array_equal(model(tokens), expected).item()


def test_halves_are_computed_beside_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second stream computes the second half, unless the work is too small."""
    monkeypatch.setattr(layers, "FEW_PRODUCTS", 0)
    model, swaps = Layers(), ClassSwaps()
    stream, used = mx.new_stream(mx.cpu), []
    matmul = mx.matmul

    def noticed(*args: mx.array, stream: mx.Stream) -> mx.array:
        used.append(stream)
        return matmul(*args, stream=stream)

    monkeypatch.setattr(mx, "matmul", noticed)
    layers.halve_linears(model, swaps, stream)
    mx.eval(model(mx.arange(layers.FEW_ROWS - 1)[:, None]))
    assert used == []
    mx.eval(model(mx.arange(layers.FEW_ROWS)[:, None]))
    assert used == [stream] * 3


@pytest.mark.parametrize("length", [1, gather.BLOCK, 3 * gather.BLOCK + 5])
def test_attention(length: int) -> None:
    mx.random.seed(0)
    queries = mx.random.normal((1, 4, length, 8))
    keys, values = mx.random.normal((2, 1, 2, length + 7, 8))
    mask = None if length == 1 else "causal"
    alone = gather.attend_on_cpu(queries, keys, values, mask, scale=0.3)
    beside = gather.attend_on_cpu(
        queries, keys, values, mask, scale=0.3, second=mx.new_stream(mx.cpu)
    )
    assert mx.array_equal(alone, beside).item()
    native = mx.fast.scaled_dot_product_attention(queries, keys, values, scale=0.3, mask=mask)
    assert mx.allclose(beside, native, atol=1e-5).item()


def test_one_processor_has_one_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metadata, "usable_processors", lambda: 1)
    assert StepInputs(16, exact=True).second_stream is None
    monkeypatch.setattr(metadata, "usable_processors", lambda: 2)
    assert StepInputs(16, exact=True).second_stream is not None
    assert StepInputs(16, exact=False).second_stream is None


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
def test_freed_memory_is_kept() -> None:
    assert keep_freed_memory() == hasattr(ctypes.CDLL(None), "mallopt")
