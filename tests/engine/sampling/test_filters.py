"""top-k, top-p and min-p keep the same tokens as the oracle."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelpack_engine.sampling import plan
from tests.engine.sampling import oracle


def keeps(
    rows: np.ndarray, top_k: list[int], top_p: list[float], min_p: list[float], **kw: bool
) -> np.ndarray:
    """Return which tokens of each row the device keeps."""
    x = mx.array(rows.astype(np.float32))
    with np.errstate(divide="ignore"):
        floor = x.max(axis=-1, keepdims=True) + mx.array(np.log(np.float32(min_p))[:, None])
    k = np.array([v if v > 0 else rows.shape[1] for v in top_k], dtype=np.int32)[:, None]
    p = np.array(top_p, dtype=np.float32)[:, None]
    windowed = kw.get("windowed", False)
    least = plan.cutoff(x, floor, mx.array(k), mx.array(p), windowed=windowed)
    return np.array(x >= least)


def check(
    rows: np.ndarray, got: np.ndarray, top_k: list[int], top_p: list[float], min_p: list[float]
) -> None:
    """Compare with the oracle; a token within rounding of the limit may be kept or not."""
    near = 2e-6
    for row, mask, k, p, m in zip(rows, got, top_k, top_p, min_p, strict=True):
        row = row.astype(np.float32).astype(np.float64)
        least = oracle.kept(
            row, k, max(p - near, 1e-12) if p < 1 else 1, min(m + near, 1) if m else 0
        )
        most = oracle.kept(row, k, p + near if p + near < 1 else 1, m - near if m else 0)
        assert not (least & ~mask).any()
        assert not (mask & ~most).any()


CASES = [
    pytest.param(0, 1.0, 0.0, id="nothing"),
    pytest.param(1, 1.0, 0.0, id="top-1"),
    pytest.param(7, 1.0, 0.0, id="top-7"),
    pytest.param(10_000, 1.0, 0.0, id="top-k beyond the vocabulary"),
    pytest.param(0, 0.9, 0.0, id="top-p"),
    pytest.param(0, 1e-6, 0.0, id="top-p of next to nothing"),
    pytest.param(0, 0.9999, 0.0, id="top-p of nearly all"),
    pytest.param(0, 1.0, 0.05, id="min-p"),
    pytest.param(0, 1.0, 1.0, id="min-p of 1"),
    pytest.param(40, 0.8, 0.0, id="top-p of what top-k keeps"),
    pytest.param(0, 0.7, 0.02, id="top-p of what min-p keeps"),
    pytest.param(20, 0.95, 0.01, id="all three"),
]


@pytest.mark.parametrize(("top_k", "top_p", "min_p"), CASES)
@pytest.mark.parametrize("scale", [0.1, 3.0, 30.0])
def test_one_setting(top_k: int, top_p: float, min_p: float, scale: float) -> None:
    rows = np.random.default_rng(1).normal(size=(6, 2000)) * scale
    k, p, m = [top_k] * 6, [top_p] * 6, [min_p] * 6
    check(rows, keeps(rows, [min(v, 2000) for v in k], p, m), k, p, m)


def test_each_row_has_its_own_setting() -> None:
    rows = np.random.default_rng(2).normal(size=(len(CASES), 500)) * 2
    k, p, m = (list(column) for column in zip(*(case.values for case in CASES), strict=True))
    got = keeps(rows, [min(v, 500) for v in k], p, m)
    check(rows, got, k, p, m)
    assert got[0].all()
    assert got[1].sum() == 1
    assert got[2].sum() == 7


@pytest.mark.parametrize("top_k", [1, 2, 50, plan.WINDOW])
def test_the_window_keeps_what_the_whole_sort_keeps(top_k: int) -> None:
    rows = np.random.default_rng(3).normal(size=(4, 3 * plan.WINDOW)) * 3
    settings = ([top_k] * 4, [1.0, 0.9, 0.5, 0.99], [0.0, 0.0, 0.01, 0.0])
    whole = keeps(rows, *settings)
    assert (keeps(rows, *settings, windowed=True) == whole).all()
    check(rows, whole, *settings)


def test_ties_of_the_last_token_are_kept_in_any_order() -> None:
    row = np.array([[1.0, 3.0, 2.0, 2.0, 2.0, 0.0]])
    expected = [False, True, True, True, True, False]
    assert keeps(row, [2], [1.0], [0.0]).tolist() == [expected]
    assert keeps(row[:, ::-1].copy(), [2], [1.0], [0.0]).tolist() == [expected[::-1]]


def test_ties_beyond_the_window_are_kept() -> None:
    row = np.zeros((1, 2 * plan.WINDOW))
    row[0, :10] = 1
    assert keeps(row, [plan.WINDOW], [1.0], [0.0], windowed=True).all()
    assert keeps(row, [10], [1.0], [0.0], windowed=True).sum() == 10


def test_forbidden_tokens_do_not_take_part() -> None:
    row = np.array([[-np.inf, 1.0, -np.inf, 0.5, -np.inf, 0.0]])
    assert keeps(row, [2], [1.0], [0.0])[0].tolist() == [False, True, False, True, False, False]
    assert keeps(row, [0], [0.99], [0.0])[0].tolist() == [False, True, False, True, False, True]


settings = st.tuples(
    st.integers(0, 40),
    st.one_of(st.just(1.0), st.floats(0.01, 0.999)),
    st.one_of(st.just(0.0), st.floats(0.001, 1)),
)


@given(st.lists(settings, min_size=4, max_size=4), st.integers(0, 2**32), st.floats(0.01, 20))
def test_any_setting(chosen: list[tuple[int, float, float]], seed: int, scale: float) -> None:
    rows = np.random.default_rng(seed).normal(size=(4, 32)) * scale
    k, p, m = (list(column) for column in zip(*chosen, strict=True))
    check(rows, keeps(rows, [min(v, 32) for v in k], p, m), k, p, m)


@given(st.lists(st.sampled_from([-2.0, 0.0, 0.5, 1.0]), min_size=1, max_size=12), settings)
def test_tied_logits(row: list[float], setting: tuple[int, float, float]) -> None:
    rows, (k, p, m) = np.array([row]), setting
    check(rows, keeps(rows, [min(k, len(row))], [p], [m]), [k], [p], [m])


def test_mask_reads_bits_from_the_least_significant() -> None:
    x = mx.zeros((2, 11))
    allowed = mx.array(np.array([[0b0000_0101, 0b0000_0100], [0xFF, 0xFF]], dtype=np.uint8))
    got = np.isfinite(np.array(plan.apply_mask(x, allowed)))
    assert np.flatnonzero(got[0]).tolist() == [0, 2, 10]
    assert got[1].all()
