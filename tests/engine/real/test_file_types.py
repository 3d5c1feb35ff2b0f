"""SmolLM2 in llama.cpp's file types: ggml's numbers, llama.cpp's logits, text that makes sense."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import gguf
import mlx.core as mx
import numpy as np
import pytest

from modelpack.testing.weights import smollm2_gguf
from modelpack_engine.config import EngineConfig
from modelpack_engine.engine import Engine
from modelpack_engine.models import ModelFiles, gguf_blocks, load
from modelpack_engine.models.gguf_file import GGUFFile, GGUFTensor
from modelpack_engine.request import SamplingParams
from tests.engine.loaders.llama_cpp_peer import ask
from tests.engine.loaders.test_architectures import distance
from tests.engine.real.prompts import PARAGRAPH

pytestmark = [pytest.mark.peer("llama-cpp-python"), pytest.mark.weights]

#: File types: how far our logits may be from llama.cpp's, which also rounds activations to 8 bits
#: where weights are quantised, and how much larger the perplexity of a paragraph may be than that
#: of the weights that the file was made of. Rows of 576 are no multiple of 256: llama.cpp holds
#: them in 32-blocks instead, so that only the rows of 1536 are in K-quants.
FILE_TYPES = {
    "F16": (1e-4, 1.01),
    "Q8_0": (5e-3, 1.05),
    "Q6_K": (5e-3, 1.1),
    "Q5_K_M": (5e-3, 1.2),
    "Q5_0": (5e-3, 1.2),
    "Q4_K_M": (5e-3, 1.3),
    "IQ4_NL": (5e-3, 1.3),
    "Q3_K_M": (1e-2, 2),
    "Q2_K": (2e-2, 60),
}
#: Held in the type throughout: a mixture would have no tensor of it.
PURE = ("Q3_K_M", "Q2_K")
QUESTION = "The capital of France is"


def perplexity(engine: Engine, text: str) -> float:
    """The engine's perplexity of `text`, its first token left out."""
    params = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0)
    [events] = engine.generate([text], params)
    entries = [entry for event in events for entry in event.prompt_logprobs or () if entry]
    assert len(entries) == len(engine.tokenizer.encode(text)) - 1
    return math.exp(-sum(entry.logprob for entry in entries) / len(entries))


def answer_to(engine: Engine, text: str, count: int) -> str:
    """What the engine says after `text`, greedily."""
    [events] = engine.generate([text], SamplingParams(max_tokens=count, temperature=0))
    return "".join(event.text for event in events)


@pytest.fixture(scope="module")
def original(engine: Engine) -> float:
    """The perplexity of the weights that the files are made of."""
    return perplexity(engine, PARAGRAPH)


@pytest.mark.long
@pytest.mark.parametrize("file_type", FILE_TYPES)
def test_quantised_by_llama_cpp(file_type: str, tmp_path: Path, original: float) -> None:
    """Every dequantised tensor is ggml's, the logits are llama.cpp's, and the engine answers."""
    path = tmp_path / "m.gguf"
    task = {"task": "quantize", "source": str(smollm2_gguf()), "target": str(path)}
    pure = file_type in PURE
    assert ask([task | {"type": file_type, "pure": pure}], tmp_path) == [{"code": 0}]
    assert file_type.removesuffix("_M") in check_tensors(path, tmp_path)
    loaded = load(ModelFiles.from_directory(path), device="cpu")
    prompts = [loaded.tokenizer.encode(text) for text in (QUESTION, "Water boils")]
    (answer,) = ask([{"task": "logits", "model": str(path), "prompts": prompts}], tmp_path)
    limit, worse = FILE_TYPES[file_type]
    for prompt, expected in zip(prompts, answer["logits"], strict=True):
        got = np.array(loaded.model(mx.array([prompt]))[0, -1])
        assert distance(got, np.array(expected)) < limit
    packed = load(ModelFiles.from_directory(path), device="cpu", dense=False)
    logits = np.array(packed.model(mx.array(prompts[:1]))[0, -1])
    assert distance(logits, np.array(loaded.model(mx.array(prompts[:1]))[0, -1])) < 1e-3
    path.unlink()
    del packed
    served = Engine(loaded, EngineConfig(device="cpu", max_num_seqs=2, max_model_len=256))
    text = answer_to(served, QUESTION, 12)
    assert perplexity(served, PARAGRAPH) < worse * original
    if (
        file_type in PURE
    ):  # a model of this size forgets capitals in 3 bits; it still writes English
        assert len(text.split()) > 3
    else:
        assert " Paris" in text


def check_tensors(path: Path, work: Path) -> set[str]:
    """Compare one tensor of every type with what ggml makes of it; return the types."""
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
    return set(kinds)
