"""Load safetensors: plain, sharded, and in every quantisation that mlx-lm writes."""

from __future__ import annotations

import copy
import json
import math
import os
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.utils import quantize_model

import modelpack
from modelpack.errors import WeightFormatError
from modelpack.store.layout import LayoutStore
from modelpack_engine.errors import ModelLoadError
from modelpack_engine.kernels import launch
from modelpack_engine.layers.blocks import BlockEmbedding, BlockLinear, BlockSwitchLinear
from modelpack_engine.models import LoadedModel, ModelFiles, load, planes
from tests.engine.loaders.test_tokenizers import small
from tests.engine.loaders.tiny_models import TINY_MODELS, TinyModel

TINY = TINY_MODELS["llama"]
MODES = [
    *(
        ("affine", bits, size)
        for bits, size in ((2, 32), (3, 32), (4, 64), (5, 32), (6, 64), (8, 32))
    ),
    ("mxfp4", 4, 32),
    ("nvfp4", 4, 16),
    ("mxfp8", 8, 32),
]


def save(
    directory: Path, model: Any, config: dict[str, Any], *, shards: int = 1, tokenizer: bool = True
) -> Path:
    """Write a model as mlx-lm does."""
    weights = dict(tree_flatten(model.parameters()))
    names = sorted(weights)
    index = {}
    for number in range(shards):
        name = (
            "model.safetensors"
            if shards == 1
            else f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        )
        part = {key: weights[key] for key in names[number::shards]}
        mx.save_safetensors(str(directory / name), part, metadata={"format": "mlx"})
        index |= dict.fromkeys(part, name)
    if shards > 1:
        path = directory / "model.safetensors.index.json"
        path.write_text(json.dumps({"metadata": {}, "weight_map": index}))
    (directory / "config.json").write_text(json.dumps(config))
    if tokenizer:
        backend = small("qwen2", directory)._backend
        (directory / "v.gguf").unlink()
        (directory / "tokenizer.json").write_text(backend.to_str())
        settings = {"eos_token": "<|im_end|>", "chat_template": "{{ messages[0].content }}"}
        (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    return directory


def load_cpu(directory: Path, **options: Any) -> LoadedModel:
    return load(ModelFiles.from_directory(directory), device="cpu", **options)


def dtypes(model: Any) -> set[mx.Dtype]:
    return {array.dtype for _, array in tree_flatten(model.parameters())}


@pytest.mark.parametrize("name", ["llama", "gemma3", "qwen3moe", "gpt-oss"])
@pytest.mark.parametrize("shards", [1, 3])
def test_plain(name: str, shards: int, tmp_path: Path) -> None:
    tiny = TINY_MODELS[name]
    model = tiny.build()
    loaded = load_cpu(save(tmp_path, model, tiny.config, shards=shards))
    assert np.array_equal(tiny.logits(loaded.model), tiny.logits(model))
    assert loaded.architecture == tiny.config["model_type"]
    assert loaded.context_length == 512
    assert loaded.notes == ()
    assert not loaded.model.training
    assert loaded.tokenizer.apply_chat_template([{"content": "x"}]) == loaded.tokenizer.encode("x")


def test_loaded_straight_from_the_store(tmp_path: Path) -> None:
    model = TINY.build()
    (tmp_path / "source").mkdir()
    source = save(tmp_path / "source", model, TINY.config, shards=2)
    store = LayoutStore(tmp_path / "store")
    modelpack.package("m", modelpack.PackageRequest(safetensors_dir=source), store=store)
    for path in source.iterdir():
        path.unlink()
    before = sorted(path for path in store.root.rglob("*"))
    found = modelpack.resolve("m", store=store).model
    loaded = load(ModelFiles.from_model(found, store.blob_path), device="cpu")
    assert np.array_equal(TINY.logits(loaded.model), TINY.logits(model))
    assert sorted(path for path in store.root.rglob("*")) == before


@pytest.mark.parametrize("name", ["llama", "gpt-oss"])
@pytest.mark.parametrize(("mode", "group_size"), [("mxfp4", 32), ("nvfp4", 16)])
def test_floats_of_4_bits_are_blocks_on_cuda(
    monkeypatch: pytest.MonkeyPatch, mode: str, group_size: int, name: str, tmp_path: Path
) -> None:
    tiny = TINY_MODELS[name]
    model, config = quantize_model(
        tiny.build(), copy.deepcopy(tiny.config), group_size, 4, mode=mode
    )
    save(tmp_path, model, config)
    dense = load_cpu(tmp_path, dense=True)
    with monkeypatch.context() as on_cuda:
        on_cuda.setattr(launch, "backend", lambda: "cuda")
        held = load_cpu(tmp_path, dense=False)
    modules = [module for _, module in held.model.named_modules()]
    kinds = {type(module) for module in modules}
    assert {BlockLinear, BlockEmbedding} <= kinds
    assert (BlockSwitchLinear in kinds) is (name == "gpt-oss")
    assert mode not in {getattr(module, "mode", "") for module in modules}
    np.testing.assert_allclose(tiny.logits(held.model), tiny.logits(dense.model), atol=1e-5)


def test_a_damaged_file_of_floats_is_said_to_be(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """On CUDA its arrays are read before others."""
    model, config = quantize_model(TINY.build(), copy.deepcopy(TINY.config), 32, 4, mode="mxfp4")
    path = save(tmp_path, model, config) / "model.safetensors"
    monkeypatch.setattr(launch, "backend", lambda: "cuda")
    files = ModelFiles.from_directory(tmp_path)
    held = planes._held

    def shorter(*given: Any) -> Any:
        os.truncate(path, path.stat().st_size // 2)
        return held(*given)

    monkeypatch.setattr(planes, "_held", shorter)
    with pytest.raises(ModelLoadError, match="the weights cannot be read"):
        load(files, device="cpu", dense=False)


@pytest.mark.parametrize(("mode", "bits", "group_size"), MODES)
def test_quantised(mode: str, bits: int, group_size: int, tmp_path: Path) -> None:
    model, config = quantize_model(
        TINY.build(), copy.deepcopy(TINY.config), group_size, bits, mode=mode
    )
    save(tmp_path, model, config)
    expected = TINY.logits(model)
    packed = load_cpu(tmp_path, dense=False)
    assert np.array_equal(TINY.logits(packed.model), expected)
    dense = load_cpu(tmp_path)
    assert dtypes(dense.model) == {mx.float32}
    assert np.abs(TINY.logits(dense.model) - expected).max() < 1e-4
    assert packed.weight_bytes < dense.weight_bytes / 2
    assert dense.weight_bytes == load_bytes(TINY)


def load_bytes(tiny: TinyModel) -> int:
    return sum(array.nbytes for _, array in tree_flatten(tiny.build().parameters()))


@pytest.mark.parametrize("name", ["qwen3moe", "gpt-oss"])
def test_quantised_experts(name: str, tmp_path: Path) -> None:
    tiny = TINY_MODELS[name]
    model, config = quantize_model(tiny.build(), copy.deepcopy(tiny.config), 32, 4)
    save(tmp_path, model, config)
    dense = load_cpu(tmp_path)
    assert not any("scales" in name for name, _ in tree_flatten(dense.model.parameters()))
    assert np.abs(tiny.logits(dense.model) - tiny.logits(model)).max() < 1e-3


def test_half_precision_becomes_float32_on_a_cpu(tmp_path: Path) -> None:
    model, config = quantize_model(TINY.build(), copy.deepcopy(TINY.config), 32, 4)
    model.set_dtype(mx.float16)
    save(tmp_path, model, config)
    assert dtypes(load_cpu(tmp_path, dense=False).model) == {mx.uint32, mx.float32}
    assert dtypes(load_cpu(tmp_path).model) == {mx.float32}
    assert dtypes(load_cpu(tmp_path, dtype=mx.float16).model) == {mx.float16}


def test_short_memory_keeps_weights_packed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, config = quantize_model(TINY.build(), copy.deepcopy(TINY.config), 32, 4)
    save(tmp_path, model, config)
    monkeypatch.setattr("modelpack_engine.models.precision.available_memory", lambda: 1000)
    loaded = load_cpu(tmp_path)
    assert dtypes(loaded.model) == {mx.uint32, mx.float32}
    assert "memory is short" in loaded.notes[0]


def test_context_length_that_nobody_knows(tmp_path: Path) -> None:
    config = {k: v for k, v in TINY.config.items() if k != "max_position_embeddings"}
    loaded = load_cpu(save(tmp_path, TINY.build(), config))
    assert loaded.context_length == 2048
    assert "2048 tokens are assumed" in loaded.notes[0]


# Bad input


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "nothing_like_it"}, "architecture 'nothing_like_it' is not supported"),
        ({"model_type": "../evil"}, r"model_type '\.\./evil' is not valid"),
        ({"model_type": None}, "model_type 'None' is not valid"),
        ({"model_type": "cache"}, "cannot build mlx-lm's cache from these files"),
        ({"model_file": "model.py"}, "the code of models is never run"),
        ({"hidden_size": 32}, "shape"),
        ({"num_hidden_layers": 3}, r"model\.layers\.2\."),
        ({"num_hidden_layers": 1}, r"model\.layers\.1\."),
        ({"hidden_size": None}, "cannot build mlx-lm's llama from these files"),
        ({"num_attention_heads": 0}, "cannot build mlx-lm's llama from these files"),
        ({"quantization": {"bits": 4}}, "cannot build mlx-lm's llama from these files"),
        (
            {"quantization_config": {"quant_method": "awq"}},
            "cannot build mlx-lm's llama from these files",
        ),
    ],
)
def test_bad_configs(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    save(tmp_path, TINY.build(), {**TINY.config, **changes})
    with pytest.raises(ModelLoadError, match=message):
        load_cpu(tmp_path)


def test_missing_config(tmp_path: Path) -> None:
    save(tmp_path, TINY.build(), TINY.config)
    (tmp_path / "config.json").unlink()
    with pytest.raises(ModelLoadError, match=r"no config\.json"):
        load_cpu(tmp_path)


def test_truncated_weights(tmp_path: Path) -> None:
    save(tmp_path, TINY.build(), TINY.config)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(WeightFormatError):
        load_cpu(tmp_path)


def test_a_tensor_in_two_shards(tmp_path: Path) -> None:
    save(tmp_path, TINY.build(), TINY.config, shards=2)
    (tmp_path / "model.safetensors.index.json").unlink()
    one = tmp_path / "model-00001-of-00002.safetensors"
    (tmp_path / "model-00002-of-00002.safetensors").write_bytes(one.read_bytes())
    with pytest.raises(ModelLoadError, match=r"is in model-00001-of-00002\.safetensors too"):
        load_cpu(tmp_path)


@pytest.mark.parametrize("name", ["model.layers.0.mlp.up_proj.weight", "model.norm.weight"])
def test_fp8_without_scales_is_an_error(name: str, tmp_path: Path) -> None:
    save(tmp_path, TINY.build(), TINY.config)
    path = tmp_path / "model.safetensors"
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header, data = json.loads(content[8 : 8 + size]), content[8 + size :]
    start, end = header[name]["data_offsets"]
    count = math.prod(header[name]["shape"])
    added = bytes(56 for _ in range(count))  # 1.0 in fp8
    header[name] |= {"dtype": "F8_E4M3", "data_offsets": [len(data), len(data) + count]}
    dropped = "model.layers.0.self_attn.rotary_emb.inv_freq"
    header[dropped] = {"dtype": "U8", "shape": [end - start], "data_offsets": [start, end]}
    raw = json.dumps(header).encode()
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + data + added)
    with pytest.raises(ModelLoadError, match=name) as caught:
        load(ModelFiles.from_directory(tmp_path), device="cpu")
    assert "has no scales" in str(caught.value)
