"""Which models the library for CPUs gets."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import pytest

from modelpack.testing.weights import smollm2_gguf
from modelpack_engine.config import EngineConfig
from modelpack_engine.models import ModelFiles, load
from modelpack_engine.models.loader import is_packable, runs_packed

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
