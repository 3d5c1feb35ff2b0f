"""Safetensors of every architecture that the library for CPUs knows: read from the mapped files."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.utils import MODEL_REMAPPING, quantize_model

from modelpack_engine.cpu import program
from modelpack_engine.errors import ModelLoadError
from modelpack_engine.models import LoadedModel, ModelFiles, load
from tests.engine.cpu.test_gguf_models import NAMES, logits_of
from tests.engine.loaders.test_safetensors import save
from tests.engine.loaders.tiny_models import TINY_MODELS

HALF = 2.0**-11  # the relative error of rounding to a half

pytestmark = pytest.mark.usefixtures("built")


def load_packed(directory: Path) -> LoadedModel:
    return load(ModelFiles.from_directory(directory), device="cpu", packed=True)


def close(got: np.ndarray, expected: np.ndarray, tolerance: float) -> bool:
    return bool(np.abs(got - expected).max() < tolerance * max(1, np.abs(expected).max()))


@pytest.mark.sample(7)
@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("name", NAMES)
def test_logits(name: str, shards: int, tmp_path: Path) -> None:
    tiny = TINY_MODELS[name]
    model = tiny.build()
    loaded = load_packed(save(tmp_path, model, tiny.config, shards=shards))
    assert close(logits_of(loaded), tiny.logits(model), 1e-4)


@pytest.mark.parametrize("name", program.OTHER_NAMES)
def test_models_of_other_names(name: str, tmp_path: Path) -> None:
    """They are Llama's: Mistral's, for example."""
    tiny = TINY_MODELS["llama"]
    model = tiny.build()
    loaded = load_packed(save(tmp_path, model, {**tiny.config, "model_type": name}))
    assert close(logits_of(loaded), tiny.logits(model), 1e-4)


def test_the_other_names_are_those_of_mlx_lm() -> None:
    found = {name: module for name, module in MODEL_REMAPPING.items() if module in program.MODELS}
    assert found == program.OTHER_NAMES


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
def test_weights_are_those_of_the_file(dtype: mx.Dtype, tmp_path: Path) -> None:
    tiny = TINY_MODELS["qwen2"]  # with biases
    model = tiny.build()
    model.set_dtype(dtype)
    loaded = load_packed(save(tmp_path, model, tiny.config))
    assert loaded.packed is not None
    weights = dict(tree_flatten(model.parameters()))
    assert weights.keys() == loaded.packed.matrices.keys() | loaded.packed.vectors.keys()
    for name, vector in loaded.packed.vectors.items():
        np.testing.assert_array_equal(vector, np.array(weights[name].astype(mx.float32)))
    for name, matrix in loaded.packed.matrices.items():
        rows = np.stack([matrix.row(i) for i in range(matrix.rows)])
        np.testing.assert_array_equal(rows, np.array(weights[name].astype(mx.float32)))
    assert {array.dtype for _, array in tree_flatten(loaded.model.parameters())} == {dtype}


@pytest.mark.sample(7)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("bits", "group_size"), [(4, 32), (4, 64), (8, 32), (8, 64)])
def test_logits_of_codes(name: str, bits: int, group_size: int, tmp_path: Path) -> None:
    """MLX's own quantisation, computed by MLX in float32: the library keeps 16 bits."""
    tiny = TINY_MODELS[name]

    def predicate(_: str, module: Any) -> bool:
        return hasattr(module, "to_quantized") and module.weight.shape[-1] % group_size == 0

    model, config = quantize_model(
        tiny.build(), copy.deepcopy(tiny.config), group_size, bits, quant_predicate=predicate
    )
    model.set_dtype(mx.float16)  # which halves hold; biases too
    loaded = load_packed(save(tmp_path, model, config))
    model.set_dtype(mx.float32)
    assert close(logits_of(loaded), tiny.logits(model), 1e-3)


