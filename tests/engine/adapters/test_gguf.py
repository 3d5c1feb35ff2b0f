"""GGUF adapters change models as the same adapters of PEFT do, with bases of both formats."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.switch_layers import SwitchLinear

from modelpack.formats.adapter import AdapterError, read_adapter
from modelpack_engine.engine import Engine
from modelpack_engine.layers.blocks import BlockLinear
from modelpack_engine.models.adapter import merge, read_layers
from modelpack_engine.patches.lora import EMBEDDINGS, LINEARS, Layers, Matrices
from tests.adapters import write_gguf, write_gguf_pairs, write_mlx
from tests.engine.adapters.test_merged_weights import CONFIG, tokens_of
from tests.engine.loaders.test_architectures import load_tiny
from tests.engine.loaders.test_planes import tiny_of
from tests.engine.loaders.tiny_models import TINY_MODELS, TinyModel

ALWAYS = ("llama", "granite", "mixtral", "phi3", "smollm3")
CASES = [
    pytest.param(name, marks=() if name in ALWAYS else pytest.mark.long)
    for name in TINY_MODELS
    if name != "glm4-moe-lite"  # mlx-lm has two classes for it, with other names
]
RANK, ALPHA = 3, 6.0
Pairs = dict[str, tuple[np.ndarray, np.ndarray]]


def random_adapter(tiny: TinyModel, model: Any) -> tuple[Layers, Pairs]:
    """Return an adapter of all layers with a tensor of their own, by path and as GGUF has it."""
    random = np.random.default_rng(3)
    arch = next(at for at, name in gguf.MODEL_ARCH_NAMES.items() if name == tiny.arch)
    names = gguf.get_tensor_name_map(arch, tiny.config["num_hidden_layers"])
    layers: dict[str, Matrices] = {}
    pairs: Pairs = {}
    for path, module in model.named_modules():
        if not isinstance(module, (*LINEARS, *EMBEDDINGS, SwitchLinear)):
            continue
        if path.endswith(("wpe", "per_layer")):  # llama.cpp has adapters of embed_tokens only
            continue
        *experts, outputs, inputs = module.weight.shape
        if isinstance(module, EMBEDDINGS):
            outputs, inputs = inputs, outputs
        a = random.standard_normal((*experts, RANK, inputs)).astype(np.float32) * 0.1
        b = random.standard_normal((*experts, outputs, RANK)).astype(np.float32) * 0.1
        given = {f"{path}.weight": b}
        try:
            if tiny.arch.startswith("gemma"):  # their converters change no matrices
                converted = {f"{path.replace('language_model.', '')}.weight": b}
            else:
                converted = tiny.converted(tiny.config, given)
        except (KeyError, ValueError, StopIteration):
            continue  # a tensor that is joined of several layers, or whose values change
        (name, rows), *more = converted.items()
        new = names.get_name(name, try_suffixes=(".weight",))
        if more or new is None or rows.shape != b.shape:
            continue
        stem = new.removesuffix(".weight")
        pairs[stem] = (a.T if isinstance(module, EMBEDDINGS) else a, rows)
        scaled = mx.array(b).swapaxes(-1, -2) * (ALPHA / RANK)
        layers[path] = Matrices(mx.array(a).swapaxes(-1, -2), scaled)
    return layers, pairs


@pytest.mark.parametrize("name", CASES)
def test_layers_and_logits(name: str, tmp_path: Path) -> None:
    tiny = TINY_MODELS[name]
    model = tiny.build()
    layers, pairs = random_adapter(tiny, model)
    assert len(layers) >= tiny.config["num_hidden_layers"]
    file = write_gguf_pairs(tmp_path / "lora.gguf", pairs, alpha=ALPHA, arch=tiny.arch)
    adapter = read_adapter(file)

    found = read_layers(adapter, model, tiny.config)
    assert found.keys() == layers.keys()
    for path, one in layers.items():
        assert mx.array_equal(found[path].a, one.a), path
        assert mx.array_equal(found[path].b, one.b), path

    merge(model, layers)
    expected = tiny.logits(model)
    loaded = load_tiny(tiny.write(tmp_path / "m.gguf"))
    before = tiny.logits(loaded.model)
    merge(loaded.model, read_layers(adapter, loaded.model, loaded.config))
    after = tiny.logits(loaded.model)
    assert np.abs(after - expected).max() < 2e-3
    assert np.abs(after - before).max() > 0.1


@pytest.mark.parametrize("name", CASES)
def test_bases_of_adapters_of_other_formats(name: str, tmp_path: Path) -> None:
    """An adapter of mlx-lm's layers, a DoRA where it can, changes a GGUF base as it does them."""
    tiny = TINY_MODELS[name]
    model, shapes, magnitudes = tiny.build(), {}, {}
    for path, module in model.named_modules():
        if isinstance(module, (*LINEARS, *EMBEDDINGS, SwitchLinear)):
            shapes[path] = module.weight.shape
            if isinstance(module, EMBEDDINGS):
                shapes[path] = shapes[path][::-1]
            if not isinstance(module, SwitchLinear):
                norms = np.array(mx.linalg.norm(module.weight.astype(mx.float32), axis=1))
                draw = np.random.default_rng(len(path)).uniform(0.7, 1.4, norms.shape)
                magnitudes[f"{path}.m"] = (norms * draw).astype(np.float32)
    adapter = read_adapter(write_mlx(tmp_path / "a", shapes, rank=RANK, size=0.1, extra=magnitudes))
    before = tiny.logits(model)
    merge(model, read_layers(adapter, model, tiny.config))
    expected = tiny.logits(model)
    loaded = load_tiny(tiny.write(tmp_path / "m.gguf"))
    merge(loaded.model, read_layers(adapter, loaded.model, loaded.config))
    assert np.abs(tiny.logits(loaded.model) - expected).max() < 2e-3
    assert np.abs(before - expected).max() > 0.1


