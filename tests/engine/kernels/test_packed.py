"""The kernel that multiplies by packed weights, on the host: its sums against float64."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt
import pytest

from tests.engine.kernels.emulator import Emulator, build
from tests.engine.kernels.onhost import C_TYPES, memory
from tests.engine.kernels.signatures import Instance

BF16, F16 = mx.bfloat16, mx.float16


def instance(dtype: mx.Dtype, out: mx.Dtype, constants: dict[str, int | bool]) -> Instance:
    types = (("T", C_TYPES[dtype]), ("O", C_TYPES[out]))
    return Instance("packed", types, tuple(constants.items()))


def errors(
    out: mx.array, x: mx.array, packed: Sequence[mx.array], bias: mx.array, given: dict[str, Any]
) -> npt.NDArray[np.float64]:
    """Return how far the sum of parts is from float64's, of 1 + its size."""
    outputs, inputs = bias.shape[0], x.shape[1]
    codes = np.array(packed[0]).view(np.uint8)
    if given["BITS"] == 4:
        codes = np.stack([codes & 15, codes >> 4], axis=-1).reshape(outputs, inputs)
    scales, biases = (
        np.repeat(np.array(a.astype(mx.float32), np.float64), given["GROUP"], axis=1)
        for a in packed[1:]
    )
    full = codes * scales + biases
    expected = np.array(x.astype(mx.float32), np.float64) @ full.T
    expected += np.array(bias.astype(mx.float32), np.float64)
    if given["SWIGLU"]:
        gate, up = np.split(expected, 2, axis=1)
        expected = gate / (1 + np.exp(-gate)) * up
    found = np.array(out.astype(mx.float32), np.float64).sum(axis=0)
    error: npt.NDArray[np.float64] = np.abs(found - expected) / (1 + np.abs(expected))
    return error