@pytest.mark.sample(5)
@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_codes_of_any_size(bits: int, dtype: mx.Dtype, tmp_path: Path) -> None:
    """Their values are MLX's; scales in float32 are rounded to halves."""
    tiny = TINY_MODELS["llama"]
    model, config = quantize_model(tiny.build(), copy.deepcopy(tiny.config), 64, bits)
    model.set_dtype(dtype)
    loaded = load_packed(save(tmp_path, model, config))
    assert loaded.packed is not None
    for path, module in model.named_modules():
        if "scales" not in module:
            continue
        parts = [module[part] for part in ("scales", "biases")]
        scales, biases = (part.astype(mx.float32) for part in parts)
        settings = {"group_size": 64, "bits": bits}
        expected = np.array(mx.dequantize(module.weight, scales, biases, **settings))
        codes = mx.abs(scales) * (2**bits - 1) + mx.abs(biases)
        rounding = HALF * np.array(codes).repeat(64, axis=1) + 2.0**-24
        matrix = loaded.packed.matrices[f"{path}.weight"]
        found = np.stack([matrix.row(i) for i in range(matrix.rows)])
        excess = np.abs(found - expected) - (rounding if dtype == mx.float32 else 1e-6 * rounding)
        assert excess.max() <= 2.0**-22, (path, excess.max())


def test_some_modules_in_other_codes(tmp_path: Path) -> None:
    """As mlx-lm's mixed quantisations: other bits for some paths, and none for others."""
    tiny = TINY_MODELS["llama"]

    def predicate(path: str, module: Any) -> Any:
        if path.endswith("v_proj"):
            return {"bits": 8, "group_size": 32}
        return not path.endswith("o_proj") and hasattr(module, "to_quantized")

    config = copy.deepcopy(tiny.config)
    model, config = quantize_model(tiny.build(), config, 64, 4, quant_predicate=predicate)
    model.set_dtype(mx.float16)
    loaded = load_packed(save(tmp_path, model, config))
    model.set_dtype(mx.float32)
    assert close(logits_of(loaded), tiny.logits(model), 1e-3)


@pytest.mark.parametrize(("mode", "bits", "size"), [("mxfp4", 4, 32), ("nvfp4", 4, 16)])
def test_other_quantisations_run_on_mlx(mode: str, bits: int, size: int, tmp_path: Path) -> None:
    tiny = TINY_MODELS["llama"]
    model, config = quantize_model(tiny.build(), copy.deepcopy(tiny.config), size, bits, mode=mode)
    loaded = load_packed(save(tmp_path, model, config))
    assert loaded.packed is None
    assert close(tiny.logits(loaded.model), tiny.logits(model), 1e-4)


@pytest.mark.parametrize("change", ["missing", "unknown", "of another shape"])
def test_tensors_that_do_not_match(change: str, tmp_path: Path) -> None:
    """The error is that of other backends."""
    tiny = TINY_MODELS["llama"]
    save(tmp_path, tiny.build(), tiny.config)
    path = tmp_path / "model.safetensors"
    weights = mx.load(str(path))
    assert isinstance(weights, dict)
    name = "model.layers.1.mlp.down_proj.weight"
    if change == "missing":
        del weights[name]
    elif change == "unknown":
        weights["model.layers.1.mlp.extra"] = mx.zeros(4)
    else:
        weights[name] = mx.zeros((32, 32))
    mx.save_safetensors(str(path), dict(weights))
    with pytest.raises(ModelLoadError, match="cannot build mlx-lm's llama"):
        load_packed(tmp_path)


@pytest.mark.long
def test_transformers_is_not_imported(tmp_path: Path) -> None:
    """Its import takes a second."""
    tiny = TINY_MODELS["llama"]
    save(tmp_path, tiny.build(), tiny.config)
    code = (
        "import sys; from pathlib import Path; from modelpack_engine.models import *;"
        "made = load(ModelFiles.from_directory(Path(sys.argv[1])), device='cpu', packed=True);"
        "print(made.packed is not None, {'transformers', 'mlx_lm.utils'} & sys.modules.keys())"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "True set()", done.stderr
