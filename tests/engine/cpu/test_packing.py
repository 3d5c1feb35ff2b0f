"""Weights in the library's layout have the values that other programs read from the files."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelpack_engine.cpu.library import Matrix, Source
from tests.engine.cpu.programs import BLOCKS, SCALES, Array, decode, random_rows, to_bfloat16

pytestmark = pytest.mark.usefixtures("kernels")

SUPERBLOCKS = (Source.Q4_K, Source.Q6_K)
HALF = 2.0**-11  # the relative error of rounding to a half


def rows_of(matrix: Matrix) -> Array:
    return np.stack([matrix.row(i) for i in range(matrix.rows)])


def check(source: Source, rows: int, columns: int, seed: int) -> None:
    """Rows are exact; products of scales in blocks of 256 are rounded to halves."""
    data = random_rows(source, rows, columns, seed)
    expected = decode(source, data)
    found = rows_of(Matrix(source, rows, columns, data))
    if source not in SUPERBLOCKS:
        np.testing.assert_array_equal(found, expected)
        return
    magnitude = np.abs(expected)
    if source is Source.Q4_K:  # scale * code and the minimum, which may cancel each other
        halves = data.reshape(rows, columns // 256, -1)[..., 2:4].copy().view(np.float16)
        magnitude += 2 * 63 * np.abs(halves.astype(np.float32)).repeat(256, axis=1)[..., 0]
    assert (np.abs(found - expected) <= 1.001 * HALF * magnitude + 2.0**-21).all()


@pytest.mark.parametrize("source", [s for s in Source if s is not Source.F32_AS_INT8])
def test_rows(source: Source) -> None:
    for columns in (256, 768, 8192) if source in SUPERBLOCKS else (32, 96, 256, 8192):
        for rows in (1, 15, 16, 17, 49):
            check(source, rows, columns, seed=rows)


@given(data=st.data(), seed=st.integers(0, 2**32 - 1))
def test_any_blocks(data: st.DataObject, seed: int) -> None:
    """Rows of any bytes with finite scales, of any number of rows and blocks."""
    source = data.draw(st.sampled_from(BLOCKS))
    blocks = data.draw(st.integers(1, 5))
    check(source, data.draw(st.integers(1, 40)), blocks * (32, 256)[source in SUPERBLOCKS], seed)


@pytest.mark.parametrize("source", [Source.F16, Source.BF16])
def test_all_halves(source: Source) -> None:
    """Every half is read: subnormals, infinities and NaNs too."""
    bits = np.arange(1 << 16, dtype=np.uint16).reshape(64, 1024)
    data = bits.view(np.float16) if source is Source.F16 else bits
    with np.errstate(invalid="ignore"):
        expected = decode(source, data)
    found = rows_of(Matrix(source, 64, 1024, data))
    np.testing.assert_array_equal(found, expected)
    zeros = expected == 0
    np.testing.assert_array_equal(np.signbit(found[zeros]), np.signbit(expected[zeros]))


def test_floats_of_any_bits() -> None:
    bits = np.random.default_rng(0).integers(0, 2**32, (40, 256), np.uint32)
    bits[0, :5] = [0, 1 << 31, 0x7F800000, 0xFF800000, 1]
    found = rows_of(Matrix(Source.F32, 40, 256, bits))
    np.testing.assert_array_equal(found.view(np.uint32), bits)


@pytest.mark.parametrize("source", BLOCKS)
def test_scales_of_any_size(source: Source) -> None:
    """Scales are exact, or as near as halves are to each other: subnormal ones too."""
    columns = 256 if source in SUPERBLOCKS else 64
    for bits in (0x0000, 0x0001, 0x03FF, 0x0400, 0x8001, 0x3C00, 0x6000):
        data = random_rows(source, 16, columns, seed=1)
        blocks = data.reshape(16, -1, len(data[0]) if columns == 256 else len(data[0]) // 2)
        for at in SCALES[source]:
            blocks[..., at : at + 2] = np.array([bits], np.uint16).view(np.uint8)
        found = rows_of(Matrix(source, 16, columns, data))
        expected = decode(source, data)
        if source not in SUPERBLOCKS:
            np.testing.assert_array_equal(found, expected)
            continue
        scale = float(np.array([bits], np.uint16).view(np.float16)[0])
        largest = abs(scale) * (63 * 16 if source is Source.Q4_K else 128 * 32)
        infinite = np.isinf(found)  # where the product of scales has no half
        assert not infinite.any() or largest > 65504
        near = np.abs(found - expected)[~infinite & ~np.isnan(found)]
        assert (near <= HALF * largest + 33 * 2.0**-25).all()


@given(
    exponents=st.lists(st.integers(-14, 10), min_size=4, max_size=4),
    seed=st.integers(0, 2**32 - 1),
)
def test_floats_as_bytes(exponents: list[int], seed: int) -> None:
    """Floats are rounded to 127 steps in each group of 32."""
    values = random_rows(Source.F32, 17, 128, seed)
    values *= np.repeat(2.0 ** np.array(exponents), 32).astype(np.float32)
    found = rows_of(Matrix(Source.F32_AS_INT8, 17, 128, values))
    most = np.abs(values).reshape(17, 4, 32).max(axis=-1).repeat(32).reshape(17, 128)
    # The scale, most / 127, is a half: the largest code may be off by what that rounds away.
    step = most / 127 * (1 + HALF) + 2.0**-25
    assert (
        np.abs(found - values) <= step / 2 + 127 * np.maximum(most / 127 * HALF, 2.0**-25)
    ).all()


def test_zeros_as_bytes() -> None:
    values = np.zeros((16, 32), np.float32)
    assert not rows_of(Matrix(Source.F32_AS_INT8, 16, 32, values)).any()


def test_bfloat16_rounds_to_nearest_even() -> None:
    """The helper of these tests agrees with the format, so that others can rely on it."""
    for high, low in itertools.product((0x3F80, 0x3F81, 0xBF80), (0x0000, 0x7FFF, 0x8000, 0x8001)):
        value = np.array([high << 16 | low], np.uint32).view(np.float32)
        expected = high + (low > 0x8000 or (low == 0x8000 and high & 1))
        assert to_bfloat16(value)[0] == expected
