"""MLX's affine codes: rows and products are those of mx.dequantize in float32."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from modelpack_engine.cpu.library import AFFINE_BITS, Matrix, Source
from modelpack_engine.errors import OutOfMemoryError
from tests.engine.cpu.programs import Array
from tests.engine.cpu.test_multiply import Numbers, exact, multiply, near, product

pytestmark = pytest.mark.usefixtures("kernels")

SIZES = (32, 64, 128)
#: The types of scales and biases.
TYPES = {mx.float32: Source.F32, mx.float16: Source.F16, mx.bfloat16: Source.BF16}


def packed(
    rows: int, columns: int, bits: int, group_size: int, dtype: mx.Dtype = mx.float16
) -> tuple[Matrix, Array]:
    """Return a matrix, and its values by MLX; scales and biases are halves."""
    rng = np.random.default_rng(bits)
    values = mx.array(rng.standard_normal((rows, columns), np.float32)).astype(mx.bfloat16)
    codes, scales, biases = mx.quantize(values, group_size, bits)
    scales, biases = scales.astype(dtype), biases.astype(dtype)
    parts = [np.array(part.view(mx.uint8)) for part in (codes, scales, biases)]
    matrix = Matrix.affine(
        rows, columns, *parts, bits=bits, group_size=group_size, source=TYPES[dtype]
    )
    scales, biases = scales.astype(mx.float32), biases.astype(mx.float32)
    expected = mx.dequantize(codes, scales, biases, group_size, bits)
    return matrix, np.array(expected)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("group_size", SIZES)
@pytest.mark.parametrize("bits", AFFINE_BITS)
def test_rows(bits: int, group_size: int, dtype: mx.Dtype) -> None:
    """Only the sum of product and bias rounds: also with rows that fill no tile."""
    for rows, columns in ((1, 128), (16, 256), (35, 1152)):
        matrix, expected = packed(rows, columns, bits, group_size, dtype)
        found = np.stack([matrix.row(i) for i in range(rows)])
        np.testing.assert_allclose(found, expected, rtol=0, atol=2.0**-21)


@pytest.mark.parametrize("bits", AFFINE_BITS)
def test_products(bits: int, kernels: str) -> None:
    """Any number of rows and tiles, with activations that the format has, and others."""
    rng = np.random.default_rng(0)
    for size, columns in ((16, 128), (45, 384), (120, 1024)):
        matrix, weights = packed(size, columns, bits, 64)
        wide = weights.astype(np.float64)
        for rows in (1, 2, 5, 9, 33):
            x = exact(rows, columns)
            expected = product(Source.Q4_1, wide, Numbers(x, 0 * x), kernels, rounded=False)
            near(multiply(x, matrix), expected)
            x = rng.standard_normal((rows, columns), np.float32)
            expected = product(Source.Q4_1, wide, Numbers(x, 0 * x), kernels, rounded=True)
            near(multiply(x, matrix), expected)


def test_sixteen_bits_of_activations(kernels: str) -> None:
    """The coarse codes alone would be off by 0.2 and more."""
    matrix, weights = packed(64, 1024, 8, 64)
    x = np.random.default_rng(0).standard_normal((4, 1024), np.float32)
    expected = x.astype(np.float64) @ weights.T.astype(np.float64)
    error = np.abs(multiply(x, matrix) - expected).max()
    assert error < 5e-3, error


@pytest.mark.parametrize(
    "change",
    [{"bits": 1}, {"bits": 7}, {"bits": 9}, {"group_size": 16}, {"group_size": 48},
     {"group_size": 0}, {"group_size": -32}, {"columns": 96}, {"columns": 0}, {"rows": 0},
     {"rows": 15}, {"source": Source.Q8_0}, {"bits": 8}],
    ids=str,
)  # fmt: skip
def test_a_matrix_that_has_no_layout(change: dict[str, Any]) -> None:
    """Or whose bytes are not those of its shape: `bits` 8 needs twice as many."""
    size = 16 * 128
    given = {"bits": 4, "group_size": 64, "source": Source.F16, "rows": 16, "columns": 128}
    codes, scales = np.zeros(size // 2, np.uint8), np.zeros(size // 64 * 2, np.uint8)

    def make(**options: Any) -> Matrix:
        return Matrix.affine(options.pop("rows"), options.pop("columns"), codes, scales, scales,
                             **options)  # fmt: skip

    assert make(**given).nbytes == size // 32 * 20
    with pytest.raises(OutOfMemoryError, match="cannot be packed"):
        make(**given | change)
