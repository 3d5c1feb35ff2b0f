"""Tiny models of every architecture: the file's logits are mlx-lm's, and llama.cpp's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from modelpack_engine.models import LoadedModel, ModelFiles, load
from modelpack_engine.models.gguf_architectures import ARCHITECTURES
from tests.engine.loaders.test_safetensors import save
from tests.engine.loaders.tiny_models import TINY_MODELS, TinyModel
from tests.engine.loaders.vocabularies import golden

Q = gguf.GGMLQuantizationType


def load_tiny(path: Path, **options: Any) -> LoadedModel:
    return load(ModelFiles.from_directory(path), device="cpu", **options)


def distance(a: np.ndarray, b: np.ndarray) -> float:
    """Return 1 - cosine of the deviations from the mean."""
    a, b = (np.asarray(values, np.float64) - np.mean(values) for values in (a, b))
    return float(1 - a @ b / np.linalg.norm(a) / np.linalg.norm(b))


def test_every_architecture_has_a_tiny_model() -> None:
    assert {tiny.arch for tiny in TINY_MODELS.values()} == set(ARCHITECTURES)


@pytest.mark.sample(2)
@pytest.mark.parametrize("name", TINY_MODELS)
def test_logits(name: str, tmp_path: Path) -> None:
    tiny = TINY_MODELS[name]
    expected = tiny.logits(tiny.build())
    loaded = load_tiny(tiny.write(tmp_path / "m.gguf"))
    got = tiny.logits(loaded.model)
    assert np.abs(got - expected).max() < 1e-4
    assert distance(got[-1], golden("logits")[name]) < tiny.tolerance
    assert loaded.architecture == tiny.arch
    assert loaded.context_length == 512
    sizes = [array.nbytes for _, array in tree_flatten(loaded.model.parameters())]
    assert loaded.weight_bytes == sum(sizes)


@pytest.mark.parametrize(
    "name", ["gemma3", "gemma3n", "gpt-oss", "llama-3", "mistral3", "phi3-long", "smollm3"]
)
def test_logits_tell_a_wrong_detail(name: str, tmp_path: Path) -> None:
    """Each special feature of a model changes its logits by more than the tolerance."""
    tiny, unscaled = TINY_MODELS[name], {"llama_4_scaling_beta": 0.0}
    gemma3n = TINY_MODELS["gemma3n"].config["text_config"]
    changes: dict[str, dict[str, Any]] = {
        "gemma3": {"sliding_window": 512},
        "gemma3n": {"text_config": {**gemma3n, "activation_sparsity_pattern": [0.0] * 25}},
        "gpt-oss": {"sliding_window": 512},
        "llama-3": {"rope_scaling": None},
        "mistral3": {"rope_parameters": {**tiny.config.get("rope_parameters", {}), **unscaled}},
        "phi3-long": {"rope_scaling": None},
        "smollm3": {"no_rope_layer_interval": 8},
    }
    other = TinyModel(tiny.arch, {**tiny.config, **changes[name]}, seed=tiny.seed)
    assert distance(tiny.logits(other.build())[-1], golden("logits")[name]) > 10 * tiny.tolerance


def test_yarn_of_an_architecture_whose_class_ignores_it(tmp_path: Path) -> None:
    """`tests/engine/oracle` compares the safetensors model with transformers."""
    yarn, tiny = TINY_MODELS["qwen2-yarn"], TINY_MODELS["qwen3moe"]
    config = {**tiny.config, "rope_scaling": yarn.config["rope_scaling"]}

    def keys(writer: gguf.GGUFWriter, config: Any) -> None:
        tiny.keys(writer, config)
        yarn.keys(writer, config)

    scaled = replace(tiny, config=config, keys=keys)
    loaded = load_tiny(scaled.write(tmp_path / "m.gguf"))
    save(tmp_path, tiny.build(), config)
    expected = tiny.logits(load_tiny(tmp_path).model)
    assert np.abs(tiny.logits(loaded.model) - expected).max() < 1e-4
    assert np.abs(tiny.logits(tiny.build()) - expected).max() > 0.1


def test_the_bias_of_ernies_router(tmp_path: Path) -> None:
    """`tests/engine/oracle` compares the safetensors model with transformers."""
    tiny, random = TINY_MODELS["ernie4_5-moe"], np.random.default_rng(1)
    name = "model.layers.{}.mlp.moe_statics.e_score_correction"
    biases = {at: random.standard_normal(8).astype(np.float32) for at in (1, 2, 3)}

    def converted(config: Any, weights: Any) -> Any:
        made = tiny.converted(config, weights)
        return {**made, **{f"{name.format(at)}.bias": value for at, value in biases.items()}}

    loaded = load_tiny(replace(tiny, converted=converted).write(tmp_path / "m.gguf"))
    directory, model = tmp_path / "safetensors", tiny.build()
    directory.mkdir()
    save(directory, model, tiny.config)
    path = str(directory / "model.safetensors")
    given = {f"{name.format(at)}_bias": mx.array(value) for at, value in biases.items()}
    mx.save_safetensors(path, {**dict(mx.load(path)), **given}, metadata={"format": "mlx"})
    expected = tiny.logits(load_tiny(directory).model)
    assert np.abs(tiny.logits(loaded.model) - expected).max() < 1e-4
    assert np.abs(tiny.logits(model) - expected).max() > 0.1


def test_the_copied_head_of_gpt2(tmp_path: Path) -> None:
    tiny = TINY_MODELS["gpt2"]

    def converted(config: Any, weights: Any) -> Any:
        made = tiny.converted(config, weights)
        return {**made, "lm_head.weight": made["transformer.wte.weight"]}

    loaded = load_tiny(replace(tiny, converted=converted).write(tmp_path / "m.gguf"))
    assert np.abs(tiny.logits(loaded.model) - tiny.logits(tiny.build())).max() < 1e-4


def quantizer(type: Q) -> Callable[[str, np.ndarray], Any]:
    def quantize(name: str, values: np.ndarray) -> Any:
        if name.endswith("bias") or "ffn_gate_inp" in name:
            return None
        return gguf.quants.quantize(values, type), type

    return quantize


@pytest.mark.sample(4)
@pytest.mark.parametrize("type", [Q.Q4_0, Q.Q5_1, Q.Q8_0, Q.MXFP4, Q.F16, Q.BF16])
@pytest.mark.parametrize(
    "name", ["llama-tied", "qwen3moe", "gpt-oss", "phi3", "gptneox", "llama4", "ernie4_5-moe"]
)
def test_packed_is_dense(name: str, type: Q, tmp_path: Path) -> None:
    """Quantised weights give the same logits packed (as on a GPU) and dense (as on a CPU)."""
    tiny = TINY_MODELS[name]
    path = tiny.write(tmp_path / "m.gguf", quantizer(type))
    dense = load_tiny(path, dense=True)
    packed = load_tiny(path, dense=False, dtype=mx.float32)
    difference = tiny.logits(packed.model) - tiny.logits(dense.model)
    assert np.abs(difference).max() < 1e-3
    if type not in (Q.F16, Q.BF16):
        assert packed.weight_bytes < dense.weight_bytes / 2


@pytest.mark.parametrize("requantize", [True, False])
def test_what_cannot_be_packed_is_held_in_8_bits_or_dense(requantize: bool, tmp_path: Path) -> None:
    config = {**TINY_MODELS["llama"].config, "hidden_size": 256, "intermediate_size": 256}
    tiny = TinyModel("llama", config, TINY_MODELS["llama"].keys, TINY_MODELS["llama"].converted)

    def quantize(name: str, values: np.ndarray) -> Any:
        from tests.engine.loaders.blocks import random_blocks

        return random_blocks("Q6_K", *values.shape), Q.Q6_K

    path = tiny.write(tmp_path / "m.gguf", quantize)
    dense = load_tiny(path)
    held = load_tiny(path, dense=False, requantize=requantize, dtype=mx.float32)
    assert (held.weight_bytes < dense.weight_bytes / 2) is requantize
    assert distance(tiny.logits(held.model)[-1], tiny.logits(dense.model)[-1]) < 1e-3


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt-oss", "qwen3moe"])
def test_as_on_a_gpu(name: str, tmp_path: Path) -> None:
    """Weights are packed; scales and all other parameters are bfloat16."""
    tiny = TINY_MODELS[name]
    path = tiny.write(tmp_path / "m.gguf", quantizer(Q.Q8_0))
    loaded = load_tiny(path, dense=False, dtype=mx.bfloat16)
    held = {array.dtype for _, array in tree_flatten(loaded.model.parameters())}
    assert held == {mx.uint32, mx.bfloat16}
    assert distance(tiny.logits(loaded.model)[-1], tiny.logits(load_tiny(path).model)[-1]) < 0.03


@pytest.mark.parametrize("type", [Q.F32, Q.F16, Q.BF16])
def test_floats_of_all_kinds_become_the_dtype(type: Q, tmp_path: Path) -> None:
    tiny = TINY_MODELS["llama"]
    loaded = load_tiny(tiny.write(tmp_path / "m.gguf", quantizer(type)), dtype=mx.bfloat16)
    assert {a.dtype for _, a in tree_flatten(loaded.model.parameters())} == {mx.bfloat16}
    exact = load_tiny(tmp_path / "m.gguf")
    assert distance(tiny.logits(loaded.model)[-1], tiny.logits(exact.model)[-1]) < 1e-2


def test_shards_are_one_model(tmp_path: Path) -> None:
    tiny = TINY_MODELS["qwen2"]
    whole = load_tiny(tiny.write(tmp_path / "m.gguf"))
    paths = shards(tmp_path / "m.gguf", tmp_path, 3)
    files = ModelFiles(weights=(paths[2], paths[0], paths[1]), format="gguf")
    loaded = load(files, device="cpu")
    assert np.array_equal(tiny.logits(loaded.model), tiny.logits(whole.model))
    named = load_tiny(paths[1])  # one shard stands for its set
    assert np.array_equal(tiny.logits(named.model), tiny.logits(whole.model))


def shards(path: Path, directory: Path, count: int) -> list[Path]:
    """Cut a file into `count` shards, as llama-gguf-split does."""
    reader = gguf.GGUFReader(path)
    tensors = reader.tensors
    written = []
    for number in range(count):
        target = directory / f"s-{number + 1:05d}-of-{count:05d}.gguf"
        writer = gguf.GGUFWriter(target, "qwen2")
        if number == 0:
            for name, part in reader.fields.items():
                if name.startswith("GGUF.") or name == "general.architecture":
                    continue
                writer.add_key_value(name, part.contents(), part.types[0], *part.types[1:])
        writer.add_uint16("split.no", number)
        writer.add_uint16("split.count", count)
        writer.add_int32("split.tensors.count", len(tensors))
        for tensor in tensors[number::count]:
            writer.add_tensor(tensor.name, np.array(tensor.data))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        written.append(target)
    return written
