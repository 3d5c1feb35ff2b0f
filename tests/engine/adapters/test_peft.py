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

from modelpack.formats.adapter import Adapter, read_adapter
from modelpack_engine.models.adapter import merge, read_layers
from modelpack_engine.patches.lora import Layers, LoRALayers
from modelpack_engine.runner.model_runner import make_runner
from tests.engine.adapters.golden.make import FILE, TOKENS, values
from tests.engine.zoo.driving import Driver, Setting

GOLDEN: dict[str, Any] = json.loads(FILE.read_text())
CONV1D = [name for name in GOLDEN if name.startswith("gpt2")]


def base(name: str) -> nn.Module:
    """Return the model of a case in mlx-lm's class."""
    case = GOLDEN[name]
    config = case["config"]
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


@pytest.mark.parametrize("name", CONV1D)
def test_layers_that_are_stored_transposed(name: str, tmp_path: Path, uncompiled: None) -> None:
    """PEFT's A and B of a Conv1D, and its magnitudes, are those of a linear layer."""
    assert GOLDEN[name]["adapter"]["fan_in_fan_out"]
    check(name, tmp_path)
