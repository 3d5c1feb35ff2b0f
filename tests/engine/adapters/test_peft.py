"""Adapters as PEFT saves them give the logits that PEFT computes with them (golden/make.py)."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from safetensors.numpy import save_file

from modelpack.formats.adapter import Adapter, AdapterError, read_adapter
from modelpack_engine.models.adapter import merge, read_layers
from modelpack_engine.patches.lora import EXPERTS as EXPERT_LAYERS
from modelpack_engine.patches.lora import Layers, LoRALayers
from modelpack_engine.runner.model_runner import make_runner
from tests.engine.adapters.golden.make import FILE, TOKENS, values
from tests.engine.adapters.test_zoo import BY_NAME
from tests.engine.zoo.driving import Driver, Setting

GOLDEN: dict[str, Any] = json.loads(FILE.read_text())
#: What transformers takes for the base of the rope; it writes it into another field.
THETA = {"gpt_oss": 1.5e5, "mixtral": 1e6}
#: Without other parameters, nothing says which matrix has the inputs.
UNSETTLED = [name for name in GOLDEN if name.startswith("qwen3_moe square, PEFT")]
PARAMETERS = [
    name
    for name in GOLDEN
    if GOLDEN[name]["adapter"].get("target_parameters") and name not in UNSETTLED
]
EMBEDDINGS = [name for name in GOLDEN if "embeddings" in name]
CONV1D = [name for name in GOLDEN if name.startswith("gpt2")]


def base(name: str) -> nn.Module:
    """Return the model of a case in mlx-lm's class."""
    case = GOLDEN[name]
    config = {"rope_theta": THETA.get(case["config"]["model_type"], 1e4), **case["config"]}
    module = importlib.import_module(f"mlx_lm.models.{config['model_type']}")
    model = module.Model(module.ModelArgs.from_dict(config))
    weights: dict[str, np.ndarray] = {}
    for key, shape in case["base"].items():
        weights |= of_mlx(config["model_type"], key, values(key, tuple(shape)))
    made = {key: mx.array(array) for key, array in weights.items()}
    if hasattr(model, "sanitize"):
        made = model.sanitize(made)
    model.load_weights(list(made.items()))
    return model.eval()  # type: ignore[no-any-return]


def of_mlx(kind: str, name: str, array: np.ndarray) -> dict[str, np.ndarray]:
    """Return the parameters of mlx-lm's class that a parameter of transformers becomes."""
    name = name.removeprefix("transformer.")
    if kind == "mixtral":
        name = name.replace(".mlp.", ".block_sparse_moe.")
    if kind != "gpt_oss":
        name = name.replace(".mlp.experts.", ".mlp.switch_mlp.")
        name = name.replace(".block_sparse_moe.experts.", ".block_sparse_moe.switch_mlp.")
    stem, _, part = name.rpartition(".")
    part, is_bias = part.removesuffix("_bias"), part.endswith("_bias")
    if part not in ("gate_up_proj", "down_proj"):
        return {name: array}
    if kind == "gpt_oss" and not is_bias:
        array = array.swapaxes(1, 2)
    last = "bias" if is_bias else "weight"
    if part == "down_proj":
        return {f"{stem}.{part}.{last}": np.ascontiguousarray(array)}
    if kind == "gpt_oss":
        gate, up = array[:, ::2], array[:, 1::2]
    else:
        gate, up = np.split(array, 2, axis=1)
    return {
        f"{stem}.gate_proj.{last}": np.ascontiguousarray(gate),
        f"{stem}.up_proj.{last}": np.ascontiguousarray(up),
    }


def adapter_of(name: str, directory: Path) -> Adapter:
    """Return the adapter of a case, in the files that PEFT wrote."""
    tensors = {
        key: values(f"{key}.weight" if "magnitude" in key else key, tuple(shape))
        for key, shape in GOLDEN[name]["tensors"].items()
    }
    save_file(tensors, directory / "adapter_model.safetensors")
    (directory / "adapter_config.json").write_text(json.dumps(GOLDEN[name]["adapter"]))
    return read_adapter(directory)


def logits(model: nn.Module) -> np.ndarray:
    found: np.ndarray = np.array(model(mx.array([TOKENS]))[0].astype(mx.float32))
    return found