def llama(tmp_path: Path, targets: dict[str, tuple[int, int]], **options: Any) -> Layers:
    """Return the layers of a GGUF adapter in the tiny llama."""
    tiny = TINY_MODELS["llama"]
    path = write_gguf(tmp_path / "lora.gguf", targets, **options)
    return read_layers(read_adapter(path), tiny.build(), tiny.config)


BAD: dict[str, tuple[dict[str, tuple[int, int]], dict[str, Any], str]] = {
    "unknown tensor": ({"blk.0.attn_w": (64, 64)}, {}, "blk.0.attn_w: llama has no such tensor"),
    "unknown layer": ({"blk.9.attn_v": (64, 64)}, {}, "layers.9.*is not in the model"),
    "norm": ({"output_norm": (64, 64)}, {}, "target model.norm is not in the model"),
    "shape": ({"blk.0.attn_output": (64, 32)}, {}, r"a weight of shape \[64, 32\]"),
    "heads": ({"blk.0.attn_q": (63, 64)}, {}, "does not fit the model"),
    "other model": (
        {"blk.0.attn_q": (64, 64)}, {"arch": "qwen2"},
        r"for the architecture qwen2 \(mlx-lm's qwen2\), but the model is llama",
    ),
    "unknown architecture": (
        {"blk.0.attn_q": (64, 64)}, {"arch": "x"}, "the architecture 'x' is not supported in GGUF",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_adapters_that_do_not_fit(case: str, tmp_path: Path) -> None:
    targets, options, message = BAD[case]
    with pytest.raises(AdapterError, match=message) as raised:
        llama(tmp_path, targets, **options)
    assert "lora.gguf" in str(raised.value)


def test_joined_tensors_are_refused(tmp_path: Path) -> None:
    """DeepSeek's up-projections of keys and values are one layer in mlx-lm."""
    tiny = TINY_MODELS["deepseek-v2-lite"]
    path = write_gguf(tmp_path / "lora.gguf", {"blk.1.attn_k_b": (32, 32)}, arch=tiny.arch)
    with pytest.raises(AdapterError, match="no layer of its own"):
        read_layers(read_adapter(path), tiny.build(), tiny.config)


@pytest.mark.parametrize("module", ["attention.wqkv", "feed_forward.w1"])
def test_bases_whose_layers_have_other_names(module: str, tmp_path: Path) -> None:
    """A GGUF file of InternLM2 is a Llama here, whose layers have other names than InternLM2's."""
    tiny = TINY_MODELS["internlm2"]
    adapter = read_adapter(write_mlx(tmp_path, {f"model.layers.0.{module}": (64, 64)}))
    with pytest.raises(AdapterError, match=rf"layers\.0\.{module} is not in the model"):
        read_layers(adapter, tiny.build(), tiny.config)


@pytest.mark.parametrize(
    ("pairs", "fields", "message"),
    [
        ({"blk.0.attn_q": ((2,), (2,))}, {}, r"A has shape \[2\] and B \[2\]"),
        ({"blk.0.attn_q": ((2, 64), (64, 3))}, {}, r"A has shape \[64, 2\] and B \[3, 64\]"),
        ({"token_embd": ((3, 435), (64, 3))}, {}, r"A has shape \[435, 3\] and B \[3, 64\]"),
        ({"blk.0.ffn_up_exps": ((4, 2, 8), (3, 8, 2))}, {}, "A has shape"),
        (
            {"blk.0.attn_q": ((2, 64), (64, 2))},
            {"adapter.alora.invocation_tokens": [1, 2]},
            "an activated LoRA",
        ),
    ],
)
def test_files_that_are_refused(
    pairs: dict[str, Any], fields: dict[str, Any], message: str, tmp_path: Path
) -> None:
    arrays = {
        name: (np.zeros(a, np.float32), np.zeros(b, np.float32)) for name, (a, b) in pairs.items()
    }
    path = write_gguf_pairs(tmp_path / "lora.gguf", arrays, fields=fields)
    with pytest.raises(AdapterError, match=message):
        read_adapter(path)


@pytest.mark.long
def test_a_base_in_blocks(tmp_path: Path) -> None:
    """Layers that keep GGUF's block types have adapters beside them, or become dense by a merge."""
    path = tmp_path / "m.gguf"
    tiny = tiny_of(path, "Q6_K")
    dense = load_tiny(path, dense=True)
    _, pairs = random_adapter(tiny, dense.model)
    # The random blocks are as large as 300.
    adapter = read_adapter(write_gguf_pairs(tmp_path / "lora.gguf", pairs, alpha=30000.0))
    options: dict[str, Any] = {"dense": False, "blocks": ("Q6_K",), "dtype": mx.float32}
    merged = load_tiny(path, adapter=adapter, **options)
    expected = load_tiny(path, dense=True, adapter=adapter)
    assert np.abs(tiny.logits(merged.model) - tiny.logits(expected.model)).max() < 2e-3
    kept = load_tiny(path, **options)
    assert any(isinstance(module, BlockLinear) for _, module in kept.model.named_modules())
    engine = Engine(kept, replace(CONFIG, max_loras=1))
    engine.add_adapter("x", adapter, "x")
    assert tokens_of(engine) == tokens_of(Engine(dense, CONFIG))
    assert tokens_of(engine, "x") == tokens_of(Engine(expected, CONFIG)) != tokens_of(engine)
