"""Which models the library for CPUs gets."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import pytest

from modelpack.testing.weights import smollm2_gguf
from modelpack_engine.config import EngineConfig
from modelpack_engine.cpu.program import can_run
from modelpack_engine.engine import Engine
from modelpack_engine.errors import EngineError
from modelpack_engine.models import ModelFiles, load
from modelpack_engine.models.loader import is_packable, runs_packed
from tests.engine.loaders.tiny_models import TINY_MODELS

pytestmark = pytest.mark.usefixtures("built")


@pytest.mark.parametrize(
    ("format", "architecture", "known"),
    [
        ("gguf", "llama", True),
        ("gguf", "gemma3", True),
        ("gguf", "gemma3_text", False),
        ("gguf", "gpt-oss", False),
        ("gguf", "", False),
        ("safetensors", "gemma3_text", True),
        ("safetensors", "gemma3", False),
        ("safetensors", "mamba", False),
        ("safetensors", "mistral", True),
        ("gguf", "mistral", False),
    ],
)
def test_architectures_have_the_names_of_their_format(
    format: str, architecture: str, known: bool
) -> None:
    assert is_packable(format, architecture) is known


@pytest.mark.parametrize(("more", "runs"), [(0, True), (-2, True), (-1, False), (2, False)])
def test_rotations_that_a_head_has_room_for(more: int, runs: bool) -> None:
    """A configuration may ask for others; MLX says that they are wrong."""
    model = TINY_MODELS["llama"].build()
    rope = model.model.layers[-1].self_attn.rope
    rope.dims += more
    assert can_run(model) is runs


@pytest.mark.weights
@pytest.mark.parametrize(
    ("settings", "device", "packed"),
    [
        ({}, "cpu", True),
        ({"kv_cache_dtype": "fp16"}, "cpu", True),
        ({"kv_cache_dtype": "q8"}, "cpu", False),
        ({"backend": "mlx"}, "cpu", False),
        ({"backend": "llama.cpp"}, "cpu", False),
        ({}, "gpu", False),
    ],
)
def test_settings_that_need_another_backend(
    settings: dict[str, Any], device: Literal["cpu", "gpu"], packed: bool
) -> None:
    files = ModelFiles.from_directory(smollm2_gguf())
    assert runs_packed(files, replace(EngineConfig(), **settings), device) is packed


@pytest.mark.weights
def test_packed_weights_take_little_more_than_their_file() -> None:
    files = ModelFiles.from_directory(smollm2_gguf())
    loaded = load(files, device="cpu", packed=True)
    size = sum(path.stat().st_size for path in files.weights)
    assert loaded.packed is not None
    assert size * 0.9 < loaded.weight_bytes < size * 1.1


@pytest.mark.weights
@pytest.mark.parametrize("block_size", [4, 24])
def test_blocks_that_the_library_cannot_read_are_refused(block_size: int) -> None:
    loaded = load(ModelFiles.from_directory(smollm2_gguf()), device="cpu", packed=True)
    with pytest.raises(EngineError, match=f"blocks of {block_size} tokens") as refused:
        Engine(loaded, EngineConfig(device="cpu", block_size=block_size, max_model_len=512))
    assert refused.value.hint == "set block_size to 16, or backend to mlx"