def tokens(model: nn.Module, layers: Layers | None, slots: tuple[int, ...]) -> list[list[int]]:
    """Return the greedy tokens of a batch, whose requests have these slots; 0 is no adapter."""
    runner = make_runner(model, num_blocks=64, exact=True)
    assert runner.adapter_rows is not None
    loras = LoRALayers(model, runner.adapter_rows)
    if layers is not None:
        loras.set(1, layers)
    driver = Driver(runner, Setting())
    for slot in slots:
        driver.add(TOKENS, 6, adapter=slot)
    driver.run()
    loras.undo()
    runner.undo()
    return driver.tokens


def check(name: str, directory: Path) -> None:
    """Compare a case: without the adapter, merged, and by requests with and without it."""
    model, golden = base(name), GOLDEN[name]
    np.testing.assert_allclose(logits(model), golden["logits"], atol=1e-4)
    layers = read_layers(adapter_of(name, directory), model)
    (plain,) = tokens(model, None, (0,))
    alone, mixed = tokens(model, layers, (1, 1)), tokens(model, layers, (1, 0, 1))
    merge(model, layers)
    np.testing.assert_allclose(logits(model), golden["adapted"], atol=1e-4)
    (expected,) = tokens(model, None, (0,))
    assert alone == [expected, expected]
    assert mixed == [expected, plain, expected]
    assert expected != plain


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters_of_experts(name: str, tmp_path: Path, uncompiled: None) -> None:
    """`target_parameters`: joined gates, nested names, patterns, and layouts of PEFT's versions."""
    check(name, tmp_path)


@pytest.mark.parametrize("name", UNSETTLED)
def test_square_parameters_of_old_versions(name: str, tmp_path: Path) -> None:
    with pytest.raises(
        AdapterError, match=r"gate_up_proj: PEFT before 0\.19\.1 may have exchanged"
    ):
        read_layers(adapter_of(name, tmp_path), base(name))


#: The path of the experts in transformers, the parameters, and the layers of mlx-lm.
_GATED: dict[str, tuple[str, ...]] = {
    "gate_up_proj": ("gate_proj", "up_proj"),
    "down_proj": ("down_proj",),
}
MIXTURES: dict[str, tuple[str, dict[str, tuple[str, ...]]]] = {
    "qwen3_5_moe": ("model.language_model.layers.3.mlp", _GATED),
    "qwen3_next": ("model.layers.3.mlp", _GATED),
    "deepseek_v3": ("model.layers.3.mlp", _GATED),
    "llama4": ("language_model.model.layers.3.feed_forward", _GATED),
    "jamba": ("model.layers.3.feed_forward", _GATED),
    "granitemoe": ("model.layers.3.block_sparse_moe", _GATED),
    "nemotron_h: experts": (
        "model.layers.3.mixer", {"up_proj": ("fc1",), "down_proj": ("fc2",)}
    ),
}  # fmt: skip


def write_parameters(
    at: Path, path: str, shapes: dict[str, tuple[int, int, int]], rank: int = 2, **fields: Any
) -> tuple[Path, dict[str, np.ndarray]]:
    """Write an adapter of experts as PEFT does; return what it adds [experts, outputs, inputs]."""
    at.mkdir(exist_ok=True)
    tensors, sums = {}, {}
    for depth, (part, (count, outputs, inputs)) in enumerate(reversed(shapes.items())):
        name = f"base_model.model.{path}.experts{'.base_layer' * depth}.lora_"
        a, b = values(f"{part}A", (count * rank, inputs)), values(part, (outputs, rank * count))
        tensors |= {f"{name}A.weight": a, f"{name}B.weight": b}
        sums[part] = np.einsum(
            "ore,eri->eoi", b.reshape(-1, rank, count), a.reshape(count, rank, -1)
        )
    save_file(tensors, at / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "peft_version": "0.21.2",
              "target_parameters": [f"experts.{part}" for part in shapes]}  # fmt: skip
    (at / "adapter_config.json").write_text(json.dumps({**config, **fields}))
    return at, sums


