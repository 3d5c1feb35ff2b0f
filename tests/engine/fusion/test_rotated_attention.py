"""Attention of rows that are rotated in the same kernel, on an emulated GPU."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import mlx.core as mx
import pytest

from modelpack_engine.attention.kv_pools import KVLayout, TokenMajorPools
from modelpack_engine.kernels import launch
from modelpack_engine.kernels.plan import AttentionShape
from modelpack_engine.layers import kernels, rotated_attention
from modelpack_engine.layers.kernels import Rotation
from modelpack_engine.layers.rotated_attention import Kind
from tests.engine.kernels.onhost import Host, emulated

BF16, F16, F32 = mx.bfloat16, mx.float16, mx.float32
LONG = pytest.mark.long


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> Iterator[Host]:
    with emulated(monkeypatch, rotated_attention.verdict, kernels.verdict) as found:
        yield found


def shape(heads: int, kv_heads: int, dim: int, window: int | None = None) -> AttentionShape:
    return AttentionShape(heads, kv_heads, dim, dim, window=window)


LLAMA = Kind(BF16, BF16, 1, BF16, 64, interleaved=False)
CASES = {
    "llama": (shape(4, 1, 64), LLAMA),
    "qwen3": (shape(4, 2, 128), replace(LLAMA, dims=128, norms=BF16, epsilon=1e-6)),
    "parts of sums": (shape(4, 2, 64), replace(LLAMA, joint=F32, count=3)),
    "values of another matmul": (
        shape(2, 1, 64), replace(LLAMA, norms=F32, epsilon=1e-6, values=BF16)
    ),
    "neighbours rotate": (shape(4, 4, 64), Kind(F16, F16, 1, F16, 32, interleaved=True)),
    "half of a head rotates": (shape(2, 1, 64), replace(LLAMA, dims=32, factor=1.5)),
    "nothing rotates": (shape(2, 1, 64), Kind(F32, F32, 1, F32, 0, interleaved=False)),
    "other pools": (shape(2, 1, 64), Kind(F32, F32, 1, BF16, 64, interleaved=False)),
    "window": (shape(2, 1, 64, 40), LLAMA),
    "several groups of heads": (shape(16, 1, 128), replace(LLAMA, dims=128)),
}  # fmt: skip


@pytest.mark.parametrize("on", ["metal", "cuda"])
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name == "llama" else LONG) for name in CASES]
)
def test_the_kernel_equals_two(
    host: Host, monkeypatch: pytest.MonkeyPatch, name: str, on: str
) -> None:
    monkeypatch.setattr(launch, "backend", lambda: on)
    assert rotated_attention.verdict(*CASES[name]) is None
    bodies = [body for body, _ in host.calls]
    ours = [call for body, call in host.calls if body == "rotate_decode"]
    assert bodies.count("rotate") == len(ours)
    assert {call["SPLIT"] for call in ours} == ({False} if name == "window" else {False, True})
    if on == "cuda":
        assert {call["HEADS"] for call in ours} >= {1}


@pytest.mark.sample(2)
@pytest.mark.parametrize(
    ("right", "wrong", "problem"),
    [
        (">= own_token) {", "> own_token) {", "its output in 1 parts"),
        ("value * params[0]", "value", "its output in 1 parts"),
        ("kind == 2) own_value[vector]", "kind == 2) own_key[vector]", "its output in 1 parts"),
        ("(size_t)slot * KROW", "(size_t)(slot + 1) * KROW", "its keys"),
        ("before * sines[n] + x", "before * sines[n] - x", "its output in 1 parts"),
    ],
)
def test_the_verdict_names_a_wrong_kernel(host: Host, right: str, wrong: str, problem: str) -> None:
    edited = []

    def edit(_: str, text: str) -> str:
        edited.append(right in text)
        return text.replace(right, wrong)

    host.break_by(edit)
    assert str(rotated_attention.verdict(*CASES["llama"])).startswith(f"{problem} is off")
    assert any(edited)


def test_stale_numbers_of_a_slot_do_not_count(host: Host) -> None:
    """The row's slot, and those after it, may have what a failed request left there."""
    del host
    pools = TokenMajorPools(KVLayout(1, 64, 1, 64, BF16), 3, 16)
    pools.keys = mx.where(mx.arange(48)[:, None, None] >= 20, mx.nan, pools.keys).astype(BF16)
    pools.values = mx.where(mx.arange(48)[:, None, None] >= 20, mx.nan, pools.values).astype(BF16)
    mx.eval(pools.keys, pools.values)
    rotation = Rotation(mx.ones((32,)), 64, 1.0, interleaved=False)
    joint = mx.random.normal((2, 4 * 64), key=mx.random.key(1)).astype(BF16)
    positions, slots = mx.array([4, 0], mx.int32), mx.array([20, -1], mx.int32)
    found = rotated_attention.attend(
        joint, 1, BF16, pools, positions, slots, rotation, (2, 1), None,
        mx.array([[1, 0], [0, 0]], mx.int32), mx.array([5, 0], mx.int32), scale=0.125,
    )  # fmt: skip
    assert found is not None
    assert mx.isfinite(found.astype(F32)).all()
    assert mx.isnan(pools.keys[21:].astype(F32)).all(), "only the row's slot is written"
    assert mx.isfinite(pools.keys[:21].astype(F32)).all()


def test_two_kernels_are_used_where_the_one_does_not_fit(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    del host
    ones = mx.ones((1,), mx.int32)
    for dim in (96, 64):  # 96 elements are no whole vectors of the lanes
        pools = TokenMajorPools(KVLayout(1, dim, 1, dim, BF16), 3, 16)
        rotation = Rotation(mx.ones((dim // 2,)), dim, 1.0, interleaved=False)
        given = (
            mx.ones((1, 4 * dim), BF16), 1, BF16, pools, ones, 16 * ones, rotation, (2, 1), None,
            mx.array([[1]], mx.int32), ones,
        )  # fmt: skip
        monkeypatch.setattr(rotated_attention, "verdict", lambda *_: None)
        assert (rotated_attention.attend(*given, scale=1.0) is None) is (dim == 96)
        monkeypatch.setattr(rotated_attention, "verdict", lambda *_: "it is off")
        assert rotated_attention.attend(*given, scale=1.0) is None
