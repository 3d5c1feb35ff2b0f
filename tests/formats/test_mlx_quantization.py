"""Weights quantized by mlx-lm: bits, groups and parameters from config.json and names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten

from modelpack.artifacts import media_types
from modelpack.artifacts.config import ModelConfig
from modelpack.formats.config_json import MLXQuantization, mlx_bits
from modelpack.formats.statistics import safetensors_statistics
from modelpack.formats.units import format_decimal_parameters

Q4 = {"group_size": 64, "bits": 4}


@pytest.mark.parametrize(
    ("config", "label"),
    [
        ({"quantization": Q4}, "4bit"),
        ({"quantization": {"group_size": 32, "bits": 8, "mode": "affine"}}, "8bit"),
        ({"quantization": {"group_size": 32, "bits": 4, "mode": "mxfp4"}}, "mxfp4"),
        ({"quantization": Q4 | {"lm_head": False, "embed": {"group_size": 64, "bits": 6}}}, "4bit"),
        ({}, None),
        ({"quantization": None}, None),
        ({"quantization": "q4"}, None),
        ({"quantization": {"bits": 4}}, None),
        ({"quantization": {"bits": "4", "group_size": 64}}, None),
        ({"quantization": {"bits": True, "group_size": 64}}, None),
        ({"quantization": {"bits": 0, "group_size": 64}}, None),
        ({"quantization": {"bits": 64, "group_size": 64}}, None),
        ({"quantization": {"bits": 4, "group_size": 0}}, None),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 128}}, None),
    ],
)
def test_what_a_config_says(config: dict[str, Any], label: str | None) -> None:
    found = MLXQuantization.of(config)
    assert (found.label if found else None) == label


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(100, 128)
        self.first = nn.Linear(128, 64, bias=True)
        self.second = nn.Linear(64, 128, bias=False)
        self.norm = nn.RMSNorm(128)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("apart", [{}, {"second": 8}])
def test_packed_weights_count_as_what_they_were(
    tmp_path: Path, bits: int, apart: dict[str, int]
) -> None:
    model = Model()
    parameters = sum(array.size for _, array in tree_flatten(model.parameters()))

    def chosen(name: str, module: nn.Module) -> bool | dict[str, int]:
        if not hasattr(module, "to_quantized"):
            return False
        return {"bits": apart[name], "group_size": 64} if name in apart else True

    nn.quantize(model, 64, bits, class_predicate=chosen)
    quantization: dict[str, Any] = {"bits": bits, "group_size": 64}
    quantization |= {name: {"bits": own, "group_size": 64} for name, own in apart.items()}
    (tmp_path / "config.json").write_text(json.dumps({"quantization": quantization}))
    mx.save_safetensors(str(tmp_path / "m.safetensors"), dict(tree_flatten(model.parameters())))
    statistics = safetensors_statistics([tmp_path / "m.safetensors"])
    assert statistics.parameters == format_decimal_parameters(parameters)
    assert statistics.quantization == f"{bits}bit"
    assert statistics.safetensors is not None
    assert statistics.safetensors["quantization.bits"] == str(bits)
    assert statistics.safetensors["quantization.group_size"] == "64"
    exact = safetensors_statistics([tmp_path / "m.safetensors"], exact=True)
    assert exact.quantization == "mixed"  # as Docker Model Runner counts
    assert "quantization.bits" not in (exact.safetensors or {})


@pytest.mark.parametrize(
    ("facts", "bits"),
    [({"quantization.bits": "4"}, 4), ({}, None), (None, None),
     ({"quantization.bits": "four"}, None), ({"quantization.bits": "9" * 5000}, None)],
)  # fmt: skip
def test_what_a_packaged_model_says(facts: dict[str, str] | None, bits: int | None) -> None:
    config = ModelConfig(media_types.DOCKER_CONFIG_V02, format="safetensors", safetensors=facts)
    assert mlx_bits(config) == bits
