"""Tiny GGUF models of every architecture that the library for CPUs knows: logits are mlx-lm's."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gguf
import mlx.core as mx
import numpy as np
import pytest

from modelpack_engine.core.batch import Chunk, StepBatch
from modelpack_engine.cpu import program
from modelpack_engine.models import LoadedModel, ModelFiles, load
from modelpack_engine.runner.cpu import CpuRunner
from modelpack_engine.runner.model_layout import find_layout
from tests.engine.loaders.tiny_models import PROMPT, TINY_MODELS

pytestmark = pytest.mark.usefixtures("built")
NAMES = [name for name, tiny in TINY_MODELS.items() if tiny.config["model_type"] in program.MODELS]
Q8 = gguf.GGMLQuantizationType.Q8_0


def runner_of(loaded: LoadedModel) -> CpuRunner:
    """Return a runner of steps of up to the rows of `PROMPT`, with a cache in float32."""
    assert loaded.packed is not None
    layout = find_layout(loaded.model).with_dtype(mx.float32)
    return CpuRunner(
        loaded.model, loaded.packed, layout, num_blocks=8, block_size=16, max_rows=len(PROMPT)
    )


def run(runner: CpuRunner, first: int, stop: int, sampled: Sequence[int]) -> np.ndarray:
    """Compute the tokens [first, stop) of `PROMPT`; return the logits of the rows `sampled`."""
    table, count = tuple(range(1, 1 + -(-len(PROMPT) // 16))), stop - first
    batch = StepBatch(
        token_ids=PROMPT[first:stop],
        positions=list(range(first, stop)),
        slots=[table[i // 16] * 16 + i % 16 for i in range(first, stop)],
        from_previous=(),
        num_decode=0,
        decode_tables=[],
        decode_lengths=[],
        decode_seq_ids=(),
        chunks=(Chunk(0, count, count, stop, table, 1),),
        sample_rows=tuple(sampled),
        sample_seqs=(),
    )
    return np.array(runner.forward(batch, mx.array(PROMPT[first:stop], mx.int32)))


def logits_of(loaded: LoadedModel) -> np.ndarray:
    """Return the logits of all positions of `PROMPT`."""
    return run(runner_of(loaded), 0, len(PROMPT), range(len(PROMPT)))


def test_all_architectures_of_gguf_are_here() -> None:
    assert {TINY_MODELS[name].config["model_type"] for name in NAMES} >= {
        "gemma2", "gemma3_text", "llama", "phi3", "qwen2", "qwen3", "smollm3",
    }  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_logits(name: str, tmp_path: Path) -> None:
    tiny = TINY_MODELS[name]
    files = ModelFiles.from_directory(tiny.write(tmp_path / "m.gguf"))
    got = logits_of(load(files, device="cpu", packed=True))
    expected = tiny.logits(tiny.build())
    assert np.abs(got - expected).max() < 1e-4 * max(1, np.abs(expected).max())


@pytest.mark.parametrize("name", NAMES)
def test_rows_that_are_not_sampled(name: str, tmp_path: Path) -> None:
    """The last layer drops them after attention; of a step without sampled rows it runs no more."""
    files = ModelFiles.from_directory(TINY_MODELS[name].write(tmp_path / "m.gguf"))
    loaded = load(files, device="cpu", packed=True)
    expected = logits_of(loaded)
    runner = runner_of(loaded)
    assert len(run(runner, 0, 6, ())) == 0
    np.testing.assert_array_equal(run(runner, 6, 13, (1, 4, 6)), expected[[7, 10, 12]])
    np.testing.assert_array_equal(run(runner, 13, 14, (0,)), expected[[13]])


def to_8_bits(name: str, values: np.ndarray) -> Any:
    if values.shape[-1] % 32:
        return None
    return gguf.quants.quantize(values, Q8), Q8


@pytest.mark.parametrize("name", NAMES)
def test_logits_of_codes(name: str, tmp_path: Path) -> None:
    """The same file, computed by MLX in float32: the library keeps 16 bits of activations."""
    path = TINY_MODELS[name].write(tmp_path / "m.gguf", to_8_bits)
    files = ModelFiles.from_directory(path)
    got = logits_of(load(files, device="cpu", packed=True))
    expected = TINY_MODELS[name].logits(load(files, device="cpu").model)
    for a, b in zip(got, expected, strict=True):
        assert np.corrcoef(a, b)[0, 1] > 0.99999
