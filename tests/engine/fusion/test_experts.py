"""Fused kernels of mixtures of experts, compared with mlx-lm's models on an emulated GPU."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm.models.deepseek_v3 import group_expert_select
from mlx_lm.models.switch_layers import SwitchGLU, SwitchLinear, SwitchMLP

from modelpack_engine.layers import blocks, expert_kernels
from modelpack_engine.layers.add_norm import Sums
from modelpack_engine.layers.blocks import (
    BLOCK_TYPES,
    BlockSwitchLinear,
    layer_values,
    random_words,
)
from modelpack_engine.layers.expert_kernels import Routing, route
from modelpack_engine.patches.fused_layers import fuse_experts, fuse_router, has_experts
from modelpack_engine.patches.modules import ClassSwaps
from tests.engine.kernels.onhost import Host, emulated
from tests.engine.runner.models import tiny_llama
from tests.engine.zoo.catalogue import CATALOGUE
from tests.engine.zoo.specimen import make_specimen

pytestmark = pytest.mark.long

ROWS = 9


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> Iterator[Host]:
    with emulated(monkeypatch, expert_kernels.verdict, blocks.experts_verdict) as found:
        yield found


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_kernels_agree_with_mlx(host: Host, dtype: mx.Dtype) -> None:
    assert expert_kernels.verdict(dtype) is None
    assert {body for body, _ in host.calls} == {"route", "dispatch", "combine"}


@pytest.mark.parametrize(
    ("body", "wrong", "found"),
    [
        ("route", ("value[n] >= most", "value[n] < most"), "experts by softmax differ"),
        ("route", ("score[n] / whole", "score[n]"), "scores by softmax differ"),
        ("route", ("+ float(bias[e])", ""), "experts by sigmoids differ"),
        ("route", ("GROUPS - KEEP", "GROUPS - KEEP - 1"), "experts by groups differ"),
        ("dispatch", ("at = less + before", "at = before"), "rows go to the wrong experts"),
        ("dispatch", ("less + done", "less"), "spans do not cover all pairs"),
        ("combine", ("* score", "+ score"), "sums of experts are off"),
    ],
)
def test_the_verdict_names_a_wrong_kernel(
    host: Host, body: str, wrong: tuple[str, str], found: str
) -> None:
    host.break_by(lambda name, text: text.replace(*wrong) if name == body else text)
    assert expert_kernels.verdict(mx.float32) == found


@pytest.mark.parametrize(
    ("experts", "top_k", "groups", "keep", "normed"),
    [(8, 2, 1, 1, True), (64, 6, 8, 3, True), (33, 1, 1, 1, True), (16, 4, 4, 2, False)],
)
def test_routing_by_sigmoids_equals_deepseek(
    host: Host, experts: int, top_k: int, groups: int, keep: int, normed: bool
) -> None:
    keys = mx.random.split(mx.random.key(experts))
    gates = mx.random.normal((ROWS, experts), mx.bfloat16, key=keys[0])
    bias = mx.random.normal((experts,), key=keys[1])  # below 0: dropped groups can win
    chosen, scores = group_expert_select(gates, bias, top_k, groups, keep, 2.5, normed)
    routing = Routing(top_k, normed and top_k > 1, True, groups, keep, 2.5)
    found, found_scores = route(gates, routing, bias, mx.float32)
    for row in range(ROWS):
        expected = dict(zip(chosen[row].tolist(), scores[row].tolist(), strict=True))
        actual = dict(zip(found[row].tolist(), found_scores[row].tolist(), strict=True))
        assert actual == pytest.approx(expected, rel=1e-4)


def test_rows_of_nan_get_distinct_experts(host: Host) -> None:
    logits = mx.full((2, 8), float("nan"))
    for routing in (Routing(3, True), Routing(3, True, sigmoid=True)):
        chosen, scores = route(logits, routing, mx.zeros((8,)), mx.float32)
        for row in chosen.tolist():
            assert len(set(row)) == 3
            assert max(row) < 8
        assert mx.all(mx.isnan(scores)).item()


def mixtures(model: nn.Module) -> list[nn.Module]:
    """Return the modules that contain experts."""
    return [
        module
        for _, module in model.named_modules()
        if any(type(child) in (SwitchGLU, SwitchMLP) for child in module.children().values())
    ]


NAMES = ("deepseek_v3", "qwen3_moe", "gpt_oss", "nemotron_h: experts")
ROUTED = ("deepseek_v3", "qwen3_moe", "qwen3_next", "glm4_moe", "nemotron_h: experts")
MORE = ("qwen3_next", "glm4_moe", "mixtral", "olmoe", "ernie4_5_moe", "dots1", "hunyuan", "phimoe")


@pytest.mark.parametrize(
    "name", [*NAMES, *(pytest.param(name, marks=pytest.mark.long) for name in MORE)]
)
def test_fused_experts_equal_the_model(host: Host, name: str) -> None:
    model = make_specimen(next(c for c in CATALOGUE if c.id == name)).model
    (block, *_) = mixtures(model)
    (experts,) = (m for m in block.children().values() if type(m) in (SwitchGLU, SwitchMLP))
    first = experts.fc1 if type(experts) is SwitchMLP else experts.gate_proj
    x = mx.random.normal((ROWS, 1, first.input_dims), key=mx.random.key(5))
    ask: Any = block
    expected = ask(x)
    swaps, step = ClassSwaps(), SimpleNamespace(active=True, fuses_experts=True)
    fused = [
        fuse(module, step, swaps)
        for _, module in block.named_modules()
        for fuse in (fuse_experts, partial(_fuse_router, Sums()))
    ]
    np.testing.assert_allclose(ask(x), expected, rtol=1e-3, atol=1e-4)
    used = {body for body, _ in host.calls}
    assert used >= {"dispatch", "combine"}
    assert ("route" in used) == (name in ROUTED)
    assert ("gate" in used) == (name in ("qwen3_next", "nemotron_h: experts"))
    assert sum(fused) == (3 if "nemotron" in name else 2 if "route" in used else 1)
    host.calls.clear()
    step.active = step.fuses_experts = False
    np.testing.assert_array_equal(ask(x), expected)
    assert not host.calls


def switches(stored: tuple[str, ...]) -> tuple[Any, Any]:
    """Return experts, and the same with the `stored` layers in a block type."""
    plain: Any = SwitchGLU(256, 256, 4)
    mixed: Any = SwitchGLU(256, 256, 4)
    for name in ("gate_proj", "up_proj", "down_proj"):
        words = mx.array(random_words(BLOCK_TYPES["Q6_K"], 4 * 256, 256, len(name)))
        layer = BlockSwitchLinear(BLOCK_TYPES["Q6_K"], 256, 256, 4, mx.float32)
        layer.weight = words.reshape(4, 256, -1)
        plain[name].weight = layer_values(layer, mx.float32)
        if name in stored:
            mixed[name] = layer
        else:
            mixed[name].weight = plain[name].weight
    return plain, mixed


@pytest.mark.parametrize("stored", [("down_proj",), ("gate_proj", "up_proj", "down_proj")])
@pytest.mark.parametrize("rows", [1, ROWS])
def test_experts_in_a_block_type_run_with_others(
    host: Host, stored: tuple[str, ...], rows: int
) -> None:
    """Q4_K_M has gates and ups in 4 bits, and half of the downs in Q6_K."""
    plain, mixed = switches(stored)
    x = mx.random.normal((rows, 1, 256), key=mx.random.key(3))
    chosen = mx.random.randint(0, 4, (rows, 1, 2), key=mx.random.key(4)).astype(mx.uint32)
    expected = plain(x, chosen)
    step: Any = SimpleNamespace(active=True, fuses_experts=True)
    assert fuse_experts(mixed, step, ClassSwaps())
    np.testing.assert_allclose(mixed(x, chosen), expected, rtol=1e-3, atol=1e-4)
    # More pairs than four times the experts compute all values.
    assert ("block_dots" if rows == 1 else "block_values") in {body for body, _ in host.calls}


def test_experts_in_a_block_type_are_multiplied_by_spans(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where tensor cores multiply them; the kernel itself is tested in test_blocks.py."""
    calls: list[bool] = []

    def by_spans(
        x: mx.array, weight: mx.array, kind: Any, tile: Any, bias: Any, spans: Any, source: Any
    ) -> mx.array:
        calls.append(source is not None)
        layer = SimpleNamespace(weight=weight, kind=kind)
        full = np.array(layer_values(layer, mx.float32))  # type: ignore[arg-type]
        rows = np.arange(x.shape[0]) if source is None else np.array(source)
        given = np.array(x.astype(mx.float32))[rows]
        out = np.zeros((len(rows), full.shape[1]), np.float32)
        for expert, first, count in np.array(spans):
            out[first : first + count] = given[first : first + count] @ full[expert].T
        return mx.array(out).astype(x.dtype)

    monkeypatch.setattr(blocks, "run_tiles", by_spans)
    monkeypatch.setattr(blocks, "spans_verdict", lambda *_: None)
    monkeypatch.setattr(blocks, "_has_tensor_cores", lambda: True)
    plain, mixed = switches(("gate_proj", "up_proj", "down_proj"))
    x = mx.random.normal((ROWS, 1, 256), key=mx.random.key(3)).astype(mx.bfloat16)
    chosen = mx.random.randint(0, 4, (ROWS, 1, 2), key=mx.random.key(4)).astype(mx.uint32)
    expected = plain(x.astype(mx.float32), chosen)
    step: Any = SimpleNamespace(active=True, fuses_experts=True)
    assert fuse_experts(mixed, step, ClassSwaps())
    found = mixed(x, chosen).astype(mx.float32)
    np.testing.assert_allclose(found, expected, rtol=0.1, atol=0.02 * float(mx.abs(expected).max()))
    assert calls == [True, True, False]
    assert host.calls


