"""Building blocks of fused layers: joint weights, partial sums, residual sums, rotations."""

from __future__ import annotations

from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mlx_lm.models.rope_utils import initialize_rope

from modelpack_engine.layers import kernels, matmul, packed
from modelpack_engine.layers.add_norm import Sums
from modelpack_engine.layers.kernels import find_rotation
from modelpack_engine.layers.matmul import (
    Parts,
    multiply,
    multiply_in_parts,
    num_parts,
)
from modelpack_engine.layers.weights import (
    can_join,
    join,
    weights_of,
)


def layers(bits: int | None = None, *, bias: bool = False) -> list[nn.Module]:
    mx.random.seed(3)
    made: list[nn.Module] = [nn.Linear(64, size, bias=bias) for size in (32, 16, 8)]
    return made if bits is None else [layer.to_quantized(32, bits) for layer in made]  # type: ignore[operator]


@pytest.mark.parametrize("bits", [None, 4, 8])
@pytest.mark.parametrize("bias", [False, True])
def test_joint_layers_equal_single_layers(bits: int | None, bias: bool) -> None:
    parts = layers(bits, bias=bias)
    x = mx.random.normal((5, 64))
    expected = mx.concatenate([layer(x) for layer in parts], axis=1)  # type: ignore[operator]
    mx.eval(expected)
    assert can_join(parts)
    joint = join(parts)
    assert (joint.num_outputs, joint.num_inputs) == (56, 64)
    np.testing.assert_allclose(multiply(x, joint), expected, rtol=1e-5, atol=1e-5)
    # The layers still work, with the same memory.
    again = mx.concatenate([layer(x) for layer in parts], axis=1)  # type: ignore[operator]
    np.testing.assert_array_equal(again, expected)
    total = multiply_in_parts(x[:, None], joint)
    assert total.count == 1
    np.testing.assert_allclose(total.array, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "unlike",
    [
        lambda a: [a[0], nn.Linear(32, 8, bias=False)],
        lambda a: [a[0], nn.Linear(64, 8, bias=True)],
        lambda a: [a[0], a[1].to_quantized(32, 4)],
        lambda a: [a[0].to_quantized(32, 8), a[1].to_quantized(32, 4)],
        lambda a: [a[0], nn.Embedding(8, 64)],
    ],
)
def test_layers_that_differ_are_not_joined(unlike: Any) -> None:
    assert not can_join(unlike(layers()))


def test_a_norm_has_no_linear_weights() -> None:
    assert weights_of(nn.RMSNorm(8)) is None


@given(outputs=st.integers(1, 200_000), tiles=st.integers(1, 300))
def test_parts_divide_the_inputs_evenly(outputs: int, tiles: int) -> None:
    parts = num_parts(outputs, tiles * 64)
    assert tiles % parts == 0
    assert parts == 1 or tiles // parts >= 4
    assert parts <= 8


def test_a_sum_has_terms_until_a_kernel_computes_it() -> None:
    sums = Sums()
    a, b = mx.array([[1.0, 2.0]]), mx.array([[10.0, 20.0]])
    total = sums.add(a, b)
    terms = sums.terms(total)
    assert terms is not None
    assert terms[0] is a
    assert terms[1].array is b
    assert terms[1].count == 1
    made = a + b
    sums.set_made(total, made)
    assert sums.terms(total) is None
    assert sums.value(total) is made
    following = sums.terms(sums.add(total, b))
    assert following is not None
    assert following[0] is made
    sums.clear()
    assert sums.value(total) is total


