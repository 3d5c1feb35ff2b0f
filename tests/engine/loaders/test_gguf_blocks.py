"""Blocks of every type, compared with the gguf package, which matches ggml bit for bit."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import gguf
import mlx.core as mx
import numpy as np
import pytest

from modelpack_engine.errors import ModelLoadError
from modelpack_engine.models import gguf_blocks
from modelpack_engine.models.gguf_file import GGUFTensor
from tests.engine.loaders.blocks import random_blocks

ROWS, COLUMNS = 6, 512
AFFINE = sorted(name for name in gguf_blocks.SUPPORTED_TYPES if gguf_blocks.affine_bits(name))


def tensor(dtype: str) -> tuple[GGUFTensor, np.ndarray]:
    raw = random_blocks(dtype, ROWS, COLUMNS)
    expected = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[dtype])
    return GGUFTensor("w", dtype, (ROWS, COLUMNS), raw.reshape(-1)), expected


@pytest.mark.parametrize("dtype", sorted(gguf_blocks.SUPPORTED_TYPES))
def test_dense_is_bit_equal(dtype: str) -> None:
    packed, expected = tensor(dtype)
    got = gguf_blocks.dense(packed)
    assert got.dtype == np.float32
    assert np.abs(expected).max() > 0
    assert np.array_equal(got, expected)


@pytest.mark.parametrize("dtype", AFFINE)
def test_repacking_loses_nothing(dtype: str) -> None:
    packed, expected = tensor(dtype)
    blocks = gguf_blocks.affine_blocks(packed)
    assert blocks is not None
    assert blocks.bits == gguf_blocks.affine_bits(dtype)
    words, scales, biases = (
        mx.array(values.reshape(ROWS, -1))
        for values in (blocks.words(), blocks.scales, blocks.biases)
    )
    got = mx.dequantize(words, scales, biases, gguf_blocks.GROUP_SIZE, blocks.bits)
    assert np.array_equal(np.array(got), expected)


@pytest.mark.parametrize("dtype", sorted(gguf_blocks.SUPPORTED_TYPES))
@pytest.mark.parametrize("parts", [4, 16, 32])
def test_columns_move_exactly(dtype: str, parts: int) -> None:
    """By half a superblock, by a group, and by less than a group."""
    columns = tuple(np.random.default_rng(1).permutation(parts).tolist())
    stored, expected = tensor(dtype)
    moved = replace(stored, columns=columns)
    expected = expected.reshape(ROWS, parts, -1)[:, columns].reshape(ROWS, COLUMNS)
    assert np.array_equal(gguf_blocks.dense(moved), expected)
    blocks = gguf_blocks.affine_blocks(moved)
    assert (blocks is not None) is (dtype in AFFINE and COLUMNS // parts >= 32)
    if blocks is not None:
        assert np.array_equal(blocks.dense().reshape(ROWS, COLUMNS), expected)
    if gguf_blocks.is_float(dtype):
        unmoved = gguf_blocks.as_stored(stored).reshape(ROWS, parts, -1)
        assert np.array_equal(
            gguf_blocks.as_stored(moved), unmoved[:, columns].reshape(ROWS, COLUMNS)
        )


def test_five_and_four_bits_stay_so() -> None:
    assert {name: gguf_blocks.affine_bits(name) for name in AFFINE} == {
        "Q4_0": 4,
        "Q4_1": 4,
        "Q4_K": 4,
        "Q5_0": 5,
        "Q5_1": 5,
        "Q5_K": 5,
        "Q8_0": 8,
    }


def test_mxfp4_keeps_its_codes() -> None:
    packed, expected = tensor("MXFP4")
    words, exponents = gguf_blocks.mxfp4_blocks(packed)
    got = mx.dequantize(
        mx.array(words.reshape(ROWS, -1)),
        mx.array(exponents.reshape(ROWS, -1)),
        group_size=32,
        bits=4,
        mode="mxfp4",
        dtype=mx.float32,
    )
    assert np.array_equal(np.array(got), expected)


def test_groups_of_mxfp4_move() -> None:
    packed, _ = tensor("MXFP4")
    columns = tuple(range(COLUMNS // 32))[::-1]
    parts: Iterable[tuple[np.ndarray, np.ndarray]] = zip(
        gguf_blocks.mxfp4_blocks(replace(packed, columns=columns)),
        gguf_blocks.mxfp4_blocks(packed),
        strict=True,
    )
    for moved, stored in parts:
        rows = stored.reshape(ROWS, len(columns), -1)
        assert np.array_equal(moved.reshape(rows.shape), rows[:, ::-1])


def test_four_bits_are_widened_without_loss() -> None:
    packed, expected = tensor("Q4_K")
    wide = gguf_blocks.widened(packed)
    assert (wide.dtype, wide.raw.size) == ("Q5_K", packed.raw.size // 144 * 176)
    by_gguf = gguf.quants.dequantize(wide.raw.reshape(ROWS, -1), gguf.GGMLQuantizationType.Q5_K)
    assert np.array_equal(by_gguf, expected)


def test_infinite_scales_make_no_warning() -> None:
    raw = np.full((2, 34), 0x7C, np.uint8)  # float16 0x7C7C is NaN
    assert not np.isfinite(gguf_blocks.dense(GGUFTensor("w", "Q8_0", (2, 32), raw.ravel()))).any()


@pytest.mark.parametrize("dtype", ["TQ1_0", "I8", "Q8_1", "Q4_0_4_4"])
def test_other_types_are_refused_by_name(dtype: str) -> None:
    with pytest.raises(ModelLoadError, match=f"'w' has the type {dtype}"):
        gguf_blocks.dense(GGUFTensor("w", dtype, (1, 256), np.zeros(256, np.uint8)))