def test_expert_outputs_work_like_any_array(host: Host) -> None:
    """Only `* scores` followed by `.sum` is fused; other operations give the usual results."""
    mx.random.seed(2)
    experts: Any = SwitchGLU(32, 16, 4)
    x = mx.random.normal((ROWS, 1, 32))
    chosen = mx.random.randint(0, 4, (ROWS, 1, 2)).astype(mx.uint32)
    scores = mx.random.uniform(0, 1, (ROWS, 1, 2))
    plain = experts(x, chosen)
    step: Any = SimpleNamespace(active=True, fuses_experts=True)
    assert fuse_experts(experts, step, ClassSwaps())
    given = experts(x, chosen)
    close: Any = {"rtol": 1e-4, "atol": 1e-5}
    np.testing.assert_allclose(given, plain, **close)
    np.testing.assert_allclose(given * 2, plain * 2, **close)
    weighted, wanted = scores[..., None] * given, scores[..., None] * plain
    np.testing.assert_allclose(weighted, wanted, **close)
    np.testing.assert_allclose(weighted.sum(axis=-1), wanted.sum(axis=-1), **close)
    np.testing.assert_allclose(mx.sum(weighted, axis=-2), wanted.sum(axis=-2), **close)
    kept = weighted.sum(axis=-2, keepdims=True)
    np.testing.assert_allclose(kept, wanted.sum(axis=-2, keepdims=True), **close)
    total = weighted.sum(axis=2)
    np.testing.assert_allclose(total, wanted.sum(axis=-2), **close)
    assert total.astype(mx.bfloat16).dtype == mx.bfloat16
    assert total.astype(mx.float32).dtype == mx.float32
    np.testing.assert_allclose(total + 1, wanted.sum(axis=-2) + 1, **close)


