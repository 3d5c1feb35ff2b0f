"""The kernel that multiplies few rows by dot products, on the host: against float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt
import pytest

from tests.engine.kernels.emulator import build
from tests.engine.kernels.onhost import C_TYPES, memory
from tests.engine.kernels.signatures import Instance

ROWS, EXPERTS, OUTPUTS, GROUP = 2, 5, 21, 64


def double(array: mx.array) -> npt.NDArray[np.float64]:
    return np.array(array.astype(mx.float32), np.float64)


@pytest.mark.sample(1)
@pytest.mark.parametrize("bits", [16, 4, 8])
@pytest.mark.parametrize(
    ("each", "summed", "swiglu"),
    [(0, 1, False), (0, 1, True), (3, 1, True), (3, 3, False), (3, 1, False)],
)
@pytest.mark.parametrize("dtype", [mx.bfloat16, pytest.param(mx.float16, marks=pytest.mark.long)])
def test_outputs_equal_those_of_float64(
    tmp_path: Path, dtype: mx.Dtype, bits: int, each: int, summed: int, swiglu: bool
) -> None:
    """One row after another, experts of a row, and their sum, whose rows are short."""
    inputs = 192 if summed > 1 else 1344  # neither is a multiple of what a simdgroup reads at once
    joint = swiglu and not each
    constants: dict[str, Any] = {
        "BITS": bits, "GROUP": GROUP, "BIAS": True, "SWIGLU": swiglu, "EACH": each,
        "SUMMED": summed, "NSG": 4, "AHEAD": 2, "JOINT": joint,
        "NORMED": False, "D": 8, "PARTS": 1, "EPSILON": 0,
    }  # fmt: skip
    names = {
        "T": dtype,
        "W": dtype if bits == 16 else mx.uint32,
        "S": dtype,
        "O": dtype,
        "B": dtype,
        "V": dtype,
    }
    types = tuple((name, C_TYPES[some]) for name, some in names.items())
    made = Instance("dots", types, tuple(constants.items()))
    emulator = build([made])
    keys = mx.random.split(mx.random.key(bits), 7)
    shape = (EXPERTS, OUTPUTS, inputs) if each else (OUTPUTS, inputs)
    given: dict[str, mx.array] = {}
    full = []
    for key, end in ((keys[0], ""), (keys[1], "_up")):
        weight = (mx.random.normal(shape, key=key) / inputs**0.5).astype(dtype)
        bias = mx.random.normal(shape[:-1], key=key).astype(dtype)
        packed = [weight] * 3
        if bits < 16:
            packed = mx.quantize(weight, GROUP, bits)
            codes = mx.quantize(weight.astype(mx.float32), GROUP, bits)[0]
            packed[0] = codes
            wide = [a.astype(mx.float32) for a in packed[1:]]
            weight = mx.dequantize(codes, *wide, group_size=GROUP, bits=bits)
        full.append((double(weight), double(bias)))
        values = dict(zip(("weight", "scales", "biases"), packed, strict=True), bias=bias)
        given |= {name + end: value for name, value in values.items()}
    if joint:
        for name in ("weight", "scales", "biases", "bias"):
            given[name] = mx.concatenate([given[name], given[name + "_up"]])
            given[name + "_up"] = given[name]
    pairs = ROWS * each if each else ROWS
    x = mx.random.normal((pairs if summed > 1 else ROWS, inputs), key=keys[2]).astype(dtype)
    chosen = mx.random.randint(0, EXPERTS, (pairs,), key=keys[3]).astype(mx.uint32)
    scores = mx.random.uniform(0, 1, (pairs,), key=keys[4]).astype(dtype)
    outs = ROWS if summed > 1 else pairs
    out = mx.full((outs, OUTPUTS), 7, dtype)
    given |= {name: mx.zeros((1, 8), dtype) for name in ("more", "norm", "total")}
    given |= {"x": x, "chosen": chosen, "scores": scores, "out": out}
    views = {name: memory(array) for name, array in given.items()}
    grid = (-(-OUTPUTS // 4), outs, 1)
    done = emulator.run(made, views, grid, 128, tmp_path / "run")
    assert done.returncode == 0, done.stderr[:2000]
    experts = np.array(chosen)
    rows = double(x) if summed > 1 or not each else np.repeat(double(x), each, axis=0)

    def product(weight: npt.NDArray[np.float64], bias: npt.NDArray[np.float64]) -> Any:
        if not each:
            return rows @ weight.T + bias
        return np.einsum("pi,poi->po", rows, weight[experts]) + bias[experts]

    expected = product(*full[0])
    if swiglu:
        expected = expected / (1 + np.exp(-expected)) * product(*full[1])
    if summed > 1:
        expected = (expected * double(scores)[:, None]).reshape(ROWS, each, -1).sum(axis=1)
    error = np.abs(double(out) - expected) / (1 + np.abs(expected))
    assert error.max() < (0.02 if dtype == mx.bfloat16 else 0.004), error.max()
