"""Layers in GGUF's block types: which kernel multiplies what, and the kernels on the host."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm.models.switch_layers import SwitchLinear

from modelpack_engine.kernels import launch
from modelpack_engine.kernels.recording import NotRecordedError, Transient, recorded
from modelpack_engine.layers import blocks, matmul
from modelpack_engine.layers.blocks import (
    BLOCK_TYPES,
    BlockEmbedding,
    BlockLinear,
    BlockSwitchLinear,
    Tile,
)
from modelpack_engine.layers.weights import can_join, join, weights_of
from modelpack_engine.models import planes
from modelpack_engine.models.precision import unpack
from modelpack_engine.patches.lora import dense_weight
from modelpack_engine.runner.kv_cache_size import step_memory
from tests.engine.kernels.onhost import Host, emulated
from tests.engine.loaders.test_architectures import distance, load_tiny
from tests.engine.loaders.test_planes import tensor, tiny_of

BF16, F16, F32 = mx.bfloat16, mx.float16, mx.float32
VERDICTS = (
    blocks.verdict, blocks.values_verdict, blocks.tiles_verdict, blocks.experts_verdict,
    blocks.spans_verdict,
)  # fmt: skip
NAMES = [
    pytest.param(name, marks=[] if name == "Q6_K" else pytest.mark.long)
    for name in sorted(BLOCK_TYPES)
]
SMALL = Tile(8, 2, 2)


def linear(name: str, outputs: int, inputs: int, seed: int = 0, **more: Any) -> BlockLinear:
    layer = BlockLinear(BLOCK_TYPES[name], inputs, outputs, BF16, **more)
    layer.weight = mx.array(blocks.random_words(BLOCK_TYPES[name], outputs, inputs, seed))
    return layer


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> Iterator[Host]:
    with emulated(monkeypatch, *VERDICTS) as found:
        yield found


@pytest.mark.long
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("rows", [1, 3])
def test_products_of_stored_blocks_equal_those_of_the_gguf_package(
    host: Host, name: str, rows: int
) -> None:
    stored, full = tensor(name, 7, 1280)
    full, kind = full / np.abs(full).max(), BLOCK_TYPES[name]
    weight = planes.of_blocks(stored, kind)
    x = mx.random.normal((rows, 1280), key=mx.random.key(rows)).astype(BF16)
    largest = np.abs(gguf.quants.dequantize(
        stored.raw.reshape(7, -1), gguf.GGMLQuantizationType[name]
    )).max()  # fmt: skip
    expected = np.array(x.astype(F32), np.float64) @ full.T
    found = np.array(blocks.run_dots(x, weight, kind).astype(F32)) / largest
    np.testing.assert_allclose(found, expected, rtol=0.01, atol=0.01)
    assert [body for body, _ in host.calls] == ["block_dots"]


@pytest.mark.parametrize("name", NAMES)
def test_values_on_the_host(host: Host, name: str) -> None:
    stored, full = tensor(name, 5, 512)
    found = blocks.run_values(planes.of_blocks(stored, BLOCK_TYPES[name]), BLOCK_TYPES[name], F32)
    np.testing.assert_allclose(np.array(found), full, rtol=1e-6, atol=1e-5)
    assert [body for body, _ in host.calls] == ["block_values"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [BF16, pytest.param(F16, marks=pytest.mark.long)])
def test_tiles_on_the_host(
    host: Host, monkeypatch: pytest.MonkeyPatch, name: str, dtype: mx.Dtype
) -> None:
    monkeypatch.setattr(launch, "backend", lambda: "cuda")
    assert blocks._compare_tiles(dtype, BLOCK_TYPES[name], SMALL) is None
    assert {body for body, _ in host.calls} == {"block_tiles"}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name == "Q4_K" else pytest.mark.long)
        for name in sorted(BLOCK_TYPES)
    ],
)
def test_halves_of_superblocks_have_factors(
    host: Host, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Each kernel reads factors of 128 weights, which rows with reordered columns have."""
    kind = BLOCK_TYPES[name].halved
    assert kind.block == min(BLOCK_TYPES[name].block, 128)
    assert kind.inputs(kind.words(1280)) == 1280
    assert blocks._compare_values(F32, kind) is None
    assert blocks._compare(BF16, kind, 3) is None
    assert blocks._compare_experts(BF16, kind, biased=False) is None
    monkeypatch.setattr(launch, "backend", lambda: "cuda")
    assert blocks._compare_tiles(BF16, kind, SMALL) is None
    assert {body for body, _ in host.calls} == {"block_values", "block_dots", "block_tiles"}


