"""Random draws have the correct distribution, and depend only on seed and position."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from modelpack_engine.sampling import plan
from tests.engine.sampling import oracle

DRAWS = 40_000


def keys_of(seed: int, count: int) -> mx.array:
    seeds = np.full(count, seed, dtype=np.uint64)
    return mx.array(plan.draw_keys(seeds, np.arange(count, dtype=np.uint64)))


def counts_of(tokens: mx.array, vocab_size: int) -> np.ndarray:
    return np.bincount(np.array(tokens), minlength=vocab_size)


@pytest.mark.parametrize("scale", [0.0, 1.0, 4.0])
def test_draws_follow_the_softmax(scale: float) -> None:
    row = np.random.default_rng(4).normal(size=24) * scale
    many = mx.broadcast_to(mx.array(row.astype(np.float32)), (DRAWS, 24))
    tokens = plan.draw(many, None, keys_of(1, DRAWS))
    assert oracle.chi_square(counts_of(tokens, 24), oracle.softmax(row)) < 5


def test_draws_follow_the_softmax_of_what_is_kept() -> None:
    row = np.linspace(-2, 2, 16)
    many = mx.broadcast_to(mx.array(row.astype(np.float32)), (DRAWS, 16))
    tokens = plan.draw(many, mx.full((DRAWS, 1), 0.5), keys_of(2, DRAWS))
    allowed = np.where(row >= 0.5, row, -np.inf)
    assert oracle.chi_square(counts_of(tokens, 16), oracle.softmax(allowed)) < 5


def test_neighbouring_seeds_are_independent() -> None:
    """Draws at one position with seeds 0, 1, 2, … have the same distribution."""
    seeds = np.arange(DRAWS, dtype=np.uint64)
    keys = plan.draw_keys(seeds, np.full(DRAWS, 7, dtype=np.uint64))
    tokens = plan.draw(mx.zeros((DRAWS, 8)), None, mx.array(keys))
    assert oracle.chi_square(counts_of(tokens, 8), np.full(8, 1 / 8)) < 5


def test_neighbouring_positions_are_independent() -> None:
    """Pairs of consecutive draws are uniform over all pairs of tokens."""
    tokens = np.array(plan.draw(mx.zeros((DRAWS, 6)), None, keys_of(3, DRAWS)))
    pairs = np.bincount(tokens[:-1:2] * 6 + tokens[1::2], minlength=36)
    assert oracle.chi_square(pairs, np.full(36, 1 / 36)) < 5


def test_noise_is_gumbel_and_finite() -> None:
    noise = np.array(plan.gumbel(keys_of(4, 64), 4096)).astype(np.float64)
    assert np.isfinite(noise).all()
    below = [(noise < x).mean() for x in (-1, 0, 1, 3)]
    assert np.abs(below - np.exp(-np.exp([1.0, 0, -1, -3]))).max() < 0.004


def test_noise_is_finite_where_the_uniform_number_is_zero() -> None:
    """A uniform number of 0 occurs in one of 90,000 draws from a vocabulary of 49,152."""
    key = mx.array([[0, 1_720_516]], dtype=mx.uint32)  # found by trying keys
    uniform = mx.random.uniform(shape=(4096,), key=key[0])
    assert uniform[2453].item() == 0
    noise = np.array(plan.gumbel(key, 4096))[0]
    assert np.isfinite(noise).all()
    assert noise.argmax() == 2453


def test_noise_of_a_row_does_not_depend_on_the_others() -> None:
    keys = keys_of(5, 9)
    together = np.array(plan.gumbel(keys, 1001))
    for row in range(9):
        assert (np.array(plan.gumbel(keys[row : row + 1], 1001))[0] == together[row]).all()
    assert len({tuple(row) for row in together}) == 9


def test_keys_differ_where_seed_or_position_differ() -> None:
    seeds = np.repeat(np.arange(100, dtype=np.uint64), 100)
    positions = np.tile(np.arange(100, dtype=np.uint64), 100)
    assert len(np.unique(plan.draw_keys(seeds, positions), axis=0)) == 10_000


def test_mix_is_splitmix64() -> None:
    """The mix equals SplitMix64's outputs for state 0 and for its next state."""
    states = np.array([0, 0x9E3779B97F4A7C15], dtype=np.uint64)
    assert [hex(v) for v in plan.mix(states)] == ["0xe220a8397b1dcdaf", "0x6e789e6aa1b965f4"]


@pytest.mark.parametrize(("seed", "folded"), [(5, 5), (-1, 2**64 - 1), (2**64 + 3, 3)])
def test_any_integer_is_a_seed(seed: int, folded: int) -> None:
    assert plan.seeds_of([seed]).tolist() == [folded]
