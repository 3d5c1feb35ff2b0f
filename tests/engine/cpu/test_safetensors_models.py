"""Safetensors of every architecture that the library for CPUs knows: read from the mapped files."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from modelpack_engine.errors import ModelLoadError
from modelpack_engine.models import LoadedModel, ModelFiles, load
from tests.engine.cpu.test_gguf_models import NAMES, logits_of
from tests.engine.loaders.test_safetensors import save
from tests.engine.loaders.tiny_models import TINY_MODELS

pytestmark = pytest.mark.usefixtures("built")


def load_packed(directory: Path) -> LoadedModel:
    return load(ModelFiles.from_directory(directory), device="cpu", packed=True)


def close(got: np.ndarray, expected: np.ndarray, tolerance: float) -> bool:
    return bool(np.abs(got - expected).max() < tolerance * max(1, np.abs(expected).max()))


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("name", NAMES)
def test_logits(name: str, shards: int, tmp_path: Path) -> None:
    tiny = TINY_MODELS[name]
    model = tiny.build()
    loaded = load_packed(save(tmp_path, model, tiny.config, shards=shards))
    assert close(logits_of(loaded), tiny.logits(model), 1e-4)


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
