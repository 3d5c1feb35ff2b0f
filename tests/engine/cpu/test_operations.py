"""Operations on rows: embeddings, norms, sums, the choice of rows and the cap of logits."""

from __future__ import annotations

import numpy as np
import pytest

from modelpack_engine.cpu.library import Code, Matrix, Source
from tests.engine.cpu.programs import (
    EPS,
    LOGITS,
    Program,
    Steps,
    compute,
    identity,
    operation,
    packed,
    random_rows,
)

pytestmark = pytest.mark.usefixtures("kernels")


@pytest.mark.parametrize("source", list(Source))
def test_embed(source: Source) -> None:
    """Tokens in any order, some twice, times a factor."""
    matrix, weights = packed(source, 50, 256)
    tokens = np.random.default_rng(0).integers(0, 50, 37)
    tokens[:2] = 49, 0
    for scale in (1.0, 22.627417):
        program = Program(
            [
                operation(Code.EMBED, output=0, matrix=[matrix], scale=scale),
                operation(Code.MULTIPLY, input=0, output=LOGITS, matrix=[identity(256)]),
            ],
            [256], rows=40, columns=256,
        )  # fmt: skip
        logits = np.full((37, 256), np.nan, np.float32)
        assert program.run(tokens, logits) == 0
        expected = weights[tokens] * np.float32(scale)
        np.testing.assert_allclose(logits, expected, rtol=EPS, atol=0)


@pytest.mark.parametrize("width", [32, 64, 96, 576, 2048])
def test_norm(width: int) -> None:
    rng = np.random.default_rng(width)
    # Sums of squares that vanish, those that `eps` outweighs, and large ones.
    x = rng.standard_normal((7, width), np.float32)
    x *= np.array([0, 1e-30, 1e-3, 1, 100, 1e10, 1e17], np.float32)[:, None]
    weight = rng.standard_normal(width, np.float32)
    made = operation(Code.NORM, input=0, output=1, norm=weight, eps=1e-6)
    for rows in (1, 7):
        found = compute([made], {0: x[-rows:], 1: np.zeros((rows, width))}, 1)
        wide = x[-rows:].astype(np.float64)
        expected = wide / np.sqrt((wide**2).mean(axis=1, keepdims=True) + 1e-6) * weight
        np.testing.assert_allclose(found, expected, rtol=(width / 16 + 20) * EPS, atol=1e-37)


def test_norm_in_place() -> None:
    x = np.random.default_rng(0).standard_normal((5, 64), np.float32)
    weight = np.full(64, 2, np.float32)
    found = compute([operation(Code.NORM, input=0, output=0, norm=weight)], {0: x}, 0)
    expected = 2 * x / np.sqrt((x.astype(np.float64) ** 2).mean(axis=1, keepdims=True) + 1e-5)
    np.testing.assert_allclose(found, expected, rtol=30 * EPS)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_that_are_not_finite_stay_in_their_rows(value: float) -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((6, 64), np.float32)
    weight = np.ones(64, np.float32)
    made = [
        operation(Code.NORM, input=0, output=1, norm=weight),
        operation(Code.ADD, input=1, output=0),
    ]
    zeros = np.zeros_like(x)
    clean = compute(made, {0: x, 1: zeros}, 0)
    x[2, 5] = value
    found = compute(made, {0: x, 1: zeros}, 0)
    others = np.arange(6) != 2
    np.testing.assert_array_equal(found[others], clean[others])
    assert np.isnan(found[2]).any()


@pytest.mark.parametrize("rows", [1, 2, 33])
def test_add(rows: int) -> None:
    rng = np.random.default_rng(rows)
    x, y = rng.standard_normal((2, rows, 96), np.float32)
    for scale in (1.0, -0.125, 0.3):
        found = compute([operation(Code.ADD, input=0, output=1, scale=scale)], {0: x, 1: y}, 1)
        expected = y + x.astype(np.float64) * np.float32(scale)
        np.testing.assert_allclose(found, expected, atol=2 * EPS * np.abs(expected).max())


@pytest.mark.parametrize("sampled", [[0], [4, 4, 0], [32], list(range(33)), []])
def test_select(sampled: list[int]) -> None:
    """The operations after it run on the chosen rows only, in their order."""
    x = np.random.default_rng(0).standard_normal((33, 64), np.float32)
    steps = Steps(sampled=np.array(sampled, np.int32))
    made = operation(Code.SELECT, input=0, output=1)
    found = compute([made], {0: x, 1: np.full_like(x, np.nan)}, 1, steps=steps)
    np.testing.assert_array_equal(found, x[sampled])


@pytest.mark.parametrize("softcap", [30.0, 0.5])
def test_softcap(softcap: float) -> None:
    """Logits of chosen rows; infinite ones become the cap, and NaN stays."""
    logits = np.linspace(-100, 100, 3 * 50, dtype=np.float32).reshape(3, 50)
    logits[0, :4] = 0, np.inf, -np.inf, np.nan
    before = logits.copy()
    made = operation(Code.SOFTCAP, softcap=softcap, dim=50)
    found = compute([made], {0: np.zeros((3, 32))}, LOGITS, before=before)
    expected = softcap * np.tanh(logits.astype(np.float64) / softcap)
    np.testing.assert_allclose(found, expected, rtol=8 * EPS)


def test_a_program_is_used_again() -> None:
    """Steps of other sizes on the same buffers give what a new program gives."""
    matrix = Matrix(Source.Q8_0, 40, 64, random_rows(Source.Q8_0, 40, 64, 0))
    table = random_rows(Source.F32, 60, 64, 1)
    made = [
        operation(Code.EMBED, output=0, matrix=[Matrix(Source.F32, 60, 64, table)]),
        operation(Code.NORM, input=0, output=0, norm=np.ones(64, np.float32)),
        operation(Code.MULTIPLY, input=0, output=LOGITS, matrix=[matrix]),
    ]
    program = Program(made, [64], rows=20, columns=64)
    results = {}
    for rows in (20, 1, 7, 20, 1, 3):
        logits = np.empty((rows, 40), np.float32)
        assert program.run(np.arange(rows), logits) == 0
        results.setdefault(rows, logits)
        np.testing.assert_array_equal(logits, results[rows])
        np.testing.assert_array_equal(logits[:1], results[20][:1])
