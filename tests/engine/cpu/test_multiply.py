"""Products of activations with weights, against float64, as near as the formats allow."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelpack_engine.cpu.library import Code, Ending, Matrix, Source
from tests.engine.cpu.programs import EPS, LOGITS, Array, compute, operation, packed

DENSE = (Source.F32, Source.F16, Source.BF16)
SILU, GELU = 0, 1


@dataclass
class Numbers:
    """Values in float64, and how far float32 may be from each."""

    values: Array
    error: Array

    def plus(self, other: Array) -> Numbers:
        values = self.values + other
        return Numbers(values, self.error + EPS * (np.abs(values) + np.abs(other)))


def amplitude(source: Source, weights: Array) -> Array:
    """Return the largest terms that add up to weights: codes and minima may cancel each other."""
    if source in DENSE:
        return np.abs(weights)
    groups = np.abs(weights).reshape(len(weights), -1, 32)
    return 8 * groups.max(axis=-1).repeat(32, axis=1)


def product(source: Source, weights: Array, x: Numbers, kernels: str, rounded: bool) -> Numbers:
    """Return x times weights; `rounded` says whether activations change in the weights' format."""
    size = np.abs(x.values)
    changed = x.error.copy()
    if rounded and source not in DENSE:  # 8 bits for each 32
        groups = (size + x.error).reshape(len(size), -1, 32)
        changed += (0.5 + 128 * EPS) * groups.max(axis=-1).repeat(32, axis=1) / 127
    elif rounded and source is Source.BF16 and kernels in ("avx512_bf16", "amx", "neon_bf16"):
        changed += 2.0**-8 * size + 2.0**-126
    terms = x.values.shape[1] if source in DENSE else x.values.shape[1] // 32
    error = changed @ np.abs(weights).T
    error += (terms + 8) * EPS * ((size + changed) @ amplitude(source, weights).T)
    return Numbers(x.values @ weights.T, error)


def normed(x: Array, weight: Array, eps: float) -> Numbers:
    factor = 1 / np.sqrt((x.astype(np.float64) ** 2).mean(axis=1, keepdims=True) + eps)
    values = x * factor * weight
    return Numbers(values, (x.shape[1] / 16 + 20) * EPS * np.abs(values))


def gated(gate: Numbers, up: Numbers, activation: int) -> Numbers:
    g = gate.values
    with np.errstate(over="ignore"):
        if activation == SILU:
            value = g / (1 + np.exp(-g))
        else:
            value = 0.5 * g * (1 + np.tanh(np.sqrt(2 / np.pi) * (g + 0.044715 * g**3)))
    # Neither function is steeper than 1.13; e^x is off by a few units in the last place.
    error = 1.2 * gate.error + 16 * EPS * np.abs(g) + EPS
    size = np.abs(up.values) + up.error
    return Numbers(value * up.values, error * size + np.abs(value) * up.error)


def near(found: Array, expected: Numbers) -> None:
    assert found.shape == expected.values.shape
    excess = np.abs(found - expected.values) - expected.error - EPS * np.abs(expected.values)
    assert np.nanmax(excess) <= 2.0**-120, (
        np.unravel_index(excess.argmax(), excess.shape),
        excess.max(),
    )
    assert not np.isnan(found).any()