@pytest.mark.long
@pytest.mark.parametrize(("rows", "dtype"), [(1, F16), (2, F32), (4, BF16), (8, F32), (11, BF16)])
def test_any_number_of_rows_of_any_type(host: Host, rows: int, dtype: mx.Dtype) -> None:
    del host
    for name in ("Q4_K", "Q3_K"):
        assert blocks._compare(dtype, BLOCK_TYPES[name], rows) is None


@pytest.mark.sample(1)
@pytest.mark.parametrize(
    ("verdict", "wrong"),
    [
        ("verdict", ("- float(OFFSET + ZERO) * scale", "")),
        pytest.param("verdict", ("factors_at(unit)", "factors_at(0)"), marks=pytest.mark.long),
        pytest.param("values", ("eight % 4 * 8 / GROUP", "0"), marks=pytest.mark.long),
        ("tiles", ("h * 8 + r;", "r;")),
        ("tiles", ("fetch(ahead[a], at + WARPS * AHEAD)", "fetch(ahead[a], at)")),
    ],
)
def test_verdicts_name_wrong_kernels(
    host: Host, monkeypatch: pytest.MonkeyPatch, verdict: str, wrong: tuple[str, str]
) -> None:
    kind, edited = BLOCK_TYPES["Q6_K"], []

    def edit(body: str, text: str) -> str:
        edited.append(wrong[0] in text)
        return text.replace(*wrong)

    host.break_by(edit)
    if verdict == "tiles":
        monkeypatch.setattr(launch, "backend", lambda: "cuda")
        problem = blocks.tiles_verdict(BF16, kind, blocks.TILES[0])
    elif verdict == "values":
        problem = blocks.values_verdict(BF16, kind)
    else:
        problem = blocks.verdict(BF16, kind, 1)
    assert edited.count(True) == 1
    assert "is off by" in str(problem)


def test_many_outputs_have_blocks_of_fewer_warps() -> None:
    found = [blocks.tile_for(*given) for given in ((1, 6143), (8, 6144), (9, 6144), (65, 1))]
    assert found == [blocks.TILES[0], blocks.TILE_OF_MANY, blocks.TILES[1], blocks.TILES[2]]


@pytest.mark.parametrize("biased", [False, True])
def test_many_rows_are_recorded(host: Host, biased: bool) -> None:
    """The weights are computed in full, and only the matmul behind them reads them."""
    del host
    layer = linear("Q6_K", 48, 512)
    bias = mx.arange(48).astype(BF16) if biased else None
    x = mx.random.normal((blocks.MOST_ROWS + 9, 512), key=mx.random.key(3)).astype(BF16)
    expected = blocks.multiply(x, layer.weight, layer.kind, bias)
    with recorded() as recorder:
        found = blocks.multiply(x, layer.weight, layer.kind, bias)
    assert mx.array_equal(found, expected)
    values, product = recorder.notes
    assert (values.body, product.body) == ("block_values", "matmul")
    assert [type(each) for each in values.outputs] == [Transient]
    assert product.inputs[1] is values.outputs[0]


@pytest.mark.parametrize("biased", [False, True])
def test_weights_that_mlx_computes_are_not_recorded(biased: bool) -> None:
    layer, x = linear("Q6_K", 48, 512), mx.ones((100, 512), BF16)
    bias = mx.arange(48).astype(BF16) if biased else None
    with recorded() as recorder, pytest.raises(NotRecordedError, match="MLX computes weights"):
        blocks.multiply(x, layer.weight, layer.kind, bias)
    assert not recorder.notes


@pytest.mark.long
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [BF16, pytest.param(F32, marks=pytest.mark.long)])
def test_experts_on_the_host(host: Host, name: str, dtype: mx.Dtype) -> None:
    for biased in (False, True):
        assert blocks._compare_experts(dtype, BLOCK_TYPES[name], biased) is None
    assert {body for body, _ in host.calls} == {"block_dots"}