def shapes_of(
    model: nn.Module, layer: str, parts: dict[str, tuple[str, ...]]
) -> dict[str, tuple[int, int, int]]:
    """Return the shapes [experts, outputs, inputs] of the parameters of a layer's experts."""
    weights = {
        name.rpartition(".")[2]: module.weight.shape
        for name, module in model.named_modules()
        if isinstance(module, EXPERT_LAYERS) and f"layers.{layer}." in name
    }
    found = {}
    for part, names in parts.items():
        count, _, inputs = weights[names[0]]
        found[part] = (count, sum(weights[name][1] for name in names), inputs)
    return found


@pytest.mark.parametrize("name", MIXTURES)
def test_names_of_mixtures(name: str, tmp_path: Path) -> None:
    """Each parameter becomes mlx-lm's layers, whatever both call the experts of a layer."""
    model = BY_NAME[name].build()
    path, parts = MIXTURES[name]
    written, sums = write_parameters(tmp_path / "a", path, shapes_of(model, "3", parts))
    layers = {
        found.rpartition(".")[2]: np.array((one.a @ one.b).swapaxes(1, 2))
        for found, one in read_layers(read_adapter(written), model, dtype=mx.float32).items()
    }
    assert layers.keys() == {layer for names in parts.values() for layer in names}
    for part, names in parts.items():
        joined = np.concatenate([layers[layer] for layer in names], axis=1)
        np.testing.assert_allclose(joined, sums[part], atol=1e-5)


@pytest.mark.parametrize(
    ("name", "path", "shapes", "message"),
    [
        ("llama", "model.layers.3.mlp", {}, "layers.3 has 0 mixtures of experts with gate_up_proj"),
        ("qwen3_moe", "model.layers.9.mlp", {}, "layers.9 has 0 mixtures of experts"),
        ("qwen3_moe", "model.layers.3.mlp", {"gate_up_proj": (3, 48, 64)}, "but the model has"),
        ("qwen3_moe", "model.layers.3.mlp", {"up_proj": (4, 48, 64)}, "0 mixtures .* with up_proj"),
    ],
)
def test_parameters_of_other_models(
    name: str, path: str, shapes: dict[str, tuple[int, int, int]], message: str, tmp_path: Path
) -> None:
    shapes = shapes or {"gate_up_proj": (4, 48, 64)}
    written, _ = write_parameters(tmp_path / "a", path, shapes)
    with pytest.raises(AdapterError, match=message):
        read_layers(read_adapter(written), BY_NAME[name].build())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"target_parameters": "experts.down_proj"}, "target_parameters is not a list of names"),
        (
            {"target_parameters": ["experts.down_proj", "experts.down_proj_bias"]},
            "target_parameters has 'experts.down_proj_bias', expected weights, gate_up_proj",
        ),
        (
            {"target_parameters": ["experts.down_proj"]},
            "mlp.experts: has matrices of 2 parameters, but target_parameters names 1",
        ),
        ({"target_parameters": []}, "target_parameters names 0"),
        ({"r": 3}, "gate_up_proj: the rank is 8, expected 3 or a multiple of it"),
        ({"r": 64}, "the rank is 8, expected 64"),
        ({"use_dora": True}, "use_dora is set, but it has no magnitude"),
    ],
)
def test_bad_parameters(fields: dict[str, Any], message: str, tmp_path: Path) -> None:
    shapes = {"gate_up_proj": (4, 6, 5), "down_proj": (4, 5, 3)}
    written, _ = write_parameters(tmp_path / "a", "model.layers.0.mlp", shapes, **fields)
    with pytest.raises(AdapterError, match=message):
        read_adapter(written)


@pytest.mark.parametrize("name", CONV1D)
def test_layers_that_are_stored_transposed(name: str, tmp_path: Path, uncompiled: None) -> None:
    """PEFT's A and B of a Conv1D, and its magnitudes, are those of a linear layer."""
    assert GOLDEN[name]["adapter"]["fan_in_fan_out"]
    check(name, tmp_path)


@pytest.mark.parametrize("name", EMBEDDINGS)
def test_dora_of_embeddings(name: str, tmp_path: Path, uncompiled: None) -> None:
    """PEFT's magnitudes of an embedding are those of its outputs."""
    check(name, tmp_path)