def exact(rows: int, columns: int, seed: int = 0) -> Array:
    """Return activations that all formats have: of 7 bits, with the largest code in each group."""
    rng = np.random.default_rng(seed)
    codes = rng.integers(-127, 128, (rows, columns // 32, 32)).astype(np.float32)
    codes[..., 0] = 127
    codes *= 2.0 ** rng.integers(-6, 3, (rows, columns // 32, 1))
    for group in codes.reshape(-1, 32):
        rng.shuffle(group)
    return codes.reshape(rows, columns)


def multiply(x: Array, matrix: Matrix) -> Array:
    before = np.full((len(x), matrix.rows), np.nan, np.float32)
    made = operation(Code.MULTIPLY, input=0, output=LOGITS, matrix=[matrix])
    return compute([made], {0: x}, LOGITS, before=before)


@pytest.mark.parametrize("source", list(Source))
def test_exact_activations(source: Source, kernels: str) -> None:
    """Any number of rows and tiles; only sums of float32 round."""
    for tiles, columns in ((1, 256), (2, 768), (3, 256), (4, 256), (7, 512)):
        matrix, weights = packed(source, 16 * tiles - tiles % 3, columns, seed=tiles)
        x = exact(17, columns)
        expected = product(source, weights, Numbers(x, 0 * x), kernels, rounded=False)
        for rows in range(1, 18):
            found = multiply(x[:rows], matrix)
            near(found, Numbers(expected.values[:rows], expected.error[:rows]))


@pytest.mark.parametrize("source", list(Source))
def test_many_rows(source: Source, kernels: str) -> None:
    matrix, weights = packed(source, 90, 256)
    for rows in (64, 200):
        x = exact(rows, 256)
        expected = product(source, weights, Numbers(x, 0 * x), kernels, rounded=False)
        near(multiply(x, matrix), expected)


@pytest.mark.parametrize("source", list(Source))
def test_columns(source: Source, kernels: str) -> None:
    sizes = (512, 1536, 8192) if source in (Source.Q4_K, Source.Q6_K) else (32, 96, 1536, 8192)
    for columns, rows in itertools.product(sizes, (1, 3)):
        matrix, weights = packed(source, 18, columns)
        x = exact(rows, columns)
        expected = product(source, weights, Numbers(x, 0 * x), kernels, rounded=False)
        near(multiply(x, matrix), expected)


@pytest.mark.parametrize("source", list(Source))
def test_rounded_activations(source: Source, kernels: str) -> None:
    matrix, weights = packed(source, 50, 256)
    rng = np.random.default_rng(1)
    x = (rng.standard_normal((9, 256)) * 10.0 ** rng.integers(-3, 3, (9, 256))).astype(np.float32)
    near(multiply(x, matrix), product(source, weights, Numbers(x, 0 * x), kernels, rounded=True))


# The sources that a layer mixes, as llama.cpp's files do.
MIXED = st.sampled_from([s for s in Source if s not in (Source.Q4_K, Source.Q6_K)])
SHAPES = st.fixed_dictionaries(
    {
        "rows": st.sampled_from([1, 2, 5, 8, 17, 33]),
        "columns": st.sampled_from([32, 64, 160]),
        "sizes": st.lists(st.tuples(MIXED, st.integers(1, 150)), min_size=1, max_size=3),
        "bias": st.lists(st.booleans(), min_size=3, max_size=3),
        "norm": st.booleans(),
        "ending": st.sampled_from([Ending.STORE, Ending.ADD]),
        "scale": st.sampled_from([1.0, -0.25, 3.0]),
        "seed": st.integers(0, 1000),
    }
)


@given(shape=SHAPES)
def test_matrices_side_by_side(kernels: str, shape: dict) -> None:  # type: ignore[type-arg]
    rng = np.random.default_rng(shape["seed"])
    x = rng.standard_normal((shape["rows"], shape["columns"]), np.float32)
    matrices, biases, values, errors = [], [], [], []
    weight = rng.uniform(0.5, 2, shape["columns"]).astype(np.float32) if shape["norm"] else None
    numbers = Numbers(x, 0 * x) if weight is None else normed(x, weight, 0.01)
    for (source, size), biased in zip(shape["sizes"], shape["bias"], strict=False):
        matrix, weights = packed(source, size, shape["columns"], shape["seed"])
        bias = rng.standard_normal(size, np.float32) if biased else None
        result = product(source, weights, numbers, kernels, rounded=True)
        if bias is not None:
            result = result.plus(bias)
        matrices.append(matrix)
        biases.append(bias)
        values.append(result.values)
        errors.append(result.error)
    scale = shape["scale"]
    expected = Numbers(scale * np.hstack(values), abs(scale) * (np.hstack(errors)))
    width = expected.values.shape[1]
    before = rng.standard_normal((len(x), -(-width // 32) * 32), np.float32)
    if shape["ending"] == Ending.ADD:
        expected = expected.plus(before[:, :width])
    made = operation(
        Code.MULTIPLY, input=0, output=1, matrix=matrices, bias=biases, norm=weight, eps=0.01,
        ending=shape["ending"], scale=scale,
    )  # fmt: skip
    found = compute([made], {0: x, 1: before}, 1)
    near(found[:, :width], expected)
    np.testing.assert_array_equal(found[:, width:], before[:, width:])


@given(
    sources=st.tuples(MIXED, MIXED), activation=st.sampled_from([SILU, GELU]),
    rows=st.sampled_from([1, 3, 8, 18]), size=st.sampled_from([1, 16, 70, 200]),
    biased=st.booleans(), with_norm=st.booleans(), spread=st.sampled_from([0.01, 1.0, 30.0]),
)  # fmt: skip
def test_gated(
    kernels: str, sources: tuple[Source, Source], activation: int, rows: int, size: int,
    biased: bool, with_norm: bool, spread: float,
) -> None:  # fmt: skip
    rng = np.random.default_rng(size)
    x = spread * rng.standard_normal((rows, 96), np.float32)
    weight = rng.uniform(0.5, 2, 96).astype(np.float32) if with_norm else None
    numbers = Numbers(x, 0 * x) if weight is None else normed(x, weight, 1e-5)
    parts, matrices = [], []
    biases = [rng.standard_normal(size, np.float32) if biased else None for _ in sources]
    for seed, (source, bias) in enumerate(zip(sources, biases, strict=True)):
        matrix, weights = packed(source, size, 96, seed)
        part = product(source, weights, numbers, kernels, rounded=True)
        parts.append(part if bias is None else part.plus(bias))
        matrices.append(matrix)
    made = operation(
        Code.MULTIPLY, input=0, output=LOGITS, matrix=matrices, bias=biases, norm=weight,
        ending=Ending.GATED, activation=activation,
    )  # fmt: skip
    before = np.full((rows, size), np.nan, np.float32)
    near(compute([made], {0: x}, LOGITS, before=before), gated(*parts, activation=activation))


@pytest.mark.parametrize("activation", [SILU, GELU])
def test_activations_of_any_size(activation: int, kernels: str) -> None:
    """From values that vanish to those beyond which e^x has no float32."""
    gate = np.concatenate([s * np.logspace(-30, 4, 48) for s in (-1, 1)]).astype(np.float32)
    columns = np.eye(96, dtype=np.float32)
    up = Matrix(Source.F32, 96, 96, np.ones_like(columns))
    x = np.diag(gate)
    found = compute(
        [operation(Code.MULTIPLY, input=0, output=LOGITS, ending=Ending.GATED,
                   activation=activation, matrix=[Matrix(Source.F32, 96, 96, columns), up])],
        {0: x}, LOGITS, before=np.empty((96, 96), np.float32),
    )  # fmt: skip
    wide = gate.astype(np.float64)
    numbers = Numbers(wide, EPS * np.abs(wide) ** 2 / 1e4)
    expected = gated(numbers, Numbers(wide, 0 * wide), activation)
    near(np.diag(found)[None], Numbers(expected.values[None], expected.error[None]))


@pytest.mark.parametrize("source", list(Source))
def test_zeros(source: Source, kernels: str) -> None:
    matrix, _ = packed(source, 20, 256)
    for rows in (1, 9):
        assert not multiply(np.zeros((rows, 256), np.float32), matrix).any()


@pytest.mark.parametrize("source", list(Source))
def test_denormals(source: Source, kernels: str) -> None:
    """Activations too small for a format count as zero, beside others and alone."""
    matrix, weights = packed(source, 20, 512)
    for value in (1e-45, 1e-40, 1e-37):
        x = np.full((3, 512), value, np.float32)
        x[1] *= -1
        x[2, :256] = exact(1, 256)
        found = multiply(x, matrix)
        usual = product(source, weights, Numbers(x, 0 * x), kernels, rounded=True)
        flushed = 2.0**-118 * np.abs(weights).sum(axis=1)
        near(found, Numbers(usual.values, usual.error + flushed))


@pytest.mark.parametrize("source", list(Source))
def test_large_values(source: Source, kernels: str) -> None:
    matrix, weights = packed(source, 20, 256)
    for scale in (1e15, 1e30):
        x = (scale * exact(3, 256)).astype(np.float32)
        expected = product(source, weights, Numbers(x, 0 * x), kernels, rounded=True)
        near(multiply(x, matrix), expected)


@pytest.mark.parametrize("source", list(Source))
def test_values_that_are_not_finite_stay_in_their_rows(source: Source, kernels: str) -> None:
    """Their row has no finite product, so that it is detected; the others do not change."""
    matrix, _ = packed(source, 40, 256)
    for rows in (2, 9, 17):
        x = exact(rows, 256)
        clean = multiply(x, matrix)
        bad = rows // 2
        for column, value in ((0, np.nan), (17, np.inf), (255, -np.inf), (130, np.nan)):
            x[bad] = exact(1, 256)
            x[bad, column] = value
            found = multiply(x, matrix)
            others = np.arange(rows) != bad
            np.testing.assert_array_equal(found[others], clean[others])
            assert not np.isfinite(found[bad]).any()
            assert not np.isfinite(multiply(x[bad : bad + 1], matrix)).any()