@pytest.mark.long
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("biased", [True, False])
def test_spans_of_experts_on_the_host(
    host: Host, monkeypatch: pytest.MonkeyPatch, name: str, biased: bool
) -> None:
    monkeypatch.setattr(launch, "backend", lambda: "cuda")
    assert blocks._compare_spans(BF16, BLOCK_TYPES[name], SMALL, biased) is None
    assert {body for body, _ in host.calls} == {"block_tiles"}
    assert [template["GATHER"] for _, template in host.calls] == [True, False]


@pytest.mark.long
@pytest.mark.parametrize(
    "wrong",
    [("spans[PA_Y * 3] * N", "0"), ("spans[PA_Y * 3 + 1]", "0"), ("source[row]", "row")],
)
def test_the_verdict_of_spans_names_a_wrong_kernel(
    host: Host, monkeypatch: pytest.MonkeyPatch, wrong: tuple[str, str]
) -> None:
    monkeypatch.setattr(launch, "backend", lambda: "cuda")
    host.break_by(lambda _, text: text.replace(*wrong))
    assert blocks.spans_verdict(BF16, BLOCK_TYPES["Q6_K"], SMALL, True) is not None


@pytest.mark.parametrize(
    ("rows", "pairs", "dtype", "tensor_cores", "runs"),
    [(32, 40, BF16, True, True), (64, 192, BF16, True, True), (64, 193, BF16, True, False),
     (128, 40, BF16, True, False), (32, 40, F32, True, False), (32, 40, BF16, False, False)],
)  # fmt: skip
def test_which_spans_have_a_kernel(
    monkeypatch: pytest.MonkeyPatch,
    rows: int,
    pairs: int,
    dtype: mx.Dtype,
    tensor_cores: bool,
    runs: bool,
) -> None:
    monkeypatch.setattr(blocks, "_has_tensor_cores", lambda: tensor_cores)
    monkeypatch.setattr(blocks, "spans_verdict", lambda *_: None)
    monkeypatch.setattr(blocks, "run_tiles", lambda x, *_: x)
    spans = mx.zeros((4, 3), mx.int32)
    found = experts(16, 256, 3).of_spans(mx.ones((pairs, 256), dtype), spans, rows)
    assert (found is not None) == runs


def experts(outputs: int, inputs: int, count: int, *, bias: bool = False) -> BlockSwitchLinear:
    kind = BLOCK_TYPES["Q6_K"]
    layer = BlockSwitchLinear(kind, inputs, outputs, count, F32, bias=bias)
    words = blocks.random_words(kind, count * outputs, inputs)
    layer.weight = mx.array(words).reshape(count, outputs, -1)
    if bias:
        layer.bias = mx.random.normal((count, outputs), key=mx.random.key(1))
    return layer


@pytest.mark.sample(1)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("shape", "chosen"),
    [
        ((2, 3, 1, 1, 256), (2, 3, 2)),  # rows with two experts each, as the gates have them
        ((2, 3, 2, 1, 256), (2, 3, 2)),  # a row for each expert, as the downs have them
        ((6, 1, 256), (6,)),  # sorted by expert
        ((6, 4, 1, 256), (1, 4)),  # the same experts for all rows
        ((2, 3, 256), (2,)),  # three rows for each expert
    ],
)
def test_experts_multiply_as_those_of_mlx_lm(
    host: Host, shape: tuple[int, ...], chosen: tuple[int, ...], bias: bool
) -> None:
    layer = experts(24, 256, 5, bias=bias)
    plain = SwitchLinear(256, 24, 5, bias=bias)
    plain.weight = dense_weight(layer)
    if bias:
        plain.bias = layer.bias
    x = mx.random.normal(shape, key=mx.random.key(2))
    indices = mx.random.randint(0, 5, chosen, key=mx.random.key(3)).astype(mx.uint32)
    is_sorted = shape == (6, 1, 256)
    indices = mx.sort(indices) if is_sorted else indices
    found, expected = (each(x, indices, is_sorted) for each in (layer, plain))
    assert found.shape == expected.shape
    assert mx.allclose(found, expected, 1e-4, 1e-4)
    bodies = {body for body, _ in host.calls}
    in_order = (shape[:-2] in (chosen, (*chosen[:-1], 1))) and shape[-2] == 1
    assert ("block_dots" in bodies) == in_order
    assert dict(host.calls[-1][1]).get("EACH", 0) == (2 if shape == (2, 3, 1, 1, 256) else in_order)


