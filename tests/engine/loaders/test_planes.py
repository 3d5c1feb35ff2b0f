"""Block types, and MLX's floats of 4 bits, as rows of words: values, sizes, models with them."""

from __future__ import annotations

import gc
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mlx.utils import tree_flatten
from mlx_lm.models.switch_layers import QuantizedSwitchLinear

from modelpack_engine.layers import blocks
from modelpack_engine.layers.blocks import (
    BLOCK_TYPES,
    BlockEmbedding,
    BlockLinear,
    BlockSwitchLinear,
)
from modelpack_engine.models import planes
from modelpack_engine.models.gguf_file import GGUFTensor
from tests.engine.loaders.blocks import random_blocks
from tests.engine.loaders.test_architectures import distance, load_tiny
from tests.engine.loaders.tiny_models import TINY_MODELS, TinyModel


def tensor(name: str, rows: int, columns: int, seed: int = 0) -> tuple[GGUFTensor, np.ndarray]:
    """Return a random tensor, and its values by the gguf package."""
    raw = random_blocks(name, rows, columns, seed)
    expected = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[name])
    return GGUFTensor("w", name, (rows, columns), raw.reshape(-1)), expected


@given(
    name=st.sampled_from(sorted(BLOCK_TYPES)),
    rows=st.integers(1, 9),
    count=st.integers(1, 40),
    seed=st.integers(0, 99),
)
def test_values_equal_those_of_the_gguf_package(
    name: str, rows: int, count: int, seed: int
) -> None:
    """Rows of `count` blocks, of 32, 64 or 256 weights."""
    inputs = count * max(BLOCK_TYPES[name].least, 64 if name == "NVFP4" else 0)
    stored, expected = tensor(name, rows, inputs, seed)
    kind = planes.block_type(name, stored.shape, inputs)
    assert kind is not None
    words = planes.of_blocks(stored, kind)
    assert words.shape == (rows, kind.words(inputs))
    assert kind.inputs(words.shape[1]) == inputs
    found = blocks.computed_values(words, kind, mx.float32)
    assert np.array_equal(np.array(found), expected)


