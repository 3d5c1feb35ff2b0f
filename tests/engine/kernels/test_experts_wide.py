"""The kernel that multiplies many rows by the weights of their experts, on the host."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from tests.engine.kernels.emulator import build
from tests.engine.kernels.onhost import C_TYPES, memory
from tests.engine.kernels.signatures import Instance

TILE = 128


@pytest.mark.sample(1)
@pytest.mark.parametrize("dtype", [mx.bfloat16, pytest.param(mx.float16, marks=pytest.mark.long)])
@pytest.mark.parametrize("swiglu", [False, True])
@pytest.mark.parametrize("gather", [False, pytest.param(True, marks=pytest.mark.long)])
def test_outputs_equal_those_of_float64(
    tmp_path: Path, dtype: mx.Dtype, swiglu: bool, gather: bool
) -> None:
    """Tiles with few, half and all rows; a second tile; an expert without rows; a ragged edge."""
    counts = [20, 0, 50, 130]
    experts, outputs, inputs = len(counts), 136, 192
    constants = (
        ("BIAS", True), ("MT", TILE), ("STAGES", 4), ("SWIGLU", swiglu), ("GATHER", gather),
    )  # fmt: skip
    made = Instance("experts_wide", (("T", C_TYPES[dtype]),), constants)
    emulator = build([made])
    keys = mx.random.split(mx.random.key(3), 5)
    weights = [
        (mx.random.normal((experts, outputs, inputs), key=key) / inputs**0.5).astype(dtype)
        for key in keys[:2]
    ]
    biases = [mx.random.normal((experts, outputs), key=key).astype(dtype) for key in keys[2:4]]
    pairs = sum(counts)
    x = mx.random.normal((pairs, inputs), key=keys[4]).astype(dtype)
    source = np.random.default_rng(1).permutation(pairs).astype(np.int32)
    spans, first = [], 0
    for expert, count in enumerate(counts):
        spans += [[expert, first + at, min(TILE, count - at)] for at in range(0, count, TILE)]
        first += count
    spans.append([experts - 1, pairs, 0])
    out = mx.full((pairs, outputs), 7, dtype)
    arrays = {
        "x": x, "weight": weights[0], "bias": biases[0], "weight_up": weights[1],
        "bias_up": biases[1], "source": mx.array(source), "spans": mx.array(spans, mx.int32),
        "out": out,
    }  # fmt: skip
    views = {name: memory(array) for name, array in arrays.items()}
    grid = (-(-outputs // (128 if swiglu else 256)), len(spans), 1)
    done = emulator.run(made, views, grid, 256, tmp_path / "run")
    assert done.returncode == 0, done.stderr[:2000]

    def double(array: mx.array) -> np.ndarray:
        return np.array(array.astype(mx.float32), np.float64)

    expert_of = np.repeat(np.arange(experts), counts)
    rows = double(x)[source] if gather else double(x)
    expected, up = (
        np.einsum("pi,poi->po", rows, double(w)[expert_of]) + double(b)[expert_of]
        for w, b in zip(weights, biases, strict=True)
    )
    if swiglu:
        expected = expected / (1 + np.exp(-expected)) * up
    error = np.abs(double(out) - expected) / (1 + np.abs(expected))
    assert error.max() < (0.02 if dtype == mx.bfloat16 else 0.004), error.max()