def test_mlx_computes_few_pairs(host: Host) -> None:
    experts: Any = SwitchGLU(32, 16, 4)
    step: Any = SimpleNamespace(active=True, fuses_experts=True)
    fuse_experts(experts, step, ClassSwaps())
    experts(mx.zeros((2, 1, 32)), mx.zeros((2, 1, 2), mx.uint32))
    assert not host.calls


def test_rows_sorted_by_expert_are_contiguous(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """With sorted experts, MLX on CUDA takes the stride of an axis of size 1 for that of rows."""
    strides: list[tuple[tuple[int, ...], tuple[int, ...]]] = []
    original: Any = SwitchLinear.__call__

    def call(layer: Any, x: mx.array, indices: mx.array, sorted_indices: bool = False) -> Any:
        if sorted_indices:
            view = memoryview(x)  # type: ignore[arg-type]
            assert view.strides is not None
            strides.append((x.shape, tuple(n // view.itemsize for n in view.strides)))
        return original(layer, x, indices, sorted_indices)

    monkeypatch.setattr(SwitchLinear, "__call__", call)
    experts: Any = SwitchGLU(32, 16, 4)
    fuse_experts(experts, SimpleNamespace(active=True, fuses_experts=True), ClassSwaps())  # type: ignore[arg-type]
    experts(mx.ones((ROWS, 1, 32)), mx.zeros((ROWS, 1, 2), mx.uint32))
    wide, narrow = ((ROWS * 2, 1, dim) for dim in (32, 16))
    assert strides == [(shape, (shape[2], shape[2], 1)) for shape in (wide, wide, narrow)]


def _fuse_router(sums: Sums, module: nn.Module, step: Any, swaps: ClassSwaps) -> bool:
    return fuse_router(module, sums, step, swaps)


def test_has_experts() -> None:
    assert not has_experts(tiny_llama())
    assert has_experts(nn.Sequential(nn.Linear(8, 8), SwitchGLU(8, 8, 2)))


def test_other_layers_are_not_fused() -> None:
    step: Any = SimpleNamespace(active=True, fuses_experts=True)
    assert not fuse_experts(nn.Linear(8, 8), step, ClassSwaps())
    assert not fuse_router(nn.Linear(8, 8), Sums(), step, ClassSwaps())