def test_rows_are_moved_a_few_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside the words there are the arrays of a few rows; the last ones are fewer."""
    stored, expected = tensor("Q6_K", 1023, 2048)
    kind = BLOCK_TYPES["Q6_K"]
    monkeypatch.setattr(planes, "_CODES_AT_ONCE", 1 << 16)
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    words = planes.of_blocks(stored, kind)
    mx.eval(words)
    assert mx.get_peak_memory() - before < words.nbytes + 15 * (1 << 16) + 1e5
    found = blocks.computed_values(words, kind, mx.float32)
    assert np.array_equal(np.array(found), expected)


@pytest.mark.parametrize("part", [32, 128, 256])
@pytest.mark.parametrize("name", sorted(BLOCK_TYPES))
def test_reordered_columns_keep_their_values(name: str, part: int) -> None:
    stored, expected = tensor(name, 3, 768)
    columns = tuple(np.roll(np.arange(768 // part), 1).tolist())
    kind = planes.block_type(name, stored.shape, part)
    if BLOCK_TYPES[name].block > 128 and part < 128:
        assert kind is None
        return
    assert kind is not None
    assert kind.block == min(BLOCK_TYPES[name].block, part)
    words = planes.of_blocks(replace(stored, columns=columns), kind)
    found = np.array(blocks.computed_values(words, kind, mx.float32))
    moved = expected.reshape(3, -1, part)[:, columns].reshape(3, 768)
    assert np.array_equal(found, moved)
    assert not np.array_equal(found, expected)


def test_all_exponents_of_mxfp4() -> None:
    raw = random_blocks("MXFP4", 1, 256 * 32).reshape(256, 17)
    raw[:, 0] = np.minimum(np.arange(256), 251)  # the package warns of larger values
    stored = GGUFTensor("w", "MXFP4", (1, 256 * 32), raw.reshape(-1))
    words = planes.of_blocks(stored, BLOCK_TYPES["MXFP4"])
    found = blocks.computed_values(words, BLOCK_TYPES["MXFP4"], mx.float32)
    expected = gguf.quants.dequantize(raw.reshape(1, -1), gguf.GGMLQuantizationType.MXFP4)
    assert np.array_equal(np.array(found), expected)


@given(
    name=st.sampled_from(["mxfp4", "nvfp4"]), count=st.integers(1, 40), seed=st.integers(0, 99)
)  # fmt: skip
def test_floats_of_mlx_keep_their_values(name: str, count: int, seed: int) -> None:
    """All codes and scales, of layers, embeddings and experts; their biases, too."""
    random = np.random.default_rng(seed)
    kind, inputs = BLOCK_TYPES[name.upper()], count * 32
    of_mlx: Any = {
        "linear": nn.QuantizedLinear(inputs, 6, mode=name),
        "plain": nn.QuantizedLinear(inputs, 5, bias=False, mode=name),
        "embedding": nn.QuantizedEmbedding(7, inputs, mode=name),
        "experts": QuantizedSwitchLinear(inputs, 4, 3, group_size=kind.group, mode=name),
    }
    expected = {}
    for path, layer in of_mlx.items():
        layer.weight = mx.array(random.integers(0, 1 << 32, layer.weight.shape, np.uint32))
        # E4M3 has no number for 127 and 255; MLX's scales of E8M0 are not infinite
        codes = random.integers(0, 127, layer.scales.shape, np.uint8)
        signs = random.integers(0, 2, layer.scales.shape, np.uint8) * 128
        layer.scales = mx.array(codes + signs)
        expected[path] = mx.dequantize(
            layer.weight, layer.scales, group_size=kind.group, bits=4, mode=name, dtype=mx.float32
        )
    of_mlx["linear"].bias = mx.arange(6)
    model = nn.Module()
    for path, layer in of_mlx.items():
        setattr(model, path, layer)
    planes.hold_floats(model, mx.float16)
    held: Any = model
    kinds = {path: type(held[path]) for path in expected}
    assert kinds == {
        "linear": BlockLinear, "plain": BlockLinear, "embedding": BlockEmbedding,
        "experts": BlockSwitchLinear,
    }  # fmt: skip
    for path, values in expected.items():
        found = blocks.layer_values(held[path], mx.float32)
        assert found.shape == values.shape
        assert np.array_equal(np.array(found), np.array(values)), path
    assert mx.array_equal(held.linear.bias, mx.arange(6))
    assert "bias" not in held.plain
    assert held.embedding(mx.array([1])).dtype == mx.float16


def test_a_layer_at_two_paths_is_held_once() -> None:
    model: Any = nn.Module()
    model.one = model.other = nn.QuantizedLinear(64, 8, mode="mxfp4")
    model.plain = nn.QuantizedLinear(64, 8)
    planes.hold_floats(model, mx.bfloat16)
    assert type(model.one) is BlockLinear
    assert model.other is model.one
    assert type(model.plain) is nn.QuantizedLinear


@pytest.mark.parametrize("name", sorted(BLOCK_TYPES))
def test_rows_of_models_take_at_most_four_percent_more(name: str) -> None:
    elements, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]]
    kind = BLOCK_TYPES[name]
    for inputs in (2048, 4096, 11008, 14336, *((1152, 1408, 2688) if kind.least == 32 else ())):
        assert kind.words(inputs) * 4 <= inputs // elements * size * 1.04
        assert kind.halved.words(inputs) * 4 <= inputs // elements * size * 1.06


@pytest.mark.parametrize(
    ("name", "shape"),
    [("Q6_K", (4, 128)), ("Q6_K", (2, 4, 32)), ("Q6_K", (256,)), ("Q4_0", (4, 16)),
     ("Q8_0", (4, 256)), ("IQ3_S", (4, 256)), ("F16", (4, 256)), ("MXFP4", (4, 80))],
)  # fmt: skip
def test_other_types_and_shapes_stay_in_layouts_of_mlx(name: str, shape: tuple[int, ...]) -> None:
    assert planes.block_type(name, shape, shape[-1]) is None


def tiny_of(path: Path, name: str, *, embedding: str = "", **changes: int) -> TinyModel:
    """Write a tiny Llama whose matrices are random blocks of a type, or of that of `embedding`."""
    sizes = {"hidden_size": 1024, "intermediate_size": 512}
    config = {**TINY_MODELS["llama"].config, **sizes, **changes}
    tiny = TinyModel("llama", config, TINY_MODELS["llama"].keys, TINY_MODELS["llama"].converted)

    def quantize(tensor: str, values: np.ndarray) -> Any:
        own = embedding if embedding and tensor.startswith("token_embd") else name
        if own == "F16":
            return values.astype(np.float16), gguf.GGMLQuantizationType.F16
        return random_blocks(own, *values.shape), gguf.GGMLQuantizationType[own]

    tiny.write(path, quantize)
    return tiny


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name in ("Q6_K", "IQ4_NL") else pytest.mark.long)
        for name in sorted(BLOCK_TYPES)
    ],
)
def test_models_keep_their_blocks(name: str, tmp_path: Path) -> None:
    """All matrices stay as they are stored: the values of a dense model, in the file's memory."""
    path = tmp_path / "m.gguf"
    changes = {"intermediate_size": 576} if BLOCK_TYPES[name].least == 32 else {}
    tiny = tiny_of(path, name, **changes)
    dense, kept = load_tiny(path), load_tiny(path, dense=False, blocks=(name,), dtype=mx.float32)
    kinds = {type(module) for _, module in kept.model.named_modules() if "weight" in module}
    assert {BlockLinear, BlockEmbedding} <= kinds
    assert {a.dtype for _, a in tree_flatten(kept.model.parameters())} == {mx.float32, mx.uint32}
    assert kept.weight_bytes < 1.1 * path.stat().st_size
    difference = tiny.logits(kept.model)[-1], tiny.logits(dense.model)[-1]
    assert distance(*difference) < 1e-9
    without = load_tiny(path, dense=False, blocks=(), dtype=mx.float32)
    assert BlockLinear not in {type(module) for _, module in without.model.named_modules()}


