"""Adapters as mlx-lm saves them generate the tokens that mlx-lm generates with them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models.switch_layers import QuantizedSwitchLinear
from mlx_lm.tuner.utils import linear_to_lora_layers

from modelpack.formats.adapter import Adapter, AdapterError, read_adapter
from modelpack_engine.models.adapter import merge, read_layers
from modelpack_engine.patches.lora import EXPERTS, Layers, LoRALayers
from modelpack_engine.runner.model_runner import make_runner
from tests.adapters import write_mlx, write_peft
from tests.engine.adapters.test_zoo import BY_NAME
from tests.engine.zoo.configuration import prompts
from tests.engine.zoo.driving import Driver, Setting
from tests.engine.zoo.specimen import NUM_TOKENS, make_reference

RANK, SCALE = 3, 1.5


def build(name: str, *, quantised: bool = False) -> nn.Module:
    model = BY_NAME[name].build()
    if quantised:
        nn.quantize(model, group_size=32, bits=8)
    return model


def train(
    model: nn.Module, directory: Path, *, dora: bool = False, keys: tuple[str, ...] = ()
) -> Adapter:
    """Give layers mlx-lm's adapters with random values; save them as its trainer does.

    Without `keys`, which are names of layers, all layers of blocks have one.
    """
    parameters: dict[str, Any] = {"rank": RANK, "scale": SCALE, "dropout": 0.0}
    if keys:
        parameters["keys"] = list(keys)
    model.freeze()
    linear_to_lora_layers(model, len(model.layers), parameters, use_dora=dora)
    mx.random.seed(4)
    values = {}
    for name, value in tree_flatten(model.trainable_parameters()):
        noise = mx.random.normal(value.shape)
        values[name] = value * (1 + 0.3 * noise) if name.endswith(".m") else 0.25 * noise
    model.load_weights(list(values.items()), strict=False)
    model.eval()
    directory.mkdir()
    mx.save_safetensors(str(directory / "adapters.safetensors"), values)
    kind = {"fine_tune_type": "dora" if dora else "lora", "num_layers": len(model.layers)}
    config = {**kind, "lora_parameters": parameters}
    (directory / "adapter_config.json").write_text(json.dumps(config))
    return read_adapter(directory)


def generate(model: nn.Module, layers: Layers) -> tuple[list[list[int]], list[list[int]]]:
    """Return the tokens of a batch of all prompts: with the adapter, then without.

    In the first batch, two requests have no adapter; their tokens are left out.
    """
    runner = make_runner(model, num_blocks=64, exact=True)
    assert runner.adapter_rows is not None
    loras = LoRALayers(model, runner.adapter_rows)
    loras.set(1, layers)
    found = []
    for slot in (1, 0):
        driver = Driver(runner, Setting())
        for prompt in prompts():
            driver.add(prompt, NUM_TOKENS, adapter=slot)
        for prompt in prompts()[:2]:
            driver.add(prompt, NUM_TOKENS)
        driver.run()
        found.append(driver.tokens[: len(prompts())])
    loras.undo()
    runner.undo()
    return found[0], found[1]


@pytest.mark.parametrize(
    ("name", "dora", "quantised"),
    [
        pytest.param("llama", True, False, id="DoRA"),
        pytest.param("llama", True, True, id="DoRA of a quantised base"),
        pytest.param("qwen3_moe", False, False, id="experts"),
        pytest.param("qwen3_moe", False, True, id="quantised experts"),
    ],
)
def test_tokens_are_those_of_mlx_lm(
    name: str, dora: bool, quantised: bool, tmp_path: Path, uncompiled: None
) -> None:
    trained = build(name, quantised=quantised)
    adapter = train(trained, tmp_path / "adapter", dora=dora)
    assert adapter.kind == ("dora" if dora else "lora")
    experts = [target for target in adapter.targets if target.experts]
    assert bool(experts) == (name == "qwen3_moe")
    expected = make_reference(BY_NAME[name], trained)
    assert expected.gap > 1e-5

    model = build(name, quantised=quantised)
    layers = read_layers(adapter, model)
    assert len(layers) == len(adapter.targets)
    found, without = generate(model, layers)
    assert found == expected.tokens
    assert without != found
    merge(model, layers)
    assert make_reference(BY_NAME[name], model).tokens == expected.tokens


@pytest.mark.parametrize("name", ["llama", "glm4"])
@pytest.mark.parametrize("dora", [False, True], ids=["LoRA", "DoRA"])
def test_embeddings(name: str, dora: bool, tmp_path: Path, uncompiled: None) -> None:
    """mlx-lm's magnitudes are those of tokens, for the head too where it is the embedding."""
    trained = build(name)
    keys = ("model.embed_tokens", "self_attn.q_proj")
    adapter = train(trained, tmp_path / "adapter", dora=dora, keys=keys)
    assert [target.module for target in adapter.targets if target.embedding] == [keys[0]]
    assert ("lm_head" in trained) == (name == "glm4")
    expected = make_reference(BY_NAME[name], trained)
    assert expected.gap > 1e-5
    model = build(name)
    layers = read_layers(adapter, model)
    assert (layers[keys[0]].token_gain is not None) == dora
    found, without = generate(model, layers)
    assert found == expected.tokens
    assert without != found
    merge(model, layers)
    assert make_reference(BY_NAME[name], model).tokens == expected.tokens


