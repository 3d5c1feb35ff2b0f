"""llama.cpp itself, where it is installed: recomputes the recorded answers, quantises, compares."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import mlx.core as mx
import numpy as np
import pytest

from modelpack.testing.weights import smollm2_gguf
from modelpack_engine.loaders import ModelFiles, gguf_blocks, load
from modelpack_engine.loaders.gguf_file import GGUFFile, GGUFTensor
from tests.engine.loaders.blocks import random_blocks
from tests.engine.loaders.corpus import TEXTS
from tests.engine.loaders.llama_cpp_peer import ask
from tests.engine.loaders.test_architectures import distance
from tests.engine.loaders.test_tokenizers import ANSWERS, BYTE_LEVEL
from tests.engine.loaders.tiny_models import PROMPT, TINY_MODELS
from tests.engine.loaders.vocabularies import Vocabulary, golden, write_vocabulary

pytestmark = pytest.mark.peer("llama-cpp-python")

#: File types, and how far our logits may be from llama.cpp's, which also rounds activations to 8
#: bits where weights are quantised.
FILE_TYPES = {
    "F16": 1e-4,
    "Q8_0": 5e-3,
    "Q6_K": 5e-3,
    "Q5_K_M": 5e-3,
    "Q5_0": 5e-3,
    "Q4_K_M": 5e-3,
    "IQ4_NL": 5e-3,
    "Q3_K_M": 1e-2,
    "Q2_K": 2e-2,
}


def test_recorded_token_ids(tmp_path: Path) -> None:
    vocabulary = Vocabulary.read("uncut")
    files = [write_vocabulary(tmp_path / f"{n}.gguf", vocabulary, pre=n) for n in BYTE_LEVEL]
    tasks = [{"task": "tokenize", "model": str(file), "texts": list(TEXTS)} for file in files]
    assert dict(zip(BYTE_LEVEL, ask(tasks, tmp_path), strict=True)) == {
        name: ANSWERS[name] for name in BYTE_LEVEL
    }


def test_recorded_logits(tmp_path: Path) -> None:
    files = {name: tiny.write(tmp_path / f"{name}.gguf") for name, tiny in TINY_MODELS.items()}
    tasks = [{"task": "logits", "model": str(f), "prompts": [PROMPT]} for f in files.values()]
    for name, answer in zip(files, ask(tasks, tmp_path), strict=True):
        assert distance(np.array(answer["logits"][0]), golden("logits")[name]) < 1e-6


@pytest.mark.parametrize("dtype", sorted(gguf_blocks.SUPPORTED_TYPES - {"F32"}))
def test_blocks_are_bit_equal_to_ggml(dtype: str, tmp_path: Path) -> None:
    raw = random_blocks(dtype, 4, 512, seed=1)
    source, target = tmp_path / "blocks", tmp_path / "values"
    raw.tofile(source)
    kind = int(gguf.GGMLQuantizationType[dtype])
    task = {"task": "dequantize", "source": str(source), "target": str(target)}
    ask([{**task, "type": kind, "count": 4 * 512}], tmp_path)
    expected = np.fromfile(target, np.float32).reshape(4, 512)
    got = gguf_blocks.dense(GGUFTensor("w", dtype, (4, 512), raw.reshape(-1)))
    assert np.array_equal(got, expected)


@pytest.mark.weights
@pytest.mark.parametrize("file_type", FILE_TYPES)
def test_quantised_by_llama_cpp(file_type: str, tmp_path: Path) -> None:
    """Every dequantised tensor is ggml's, and the logits are llama.cpp's."""
    path = tmp_path / "m.gguf"
    made = ask(
        [
            {
                "task": "quantize",
                "source": str(smollm2_gguf()),
                "target": str(path),
                "type": file_type,
            }
        ],
        tmp_path,
    )
    assert made == [{"code": 0}]
    check_tensors(path, tmp_path)
    loaded = load(ModelFiles.from_directory(path), device="cpu")
    prompts = [
        loaded.tokenizer.encode(text) for text in ("The capital of France is", "Water boils")
    ]
    (answer,) = ask([{"task": "logits", "model": str(path), "prompts": prompts}], tmp_path)
    for prompt, expected in zip(prompts, answer["logits"], strict=True):
        got = np.array(loaded.model(mx.array([prompt]))[0, -1])
        assert distance(got, np.array(expected)) < FILE_TYPES[file_type]
    packed = load(ModelFiles.from_directory(path), device="cpu", dense=False)
    logits = np.array(packed.model(mx.array(prompts[:1]))[0, -1])
    assert distance(logits, np.array(loaded.model(mx.array(prompts[:1]))[0, -1])) < 1e-3
    path.unlink()


def check_tensors(path: Path, work: Path) -> None:
    """Compare one tensor of every type with what ggml makes of it."""
    kinds: dict[str, GGUFTensor] = {}
    for tensor in GGUFFile.open([path]):
        kinds.setdefault(tensor.dtype, tensor)
    tasks: list[dict[str, Any]] = []
    for name, tensor in kinds.items():
        if name == "F32":
            continue
        tensor.raw.tofile(work / f"{name}.blocks")
        tasks.append(
            {
                "task": "dequantize",
                "source": str(work / f"{name}.blocks"),
                "target": str(work / f"{name}.values"),
                "type": int(gguf.GGMLQuantizationType[name]),
                "count": tensor.elements,
            }
        )
    ask(tasks, work)
    for name, tensor in kinds.items():
        if name != "F32":
            expected = np.fromfile(work / f"{name}.values", np.float32).reshape(tensor.shape)
            assert np.array_equal(gguf_blocks.dense(tensor), expected), tensor.name