def test_many_pairs_compute_the_values_of_all_experts(bodies: list[str]) -> None:
    """Each pair would read its expert's weights again."""
    layer, most = experts(16, 256, 3), blocks.MOST_PAIRS * 3
    for pairs in (most, most + 1):
        layer(mx.ones((pairs, 1, 256), BF16), mx.zeros((pairs,), mx.uint32))
    assert bodies == ["dots", "values"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocks, "experts_verdict", lambda *_: "it is off")
        layer(mx.ones((1, 1, 256), BF16), mx.zeros((1,), mx.uint32))
    assert bodies == ["dots", "values", "values"]


@pytest.fixture
def bodies(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The kernels that are run, by their names; all are right."""
    found: list[str] = []

    def run(name: str) -> Any:
        def called(x: mx.array, weight: mx.array, kind: Any, *more: Any) -> mx.array:
            found.append(name)
            if weight.ndim == 3:  # of experts
                return mx.zeros((more[-1].size, weight.shape[1]), x.dtype)
            return x @ blocks.computed_values(weight, kind, x.dtype).T

        return called

    def values(weight: mx.array, kind: Any, dtype: mx.Dtype) -> mx.array:
        found.append("values")
        return blocks.computed_values(weight, kind, dtype)

    for name in ("dots", "tiles"):
        monkeypatch.setattr(blocks, f"run_{name}", run(name))
    monkeypatch.setattr(blocks, "run_values", values)
    for name in ("verdict", "values_verdict", "tiles_verdict", "experts_verdict"):
        monkeypatch.setattr(blocks, name, lambda *_: None)
    monkeypatch.setattr(launch, "backend", lambda: "cuda")
    monkeypatch.setattr(blocks, "_has_tensor_cores", lambda: True)
    return found


@pytest.mark.parametrize(
    ("rows", "dtype", "tensor_cores", "kernel"),
    [
        (1, BF16, True, "tiles"),
        (1, F32, True, "dots"),
        (1, BF16, False, "dots"),
        (blocks.MOST_ROWS, F16, True, "tiles"),
        (blocks.MOST_ROWS + 1, BF16, True, "values"),
        (2, F32, True, "dots"),
        (blocks.FEW_ROWS, BF16, False, "dots"),
        (blocks.FEW_ROWS + 1, BF16, False, "values"),
    ],
)
def test_the_kernel_for_the_rows(
    bodies: list[str],
    monkeypatch: pytest.MonkeyPatch,
    rows: int,
    dtype: mx.Dtype,
    tensor_cores: bool,
    kernel: str,
) -> None:
    monkeypatch.setattr(blocks, "_has_tensor_cores", lambda: tensor_cores)
    layer = linear("Q6_K", 16, 256)
    assert layer(mx.ones((1, rows, 256), dtype)).shape == (1, rows, 16)
    assert bodies == [kernel]


def test_kernels_that_are_wrong_are_not_used(
    bodies: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("verdict", "values_verdict", "tiles_verdict"):
        monkeypatch.setattr(blocks, name, lambda *_: "it is off")
    for rows in (1, 5, 300):
        linear("Q6_K", 16, 256)(mx.ones((rows, 256), BF16))
    assert bodies == []


def test_layers_and_weights() -> None:
    layer = linear("Q3_K", 24, 512, bias=True)
    layer.bias = mx.arange(24).astype(BF16)
    full = blocks.computed_values(layer.weight, layer.kind, BF16)
    x = mx.random.normal((2, 3, 512)).astype(BF16)
    expected = x @ full.T + layer.bias
    assert mx.allclose(layer(x), expected, 1e-2, 1e-2)
    weights = weights_of(layer)
    assert weights is not None
    assert (weights.num_outputs, weights.num_inputs) == (24, 512)
    rows, flat = x.reshape(6, 512), expected.reshape(6, 24)
    assert mx.allclose(matmul.multiply(rows, weights), flat, 1e-2, 1e-2)
    parts = matmul.multiply_in_parts(rows[:, None], weights)
    assert parts.count == 1
    assert mx.allclose(parts.array, flat, 1e-2, 1e-2)
    exact = blocks.computed_values(layer.weight, layer.kind, F32)
    assert mx.array_equal(dense_weight(layer), exact)
    embedding = BlockEmbedding(layer.kind, 512, 24, BF16)
    embedding.weight = layer.weight
    assert mx.array_equal(embedding(mx.array([[3, 0], [3, 23]])), full[mx.array([[3, 0], [3, 23]])])
    assert mx.allclose(embedding.as_linear(x) + layer.bias, expected, 1e-2, 1e-2)


def test_layers_are_joined_only_with_their_like() -> None:
    layers: list[nn.Module] = [linear("Q6_K", rows, 256, seed=rows) for rows in (8, 24)]
    x = mx.random.normal((1, 256)).astype(BF16)
    before = mx.concatenate([layer(x) for layer in layers], axis=1)
    assert can_join(layers)
    assert not can_join([layers[0], linear("Q4_K", 8, 256)])
    assert not can_join([layers[0], linear("Q6_K", 8, 512)])
    assert not can_join([layers[0], nn.Linear(256, 8)])
    joint = join(layers)
    assert mx.array_equal(matmul.multiply(x, joint), before)
    assert mx.array_equal(mx.concatenate([layer(x) for layer in layers], axis=1), before)


def test_experts_are_counted_and_unpacked() -> None:
    model = nn.Sequential(experts(24, 256, 5))
    assert step_memory(model, 1000).per_step == 5 * 24 * 256 * 2
    x, chosen = mx.random.normal((3, 1, 256)), mx.array([4, 0, 2], mx.uint32)
    expected = model.layers[0](x, chosen)
    assert unpack(model, F32) == []
    assert isinstance(model.layers[0], SwitchLinear)
    assert mx.allclose(model.layers[0](x, chosen), expected, 1e-5, 1e-5)


def test_layers_are_counted_and_unpacked() -> None:
    model = nn.Sequential(linear("Q6_K", 32, 256), linear("Q4_K", 256, 512))
    assert step_memory(model, 1000).per_step == (32 * 256 + 256 * 512) * 2
    x = mx.random.normal((3, 512)).astype(F32)
    expected = model.layers[1](x)
    assert unpack(model, F32, only=("layers.1",)) == []
    assert [type(layer) for layer in model.layers] == [BlockLinear, nn.Linear]
    assert mx.allclose(model.layers[1](x), expected, 1e-5, 1e-5)


@pytest.mark.parametrize(("rows", "counted"), [(64, 0), (65, 1)])
@pytest.mark.parametrize("tied", [False, True])
def test_a_head_is_counted_if_its_values_are_computed(
    monkeypatch: pytest.MonkeyPatch, rows: int, counted: int, tied: bool
) -> None:
    monkeypatch.setattr(blocks.launch, "backend", lambda: "cuda")
    monkeypatch.setattr(blocks, "_has_tensor_cores", lambda: True)
    model = nn.Module()
    model.embed_tokens = blocks.BlockEmbedding(BLOCK_TYPES["Q6_K"], 256, 1000, F16)
    if not tied:
        model.lm_head = linear("Q6_K", 1000, 256)
    assert step_memory(model, 1000, rows).per_step == counted * 1000 * 256 * 2


@pytest.mark.long
def test_a_model_by_the_kernels(host: Host, tmp_path: Path) -> None:
    """A whole model whose layers run by the emulated kernels."""
    path = tmp_path / "m.gguf"
    tiny = tiny_of(path, "Q3_K")
    dense, kept = load_tiny(path), load_tiny(path, dense=False, blocks=("Q3_K",), dtype=F32)
    logits = np.array(kept.model(mx.array([[72, 300, 17]]))[0].astype(F32))
    expected = np.array(dense.model(mx.array([[72, 300, 17]]))[0].astype(F32))
    assert distance(logits[-1], expected[-1]) < 1e-6
    assert {body for body, _ in host.calls} == {"block_dots", "block_values"}
    assert tiny.arch == "llama"