def check(
    tmp_path: Path,
    dtype: mx.Dtype,
    shape: tuple[int, int, int],
    parts: int = 1,
    *,
    swiglu: bool = False,
    **more: Any,
) -> None:
    rows, outputs, inputs = shape
    mx.random.seed(7)
    given: dict[str, Any] = {
        "BITS": 4, "GROUP": 64, "BIAS": True, "SWIGLU": swiglu, "MT": 8, "WARPS": 4, "STRIPS": 1,
        "DEPTH": 64, "STAGES": 3, "SPAN": 4,
    } | more  # fmt: skip
    out_dtype = dtype if parts == 1 else mx.float32
    made = instance(dtype, out_dtype, given)
    emulator: Emulator = build([made])
    weight = (mx.random.normal((outputs, inputs)) / inputs**0.5).astype(dtype)
    packed = mx.quantize(weight, given["GROUP"], given["BITS"])
    x = mx.random.normal((rows, inputs)).astype(dtype)
    bias = mx.random.normal((outputs,)).astype(dtype)
    width = outputs // 2 if swiglu else outputs
    out = mx.full((parts, rows, width), 7, out_dtype)
    arrays = dict(
        zip(
            ("x", "weight", "scales", "biases", "bias", "out"), (x, *packed, bias, out), strict=True
        )
    )
    views = {name: memory(array) for name, array in arrays.items()}
    across = given["WARPS"] * given["STRIPS"] * (8 if swiglu else 16)
    grid = (-(-rows // given["MT"]), -(-width // across), parts)
    done = emulator.run(made, views, grid, given["WARPS"] * 32, tmp_path / "run")
    assert done.returncode == 0, done.stderr[:2000]
    error = errors(out, x, packed, bias, given)
    assert error.max() < (0.01 if dtype == BF16 else 0.002), error.max()


@pytest.mark.long
@pytest.mark.parametrize("dtype", [BF16, F16])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("depth", [64, 128])
def test_sums_equal_those_of_float64(
    tmp_path: Path, dtype: mx.Dtype, bits: int, group: int, depth: int
) -> None:
    check(
        tmp_path, dtype, (19, 72, 512), 2, BITS=bits, GROUP=group, DEPTH=depth, MT=16, STAGES=4
    )  # fmt: skip


def test_gates_meet_their_up_rows(tmp_path: Path) -> None:
    check(tmp_path, BF16, (5, 2 * 40, 256), swiglu=True, STAGES=4)


@pytest.mark.long
def test_a_warp_computes_several_strips(tmp_path: Path) -> None:
    check(tmp_path, F16, (9, 136, 256), 2, MT=16, STRIPS=2, WARPS=4, DEPTH=128)


def check_wide(
    tmp_path: Path,
    dtype: mx.Dtype,
    shape: tuple[int, int, int],
    parts: int = 1,
    sanitizers: str = "",
    **more: int | bool,
) -> None:
    """Compare the kernel of warpgroups, and that which arranges its rows, with float64."""
    rows, outputs, inputs = shape
    mx.random.seed(8)
    given: dict[str, Any] = {
        "BITS": 4, "GROUP": 64, "BIAS": True, "SWIGLU": False, "MT": 32, "WIDTH": 1, "STAGES": 3,
        "SPAN": 4, "ARRANGED": 0,
    } | more  # fmt: skip
    out_dtype = dtype if parts == 1 else mx.float32
    types = ("T", C_TYPES[dtype]), ("O", C_TYPES[out_dtype])
    made = Instance("packed_wide", types, tuple(given.items()))
    arrange = Instance("arrange", types[:1], (("BITS", given["BITS"]), ("D", inputs)))
    emulator = build([made, arrange], sanitizers)
    weight = (mx.random.normal((outputs, inputs)) / inputs**0.5).astype(dtype)
    packed = mx.quantize(weight, given["GROUP"], given["BITS"])
    x, bias = (mx.random.normal(size).astype(dtype) for size in ((rows, inputs), (outputs,)))
    width = outputs // 2 if given["SWIGLU"] else outputs
    out, arranged = mx.full((parts, rows, width), 7, out_dtype), mx.zeros((inputs // 64, rows, 64))
    arranged = arranged.astype(dtype)
    views = {"x": memory(x), "out": memory(arranged)}
    done = emulator.run(arrange, views, (-(-rows * inputs // 1024), 1, 1), 128, tmp_path / "rows")
    assert done.returncode == 0, done.stderr[:2000]
    names = ("x", "weight", "scales", "biases", "bias", "out")
    arrays = zip(names, (arranged, *packed, bias, out), strict=True)
    across = given["WIDTH"] * (32 if given["SWIGLU"] else 64)
    grid = (-(-rows // given["MT"]), -(-width // across), parts)
    done = emulator.run(
        made, {name: memory(array) for name, array in arrays}, grid, given["WIDTH"] * 128 + 128,
        tmp_path / "run",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[:2000]
    error = errors(out, x, packed, bias, given)
    assert error.max() < (0.015 if dtype == BF16 else 0.002), error.max()


@pytest.mark.long
@pytest.mark.parametrize(
    ("dtype", "shape", "parts", "more"),
    [
        (BF16, (37, 98, 1792), 1, {"SWIGLU": True}),  # chunks of outputs that are not whole
        (BF16, (37, 7, 1792), 1, {"SPAN": 4, "STAGES": 4}),
        (F16, (9, 136, 2304), 3, {"BITS": 8, "GROUP": 32, "SPAN": 8, "WIDTH": 2}),
        (BF16, (33, 49, 1792), 2, {"SPAN": 4}),  # the second part begins within a span
        (BF16, (70, 200, 3072), 1, {"MT": 64, "WIDTH": 2, "STAGES": 4, "SPAN": 8}),
        (BF16, (5, 64, 256), 1, {"GROUP": 128, "SPAN": 2}),  # fewer steps than stages
    ],
)
@pytest.mark.parametrize("sanitizers", ["", "address,undefined", "thread"])
def test_warpgroups_multiply_odd_sizes(
    tmp_path: Path,
    sanitizers: str,
    dtype: mx.Dtype,
    shape: tuple[int, int, int],
    parts: int,
    more: dict[str, int | bool],
) -> None:
    check_wide(tmp_path, dtype, shape, parts, sanitizers, **more)
