"""Ollama's MLX models: quantised by MLX as its `create` does, imported and loaded."""

from __future__ import annotations

import copy
import re
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.utils import quantize_model

import modelpack
from modelpack.artifacts import media_types as mt
from modelpack.operations.docker import import_from_ollama
from modelpack.store.ollama_store import OllamaStore
from modelpack_engine.errors import ModelLoadError
from modelpack_engine.models import load
from modelpack_server.stored_models import stored_files
from tests.engine.loaders.test_safetensors import save
from tests.engine.loaders.tiny_models import TINY_MODELS
from tests.ollama import Layer, write_ollama

TYPES = {
    "int4": ("affine", 4, 64),
    "int8": ("affine", 8, 64),
    "nvfp4": ("nvfp4", 4, 16),
    "mxfp4": ("mxfp4", 4, 32),
    "mxfp8": ("mxfp8", 8, 32),
}
_EXPERTS = re.compile(r"(.*\.mlp)\.switch_mlp\.(\w+)\.weight")


def layers_of(weights: dict[str, mx.array], kind: str, directory: Path) -> list[Layer]:
    """Return the layers of a model's weights, with those quantised that mlx-lm quantised."""
    groups: dict[str, dict[str, mx.array]] = {}
    for name, array in weights.items():
        base, _, part = name.rpartition(".")
        if part in ("scales", "biases"):
            continue
        expert = _EXPERTS.fullmatch(name)
        label = f"{expert[1]}.experts.{expert[2]}.weight" if expert else name
        group = groups.setdefault(f"{expert[1]}.experts" if expert else name, {})
        group[label] = array
        if f"{base}.scales" in weights:
            group[f"{label}.scale"] = weights[f"{base}.scales"]
        if f"{base}.biases" in weights:
            group[f"{label}.bias"] = weights[f"{base}.biases"]
    layers: list[Layer] = []
    for name, group in groups.items():
        path = directory / "blob.safetensors"
        metadata = {}
        if any(key.endswith(".scale") for key in group):
            affine = any(key.endswith(".bias") for key in group)
            own = kind if affine == (TYPES[kind][0] == "affine") else "int8"  # mlx-lm's routers
            metadata = {"quant_type": own, "group_size": str(TYPES[own][2])}
        mx.save_safetensors(str(path), group, metadata=metadata)
        layers.append((mt.OLLAMA_TENSOR, name, path.read_bytes()))
    return layers


def imported(layers: list[Layer], tmp_path: Path, config: Path) -> modelpack.Store:
    """Return a store with the model registry.ollama.ai/me/m:latest."""
    files = [(mt.OLLAMA_JSON, path.name, path.read_bytes()) for path in config.glob("*.json")]
    write_ollama(tmp_path / "ollama", "registry.ollama.ai/me/m/latest", [*layers, *files])
    store = modelpack.Store(tmp_path / "store")
    import_from_ollama(ollama=OllamaStore(tmp_path / "ollama"), store=store)
    return store


@pytest.mark.sample(2)
@pytest.mark.parametrize(
    ("name", "kind"),
    [*(("llama", kind) for kind in ("", *TYPES)), ("qwen3moe", "int4"), ("qwen3moe", "nvfp4")],
)
def test_the_logits_are_those_of_the_model(name: str, kind: str, tmp_path: Path) -> None:
    tiny = TINY_MODELS[name]
    model, config = tiny.build(), copy.deepcopy(tiny.config)
    source = tmp_path / "source"
    source.mkdir()
    save(source, model, config)  # its config.json is that of the model before
    if kind:
        mode, bits, size = TYPES[kind]
        model, _ = quantize_model(model, config, size, bits, mode=mode)
    layers = layers_of(dict(tree_flatten(model.parameters())), kind, tmp_path)
    store = imported(layers, tmp_path, source)
    files = stored_files(modelpack.inspect("registry.ollama.ai/me/m", store=store), store)
    assert [path.name for path in files.weights] == ["model.safetensors"]
    loaded = load(files, device="cpu", dense=False)
    assert np.array_equal(tiny.logits(loaded.model), tiny.logits(model))
    assert loaded.tokenizer.has_chat_template


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    tiny = TINY_MODELS["llama"]
    model = tiny.build()
    source = tmp_path / "source"
    source.mkdir()
    save(source, model, tiny.config)
    weights = dict(tree_flatten(model.parameters()))
    del weights["model.layers.1.mlp.up_proj.weight"]
    store = imported(layers_of(weights, "", tmp_path), tmp_path, source)
    files = stored_files(modelpack.inspect("registry.ollama.ai/me/m", store=store), store)
    with pytest.raises(ModelLoadError, match=r"model\.layers\.1\.mlp\.up_proj\.weight"):
        load(files, device="cpu")
