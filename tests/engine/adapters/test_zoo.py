"""Requests with different adapters in one batch generate the tokens of merged models."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm.models.switch_layers import SwitchLinear

from modelpack.formats.adapter import read_adapter
from modelpack_engine.models.adapter import merge, read_layers
from modelpack_engine.patches.lora import LINEARS, Layers, LoRALayers, Matrices
from modelpack_engine.runner.model_runner import make_runner
from tests.adapters import random_pairs, write_mlx, write_peft
from tests.engine.zoo.catalogue import CATALOGUE
from tests.engine.zoo.configuration import Configuration, prompts
from tests.engine.zoo.driving import Driver, Setting
from tests.engine.zoo.specimen import NUM_TOKENS, make_reference

#: Different attention, experts, recurrence, biases and heads; the first few always run.
ALWAYS = ("llama", "qwen3_moe")
OTHERS = (
    "qwen2", "qwen3", "gemma2", "gemma3_text", "mixtral", "phi3", "glm4", "olmo2", "granite",
    "cohere", "mamba2", "deepseek_v3", "gpt_oss", "starcoder2", "afm7",
)  # fmt: skip
BY_NAME = {each.id: each for each in CATALOGUE}
CASES = [
    pytest.param(BY_NAME[name], id=name, marks=() if name in ALWAYS else pytest.mark.long)
    for name in (*ALWAYS, *OTHERS)
    if name in BY_NAME
]

#: The adapter of each prompt; 0 is none.
SLOTS = (1, 2, 0, 2, 3)


def linears(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Return the shapes of all linear layers, the head's too."""
    return {
        name: tuple(module.weight.shape)
        for name, module in model.named_modules()
        if isinstance(module, LINEARS)
    }


def experts(model: nn.Module) -> dict[str, Matrices]:
    """Return random matrices for the experts of a model."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, SwitchLinear):
            count, outputs, inputs = module.weight.shape
            mx.random.seed(len(name))
            a = mx.random.normal((count, inputs, 2)) * 0.3
            found[name] = Matrices(a, mx.random.normal((count, 2, outputs)) * 0.3)
    return found


def adapters_of(configuration: Configuration, directory: Path) -> list[Layers]:
    """Return three adapters: PEFT's, mlx-lm's of another rank with experts, and a DoRA."""
    model = configuration.build()
    targets = linears(model)
    size = 0.25
    first = write_peft(directory / "peft", targets, rank=2, size=size)
    second = write_mlx(directory / "mlx", targets, rank=5, seed=1, size=size, scale=1.5)
    weights = {name: module.weight for name, module in model.named_modules() if name in targets}
    magnitudes = {
        f"base_model.model.{name}.lora_magnitude_vector": np.array(
            mx.linalg.norm(weight, axis=1) * 1.3
        )
        for name, weight in weights.items()
    }
    third = write_peft(
        directory / "dora", targets, rank=3, seed=2, size=size, use_dora=True, extra=magnitudes
    )
    layers = [read_layers(read_adapter(path), model) for path in (first, second, third)]
    return [layers[0], layers[1] | experts(model), layers[2]]


@pytest.mark.sample(1)
@pytest.mark.parametrize("configuration", CASES)
def test_batch_equals_merged_models(
    configuration: Configuration, tmp_path: Path, uncompiled: None
) -> None:
    adapters = adapters_of(configuration, tmp_path)
    expected: list[list[list[int]]] = []
    for layers in ({}, *adapters):
        model = configuration.build()
        merge(model, layers)
        reference = make_reference(configuration, model)
        assert reference.gap > 1e-5
        expected.append(reference.tokens)
    different = {str(tokens) for tokens in expected}
    assert len(different) == 4, "every adapter changes the tokens"

    model = configuration.build()
    runner = make_runner(model, num_blocks=64, exact=True)
    assert runner.adapter_rows is not None
    loras = LoRALayers(model, runner.adapter_rows)
    for slot, layers in enumerate(adapters, start=1):
        loras.set(slot, layers)
    driver = Driver(runner, Setting())
    for index, prompt in enumerate(prompts()):
        driver.add(prompt, NUM_TOKENS, adapter=SLOTS[index])
        if index < 3:
            driver.step()
    driver.run()
    wanted = [expected[slot][index] for index, slot in enumerate(SLOTS)]
    assert driver.tokens == wanted

    # One adapter for all rows, and none.
    for slot in (1, 0):
        driver = Driver(runner, Setting())
        for prompt in prompts():
            driver.add(prompt, NUM_TOKENS, adapter=slot)
        driver.run()
        assert driver.tokens == expected[slot]


def test_pairs_are_random() -> None:
    (one,), (other,) = (random_pairs({"x": (2, 3)}, 2, seed).values() for seed in (0, 1))
    assert not np.array_equal(one[0], other[0])