def test_experts_keep_their_blocks(tmp_path: Path) -> None:
    """Experts of random blocks: the values of a dense model, in the file's memory."""
    name, tiny = "Q3_K", TINY_MODELS["qwen3moe"]
    config = {**tiny.config, "hidden_size": 256, "moe_intermediate_size": 256}
    tiny = TinyModel(tiny.arch, config, tiny.keys, tiny.converted)
    kind = gguf.GGMLQuantizationType[name]

    def quantize(tensor: str, values: np.ndarray) -> Any:
        if not tensor.endswith("_exps.weight"):
            return None
        *outer, columns = values.shape
        raw = random_blocks(name, int(np.prod(outer)), columns)
        return raw.reshape(*outer, -1), kind

    path = tmp_path / "m.gguf"
    tiny.write(path, quantize)
    dense, kept = load_tiny(path), load_tiny(path, dense=False, blocks=(name,), dtype=mx.float32)
    found = [type(m) for n, m in kept.model.named_modules() if n.endswith("switch_mlp.up_proj")]
    assert found == [BlockSwitchLinear] * tiny.config["num_hidden_layers"]
    assert kept.weight_bytes < 1.1 * path.stat().st_size
    assert distance(tiny.logits(kept.model)[-1], tiny.logits(dense.model)[-1]) < 1e-9


def kinds_of(model: Any) -> dict[str, set[str]]:
    """Return the classes of the layers with each name."""
    found: dict[str, set[str]] = {}
    for path, module in model.named_modules():
        if "weight" in module:
            found.setdefault(path.rpartition(".")[2], set()).add(type(module).__name__)
    return found


@pytest.mark.parametrize("name", ["Q4_K", pytest.param("Q4_0", marks=pytest.mark.long)])
def test_four_bits_take_at_most_a_tenth_more_than_the_file(name: str, tmp_path: Path) -> None:
    """In MLX's layout they would take a ninth more. Layers that are fused stay in it."""
    tiny_of(tmp_path / "m.gguf", name)
    small = load_tiny(tmp_path / "m.gguf", dense=False, blocks=planes.KEPT, dtype=mx.bfloat16)
    stored = sum(tensor.n_bytes for tensor in gguf.GGUFReader(tmp_path / "m.gguf").tensors)
    kinds = kinds_of(small.model)
    assert small.weight_bytes <= 1.1 * stored
    assert kinds["embed_tokens"] == {"BlockEmbedding"}
    assert kinds["q_proj"] == kinds["gate_proj"] == {"QuantizedLinear"}
    large = load_tiny(tmp_path / "m.gguf", dense=False, blocks=(), dtype=mx.bfloat16)
    assert large.weight_bytes > 1.105 * stored
    assert kinds_of(large.model)["embed_tokens"] == {"QuantizedEmbedding"}


def test_four_bits_stay_in_the_layout_of_mlx_if_others_take_too_much(tmp_path: Path) -> None:
    """Types that are held in 8 bits take more than twice as much: nothing would be gained."""
    tiny_of(tmp_path / "m.gguf", "IQ3_S", embedding="Q4_K")
    found = load_tiny(tmp_path / "m.gguf", dense=False, blocks=planes.KEPT, dtype=mx.bfloat16)
    assert kinds_of(found.model)["embed_tokens"] == {"QuantizedEmbedding"}


@pytest.mark.long
@pytest.mark.parametrize(
    ("name", "megabytes"),
    [
        ("Q4_K", 1),
        pytest.param("IQ3_S", 9, marks=pytest.mark.long),  # two matrices in float32
        pytest.param("F16", 3, marks=pytest.mark.long),
    ],
)
def test_loading_holds_little_more_than_the_weights(
    name: str, megabytes: int, tmp_path: Path
) -> None:
    """Values and scales of float32 are freed tensor by tensor."""
    path = tmp_path / "m.gguf"
    tiny_of(path, name, num_hidden_layers=6)
    gc.collect()
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    found = load_tiny(path, dense=False, blocks=(), dtype=mx.bfloat16)
    assert mx.get_peak_memory() - before < found.weight_bytes * 1.01 + megabytes * 1e6


def test_a_row_of_another_type_would_be_noticed(tmp_path: Path) -> None:
    """Negative control: the comparison above fails if one scale is wrong."""
    stored, expected = tensor("Q6_K", 3, 512)
    words = np.array(planes.of_blocks(stored, BLOCK_TYPES["Q6_K"]))
    words.view(np.uint8)[1, -30] ^= 1  # a scale
    found = blocks.computed_values(mx.array(words), BLOCK_TYPES["Q6_K"], mx.float32)
    wrong = np.array(found) != expected
    assert wrong[1].any()
    assert not wrong[[0, 2]].any()
