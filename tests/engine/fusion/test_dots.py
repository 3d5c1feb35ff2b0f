"""Matmuls of one row by dot products, and experts by warpgroups, on an emulated GPU."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm.models.switch_layers import SwitchGLU

from modelpack_engine.kernels import launch
from modelpack_engine.layers import dots, expert_kernels, matmul, packed, strips
from modelpack_engine.layers.add_norm import Sums
from modelpack_engine.layers.weights import random_weights
from modelpack_engine.patches.fused_layers import fuse_experts
from modelpack_engine.patches.modules import ClassSwaps
from tests.engine.kernels.onhost import Host, emulated

pytestmark = pytest.mark.long

BF16, F16 = mx.bfloat16, mx.float16
VERDICTS = (
    dots.verdict, dots.experts_verdict, dots.normed_verdict, expert_kernels.verdict,
    expert_kernels.wide_verdict,
)  # fmt: skip


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> Iterator[Host]:
    with emulated(monkeypatch, *VERDICTS) as found:
        monkeypatch.setattr(launch, "backend", lambda: "cuda")
        monkeypatch.setattr(expert_kernels, "has_warpgroups", lambda: True)
        monkeypatch.setattr(packed, "has_warpgroups", lambda: True)
        yield found


@pytest.mark.parametrize(("dtype", "bits"), [(BF16, 16), (F16, 4), (BF16, 8)])
def test_kernels_agree_with_mlx(host: Host, dtype: mx.Dtype, bits: int) -> None:
    assert dots.verdict(dtype, bits, 64) is None
    assert dots.experts_verdict(dtype, bits, 64) is None
    assert dots.normed_verdict(dtype, bits, 64) is None


@pytest.mark.parametrize("swiglu", [False, True])
def test_experts_by_warpgroups_agree_with_mlx(host: Host, swiglu: bool) -> None:
    assert expert_kernels.wide_verdict(BF16, swiglu=swiglu) is None


@pytest.mark.parametrize(
    ("body", "wrong", "found"),
    [
        ("dots", ("float(T(y / (", "float(T(y * ("), "SwiGLU is off"),
        ("dots", ("factor[a] = i < ", "factor[a] = 2 * i < "), "the product is off"),
    ],
)
def test_the_verdict_names_a_wrong_kernel(
    host: Host, body: str, wrong: tuple[str, str], found: str
) -> None:
    host.break_by(lambda name, text: text.replace(*wrong) if name == body else text)
    assert str(dots.verdict(BF16, 16, 64)).startswith(found)


@pytest.mark.parametrize(
    ("bits", "rows", "bodies"),
    [(16, 1, ["dots"] * 3), (8, 1, ["packed_strips"] * 3), (4, 1, ["packed_strips"] * 3)],
)
def test_one_row_is_multiplied(
    host: Host, monkeypatch: pytest.MonkeyPatch, bits: int, rows: int, bodies: list[str]
) -> None:
    monkeypatch.setattr(strips, "verdict", lambda *_: None)
    keys = mx.random.split(mx.random.key(2), 3)
    weights, full, bias = random_weights(BF16, bits, (48, 512), 1 / 16, keys[0], keys[1], 64)
    x = mx.random.normal((rows, 512), key=keys[2]).astype(BF16)
    dots.verdict(BF16, bits, 64)
    host.calls.clear()
    expected = x.astype(mx.float32) @ full.T + bias
    gate, up = mx.split(expected, 2, axis=1)
    parts = matmul.multiply_in_parts(x, weights)
    total = parts.array if parts.count == 1 else parts.array.sum(axis=0)
    for found, wanted in (
        (matmul.multiply(x, weights), expected),
        (total, expected),
        (matmul.swiglu(x, weights), gate * mx.sigmoid(gate) * up),
    ):
        np.testing.assert_allclose(
            found.astype(mx.float32), wanted.astype(mx.float32), rtol=2e-2, atol=5e-2
        )
    assert [body for body, _ in host.calls] == bodies


@pytest.mark.parametrize(
    ("rows", "bodies"), [(1, {"dots"}), (8, {"dots"}), (70, {"dispatch", "experts_wide"})]
)
def test_experts_of_few_and_many_rows(host: Host, rows: int, bodies: set[str]) -> None:
    mx.random.seed(4)
    experts: Any = SwitchGLU(64, 128, 4)
    experts.set_dtype(BF16)
    x = mx.random.normal((rows, 1, 64)).astype(BF16)
    chosen = mx.random.randint(0, 4, (rows, 1, 2)).astype(mx.uint32)
    scores = mx.random.uniform(0, 1, (rows, 1, 2)).astype(BF16)
    experts.set_dtype(mx.float32)  # MLX has no other type for them on a CPU
    plain = experts(x.astype(mx.float32), chosen)
    experts.set_dtype(BF16)
    step: Any = SimpleNamespace(active=True, fuses_experts=True)
    assert fuse_experts(experts, step, ClassSwaps())
    assert dots.experts_verdict(BF16, 16, 64) is None
    assert expert_kernels.wide_verdict(BF16, swiglu=True) is None
    host.calls.clear()
    given = experts(x, chosen)
    close: Any = {"rtol": 3e-2, "atol": 3e-2}
    total = (given * scores[..., None]).sum(axis=-2)
    wanted = (plain * scores[..., None]).sum(axis=-2)
    np.testing.assert_allclose(given.astype(mx.float32), plain, **close)
    np.testing.assert_allclose(total.astype(mx.float32), wanted, **close)
    assert {body for body, _ in host.calls} >= bodies


def test_quantised_experts_whose_calls_adapters_have_replaced(host: Host) -> None:
    """Steps without adapters use the same kernels with and without adapters in memory."""
    mx.random.seed(4)
    experts: Any = SwitchGLU(64, 64, 4)
    nn.quantize(experts, 32, 4)
    experts.set_dtype(BF16)
    x = mx.random.normal((2, 1, 64)).astype(BF16)
    chosen = mx.random.randint(0, 4, (2, 1, 2)).astype(mx.uint32)
    fuse_experts(experts, SimpleNamespace(active=True, fuses_experts=True), ClassSwaps())  # type: ignore[arg-type]
    assert dots.experts_verdict(BF16, 4, 32) is None
    found = []
    for _ in range(2):
        host.calls.clear()
        found.append((experts(x, chosen), list(host.calls)))
        for layer in (experts.gate_proj, experts.up_proj, experts.down_proj):
            ClassSwaps().override(layer, lambda original, *args, **more: original(*args, **more))
    (wanted, calls), (given, again) = found
    assert [body for body, _ in calls] == ["dots", "dots"]
    assert again == calls
    assert mx.array_equal(given, wanted)


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("gated", [False, True])
def test_a_row_is_added_normed_and_multiplied_by_one_kernel(
    host: Host, monkeypatch: pytest.MonkeyPatch, rows: int, gated: bool
) -> None:
    monkeypatch.setattr(matmul, "_takes", lambda *_: False)
    keys = mx.random.split(mx.random.key(2), 5)
    weights, full, bias = random_weights(BF16, 16, (48, 512), 1 / 16, keys[0], keys[1], 64)
    a, b = (mx.random.normal((rows, 1, 512), key=key).astype(BF16) for key in keys[2:4])
    norm = mx.random.uniform(0.5, 1.5, (512,), key=keys[4]).astype(BF16)
    assert dots.normed_verdict(BF16, 16, 64) is None
    host.calls.clear()
    sums = Sums()
    total = sums.add(a, b)
    x = sums.norm(total, norm, 1e-5)
    assert x is not None
    if gated:
        monkeypatch.setattr(matmul.kernels, "swiglu", lambda joint: _gated(joint))
        found = sums.swiglu(x, weights)
    else:
        found = sums.multiply(x, weights).array
    expected = mx.fast.rms_norm(a + b, norm, 1e-5).reshape(rows, -1).astype(mx.float32)
    expected = expected @ full.T + bias
    wanted = _gated(expected) if gated else expected
    np.testing.assert_allclose(found.astype(mx.float32), wanted, rtol=3e-2, atol=1e-1)
    made = sums.value(total)
    assert made is not total
    np.testing.assert_array_equal(made.astype(mx.float32), (a + b).astype(mx.float32))
    assert [body for body, _ in host.calls if body in ("dots", "product")] == ["dots"][: rows == 1]


def _gated(joint: mx.array) -> mx.array:
    gate, up = mx.split(joint, 2, axis=1)
    return gate * mx.sigmoid(gate) * up