def test_rows_that_are_no_sum_are_normed_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rows are not kept: a model may change them in place afterwards."""
    calls = []

    def add_norm(a: mx.array, parts: mx.array, number: int, *by: object) -> list[mx.array]:
        calls.append((a, number))
        return [a, a + 100]

    monkeypatch.setattr(kernels, "add_norm", add_norm)
    sums, weight = Sums(), mx.ones((2,))
    x = mx.array([[[1.0, 2.0]], [[3.0, 4.0]]])
    found = sums.norm(x, weight, 1e-5)
    assert found is not None
    assert found.tolist() == (x + 100).tolist()
    assert calls == [(x, 0)]
    assert sums.value(x) is x
    assert sums.terms(x) is None
    assert sums.norm(x, weight.astype(mx.float16), 1e-5) is None, "the result has another type"
    assert sums.norm(x[:, 0], weight, 1e-5) is None, "heads are normed otherwise"


def test_a_sum_of_parts_keeps_its_parts() -> None:
    sums = Sums()
    parts = Parts(mx.array([[[1.0, 2.0]], [[3.0, 4.0]]]), 2)
    rows = sums.of_parts(parts, (1, 1, 2), mx.float16)
    assert (rows.shape, rows.dtype) == ((1, 1, 2), mx.float16)
    assert rows.tolist() == [[[4.0, 6.0]]]
    terms = sums.terms(sums.add(mx.zeros((1, 1, 2), mx.float16), rows))
    assert terms is not None
    assert terms[1] is parts


def test_rows_of_a_sum_are_taken_from_its_parts() -> None:
    sums, rows = Sums(), mx.array([2, 0, 0], mx.int32)
    for count in (1, 2):
        parts = Parts(mx.random.normal((count, 4, 2) if count > 1 else (4, 2)), count)
        total = sums.of_parts(parts, (4, 1, 2), mx.float32)
        taken = sums.take(total, rows)
        np.testing.assert_array_equal(taken, total[rows])
        terms = sums.terms(sums.add(taken, taken))
        assert terms is not None
        assert terms[1].count == count
    plain = sums.add(total, mx.ones((4, 1, 2)))
    made = total + 2
    sums.set_made(plain, made)
    np.testing.assert_array_equal(sums.take(plain, rows), made[rows])


ROPES = {
    "plain": (None, False),
    "interleaved": (None, True),
    "linear": ({"rope_type": "linear", "factor": 4.0}, False),
    "llama3": (
        {
            "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
        False,
    ),
    "yarn": (
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
        False,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ROPES)
def test_rotations_equal_mlx_lm(name: str) -> None:
    scaling, interleaved = ROPES[name]
    rope = initialize_rope(32, 10000.0, interleaved, scaling, 256)
    rotation = find_rotation(rope)
    assert rotation is not None
    x = mx.random.normal((1, 1, 1, 48), key=mx.random.key(1))
    expected = np.array(rope(x, offset=123))[0, 0, 0]
    half = rotation.dims // 2
    pairs = (
        [(2 * i, 2 * i + 1) for i in range(half)]
        if rotation.interleaved
        else [(i, i + half) for i in range(half)]
    )
    ours = np.array(x)[0, 0, 0].copy()
    for (one, two), inverse in zip(pairs, np.array(rotation.inverse), strict=True):
        angle = 123 * float(inverse)
        c, s = np.cos(angle) * rotation.factor, np.sin(angle) * rotation.factor
        ours[one], ours[two] = ours[one] * c - ours[two] * s, ours[one] * s + ours[two] * c
    np.testing.assert_allclose(ours, expected, rtol=2e-4, atol=2e-4)


def test_an_unknown_rotation_is_none() -> None:
    dynamic = initialize_rope(32, 1e4, False, {"rope_type": "dynamic", "factor": 2.0}, 64)
    assert find_rotation(dynamic) is None


@pytest.mark.parametrize(
    ("outputs", "inputs", "by_packed"),
    [
        (576, 1536, False),  # `packed` would keep nine blocks busy, and `product` 36
        (2048, 8192, True),  # both split the inputs
        (512, 256, True),  # neither does
    ],
)
def test_few_inputs_are_split_by_the_kernel_that_can(
    monkeypatch: pytest.MonkeyPatch, outputs: int, inputs: int, by_packed: bool
) -> None:
    weights = weights_of(nn.QuantizedLinear(inputs, outputs, bias=False, group_size=32, bits=4))
    assert weights is not None
    x = mx.zeros((8, inputs), mx.bfloat16)
    ran: list[tuple[str, int]] = []

    def run(name: str, *given: Any, at: int) -> mx.array:
        ran.append((name, given[at]))
        return x

    monkeypatch.setattr(packed, "tile_for", lambda x, weights: packed.TILE)
    monkeypatch.setattr(matmul, "_takes", lambda x, weights: True)
    monkeypatch.setattr(packed, "multiply", partial(run, "packed", at=3))
    monkeypatch.setattr(matmul, "_run", partial(run, "product", at=2))
    parts = multiply_in_parts(x, weights)
    [(name, count)] = ran
    assert (name == "packed", count) == (by_packed, parts.count)
    assert (parts.count > 1) == (inputs > 256)