def test_single_experts_of_a_quantised_base(tmp_path: Path, uncompiled: None) -> None:
    """PEFT's modules of experts give the tokens of the same weights merged."""
    model = build("qwen3_moe", quantised=True)
    quantised = {n: m for n, m in model.named_modules() if isinstance(m, QuantizedSwitchLinear)}
    shapes = {name: (m.output_dims, m.input_dims) for name, m in quantised.items()}
    targets = {
        name.replace("switch_mlp", f"experts.{index}"): shape
        for name, shape in shapes.items()
        for index in (0, 2)
    }
    adapter = read_adapter(write_peft(tmp_path, targets, rank=RANK, size=0.4))
    layers = read_layers(adapter, model)
    assert layers.keys() == shapes.keys()
    found, without = generate(model, layers)
    assert found != without
    merge(model, layers)
    modules = dict(model.named_modules())
    assert not any(isinstance(modules[name], QuantizedSwitchLinear) for name in layers)
    expected = make_reference(BY_NAME["qwen3_moe"], model)
    assert expected.gap > 1e-5
    assert found == expected.tokens


def test_experts_with_long_numbers(tmp_path: Path) -> None:
    """Python converts no text of more than 4,300 digits to a number."""
    adapter = read_adapter(write_peft(tmp_path, {"model.layers.0.mlp.experts.1.up_proj": (48, 64)}))
    module = f"model.layers.0.mlp.experts.{'1' * 4400}.up_proj"
    adapter = replace(adapter, targets=(replace(adapter.targets[0], module=module),))
    with pytest.raises(AdapterError, match="is not in the model"):
        read_layers(adapter, build("qwen3_moe"))


def test_experts_of_another_number(tmp_path: Path) -> None:
    model = build("qwen3_moe")
    name, module = next((n, m) for n, m in model.named_modules() if isinstance(m, EXPERTS))
    count, outputs, inputs = module.weight.shape
    adapter = read_adapter(write_mlx(tmp_path, {name: (count + 1, outputs, inputs)}))
    with pytest.raises(AdapterError, match=rf"a weight of shape \[{count + 1}, {outputs}, "):
        read_layers(adapter, model)


@pytest.mark.parametrize("kind", ["embedding", "linear layer"])
def test_magnitudes_of_another_size(kind: str, tmp_path: Path) -> None:
    """Names say which magnitudes are those of tokens; the class may have others."""
    model = nn.Module()
    if kind == "embedding":
        name, size = "table", 6
        model.table = nn.Embedding(10, 6)
    else:
        name, size = "embed", 10
        model.embed = nn.Linear(10, 6)
    magnitudes = {f"{name}.m": np.ones(size, np.float32)}
    path = write_mlx(tmp_path, {name: (6, 10)}, fine_tune_type="dora", extra=magnitudes)
    expected = 10 if kind == "embedding" else 6
    with pytest.raises(AdapterError, match=rf"magnitude has {size} values, expected {expected}"):
        read_layers(read_adapter(path), model)
