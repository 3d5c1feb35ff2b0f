"""If llama.cpp is installed: recompute its recorded results, quantise with it, and compare."""

from __future__ import annotations

from pathlib import Path
from random import Random

import gguf
import numpy as np
import pytest

from modelpack_engine.models import gguf_blocks
from modelpack_engine.models.gguf_file import GGUFTensor
from modelpack_engine.models.gguf_tokenizer import PRE_TOKENIZERS
from tests.engine.loaders.blocks import random_blocks
from tests.engine.loaders.corpus import PIECES, TEXTS
from tests.engine.loaders.llama_cpp_peer import ask
from tests.engine.loaders.test_architectures import distance
from tests.engine.loaders.test_tokenizers import ANSWERS, BYTE_LEVEL, SIMPLIFIED, read
from tests.engine.loaders.tiny_models import PREDICTING, PROMPT, TINY_MODELS
from tests.engine.loaders.vocabularies import Vocabulary, golden, write_vocabulary

pytestmark = pytest.mark.peer("llama-cpp-python")


@pytest.mark.long
def test_recorded_token_ids(tmp_path: Path) -> None:
    vocabulary = Vocabulary.read("uncut")
    files = [write_vocabulary(tmp_path / f"{n}.gguf", vocabulary, pre=n) for n in BYTE_LEVEL]
    tasks = [{"task": "tokenize", "model": str(file), "texts": list(TEXTS)} for file in files]
    assert dict(zip(BYTE_LEVEL, ask(tasks, tmp_path), strict=True)) == {
        name: ANSWERS[name] for name in BYTE_LEVEL
    }


# The ranges of scripts in these patterns contain spaces, which llama.cpp takes out.
_WITH_SPACES = ("deepseek-llm", "deepseek-coder")


@pytest.mark.long
def test_ids_of_random_texts(tmp_path: Path) -> None:
    random = Random(1)
    texts = ["".join(random.choices(PIECES, k=8)) for _ in range(100)]
    vocabulary = Vocabulary.of_parts(texts, longest=10)
    exact = [name for name in BYTE_LEVEL if name not in {*SIMPLIFIED, *_WITH_SPACES}]
    names = {PRE_TOKENIZERS[name]: name for name in exact}.values()
    files = [write_vocabulary(tmp_path / f"{name}.gguf", vocabulary, pre=name) for name in names]
    tasks = [{"task": "tokenize", "model": str(file), "texts": texts} for file in files]
    for file, answer in zip(files, ask(tasks, tmp_path), strict=True):
        tokenizer = read(file)
        for text, ids in zip(texts, answer["ids"], strict=True):
            assert tokenizer.encode(text, add_special_tokens=False) == ids, (file.stem, text)


@pytest.mark.long
def test_recorded_logits(tmp_path: Path) -> None:
    files = {name: tiny.write(tmp_path / f"{name}.gguf") for name, tiny in TINY_MODELS.items()}
    tasks = [{"task": "logits", "model": str(f), "prompts": [PROMPT]} for f in files.values()]
    for name, answer in zip(files, ask(tasks, tmp_path), strict=True):
        assert distance(np.array(answer["logits"][0]), golden("logits")[name]) < 1e-6


@pytest.mark.long
def test_recorded_predictions(tmp_path: Path) -> None:
    files = [TINY_MODELS[name].write_predicting(tmp_path / f"{name}.gguf") for name in PREDICTING]
    tasks = [{"task": "predict", "model": str(file), "prompt": PROMPT} for file in files]
    for name, answer in zip(PREDICTING, ask(tasks, tmp_path), strict=True):
        assert distance(np.array(answer["logits"]), golden("predictions")[name]) < 1e-6


@pytest.mark.long
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
