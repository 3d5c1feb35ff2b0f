"""Log-probabilities against numpy."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from modelpack_engine.request import MAX_LOGPROBS
from modelpack_engine.sampling.sampler import gather_logprobs
from tests.engine.sampling import oracle


@pytest.mark.parametrize("rows", [1, 5, 256, 257, 600])
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_equal_to_log_softmax(rows: int, dtype: mx.Dtype) -> None:
    """More rows than are processed at once, as in a chunk of a prompt."""
    x = mx.random.normal((rows, 97), key=mx.random.key(rows)).astype(dtype) * 5
    ids = np.random.default_rng(5).integers(0, 97, rows).astype(np.int32)
    expected = oracle.log_softmax(np.array(x.astype(mx.float32)).astype(np.float64))
    found = gather_logprobs(x, mx.array(ids), 3)
    assert np.allclose(np.array(found.chosen), expected[np.arange(rows), ids], atol=1e-4)
    assert found.top.shape == found.top_ids.shape == (rows, MAX_LOGPROBS)
    top = np.array(found.top)
    assert np.allclose(top, -np.sort(-expected, axis=-1)[:, :MAX_LOGPROBS], atol=1e-4)
    named = np.take_along_axis(expected, np.array(found.top_ids).astype(np.int64), axis=-1)
    assert np.allclose(top, named, atol=1e-4)


def test_read_gives_each_row_what_it_asked_for() -> None:
    x = mx.array([[0.0, 2.0, 1.0], [3.0, 0.0, 1.0], [0.0, 0.0, 0.0], [9.0, 9.0, 9.0]])
    found = gather_logprobs(x, mx.array([1, 1, 0, 0]), 2).read([1, 1, 0], [2, 0, None])
    first, second, third = found
    assert first is not None
    assert second is not None
    assert [token for token, _ in first.top] == [1, 2]
    assert first.logprob == first.top[0][1] == pytest.approx(-0.40760596)
    assert second.top == ()
    assert second.logprob == pytest.approx(-3.1698460)
    assert third is None


def test_no_alternatives_asked_for() -> None:
    found = gather_logprobs(mx.zeros((2, 8)), mx.array([1, 2]), 0)
    assert found.top.shape == found.top_ids.shape == (2, 0)
    assert [p and p.top for p in found.read([1, 2], [0, 0])] == [(), ()]
    assert found.chosen.tolist() == pytest.approx([-np.log(8)] * 2)


def test_a_vocabulary_smaller_than_the_most_alternatives() -> None:
    found = gather_logprobs(mx.array([[0.0, 1.0, 2.0]]), mx.array([0]), 20).read([0], [20])
    assert found[0] is not None
    assert [token for token, _ in found[0].top] == [2, 1, 0]
