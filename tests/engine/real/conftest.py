"""SmolLM2, loaded once for all tests of real weights."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx_lm.generate import generate_step
from mlx_lm.utils import load_model

from modelpack.testing.weights import smollm2_gguf
from modelpack_engine.config import EngineConfig
from modelpack_engine.engine import Engine
from modelpack_engine.models import ModelFiles, load
from tests.engine.real.export import write_export
from tests.engine.real.prompts import PROMPTS

NUM_TOKENS = 12


def single(model: Any, prompt: list[int], count: int) -> list[int]:
    """mlx-lm's single-request path, greedily, to `count` tokens or the end of the text."""
    steps = generate_step(mx.array(prompt), model, max_tokens=count)
    tokens: list[int] = []
    for token, _ in steps:
        tokens.append(int(token))
        if tokens[-1] == 2:  # <|im_end|>
            break
    return tokens


@pytest.fixture(scope="session")
def engine() -> Engine:
    """The GGUF file in our engine; steps of 64 rows, so that long prompts come in chunks."""
    loaded = load(ModelFiles.from_directory(smollm2_gguf()), device="cpu")
    config = EngineConfig(
        device="cpu", max_num_seqs=8, max_num_batched_tokens=64, max_model_len=1024
    )
    return Engine(loaded, config)


@pytest.fixture(scope="session")
def prompts(engine: Engine) -> list[list[int]]:
    return [engine.tokenizer.encode(prompt) for prompt in PROMPTS]


@pytest.fixture(scope="session")
def export(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    directory = write_export(tmp_path_factory.mktemp("export"))
    yield directory
    (directory / "model.safetensors").unlink()


@pytest.fixture(scope="session")
def expected(export: Path, prompts: list[list[int]]) -> list[list[int]]:
    """What mlx-lm alone says to every prompt: its own loader, its own weights, its own cache."""
    model, _ = load_model(export)
    return [single(model, prompt, NUM_TOKENS) for prompt in prompts]
