"""SmolLM2 with its real weights, loaded from GGUF; `tests/engine/real` generates with it."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.generate import generate_step

from modelpack.testing.weights import smollm2_gguf
from modelpack_engine.models import LoadedModel, ModelFiles, load
from tests.engine.loaders.corpus import PROMPTS
from tests.engine.loaders.test_architectures import distance
from tests.engine.loaders.test_tokenizers import ANSWERS, check
from tests.engine.loaders.vocabularies import golden
from tests.engine.real.export import CONFIG

pytestmark = pytest.mark.weights

NUM_TOKENS = 8


def greedy(model: Any, prompts: list[list[int]]) -> list[list[int]]:
    """Return the tokens that mlx-lm itself generates."""
    return [
        [int(token) for token, _ in generate_step(mx.array(prompt), model, max_tokens=NUM_TOKENS)]
        for prompt in prompts
    ]


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return load(ModelFiles.from_directory(smollm2_gguf()), device="cpu")


@pytest.fixture(scope="module")
def prompts(loaded: LoadedModel) -> list[list[int]]:
    return [loaded.tokenizer.encode(prompt) for prompt in PROMPTS]


def test_metadata(loaded: LoadedModel) -> None:
    assert (loaded.architecture, loaded.context_length) == ("llama", 8192)
    assert loaded.weight_bytes == 538_060_032  # 134,515,008 parameters in float32
    assert loaded.notes == ()
    assert {key: loaded.config[key] for key in CONFIG if key in loaded.config} == {
        key: pytest.approx(value, 1e-6) if isinstance(value, float) else value
        for key, value in CONFIG.items()
        if key in loaded.config
    }


def test_token_ids_are_those_of_llama_cpp(loaded: LoadedModel) -> None:
    check(loaded.tokenizer, ANSWERS["smollm2"])


def test_chat_template(loaded: LoadedModel) -> None:
    text = loaded.tokenizer.render_chat([{"role": "user", "content": "Hi"}])
    assert text.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    ids = loaded.tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}])
    assert loaded.tokenizer.decode(ids, skip_special_tokens=False) == text
    assert ids.count(1) == 3


def test_logits_are_close_to_those_of_llama_cpp(
    loaded: LoadedModel, prompts: list[list[int]]
) -> None:
    """Close, not equal: llama.cpp rounds activations to 8 bits for its integer products."""
    answer = golden("smollm2")
    assert prompts == answer["prompts"]
    for prompt, expected in zip(prompts, answer["logits"], strict=True):
        got = np.array(loaded.model(mx.array([prompt]))[0, -1, ::32])
        assert distance(got, expected) < 0.002


def test_first_tokens_are_llama_cpps(loaded: LoadedModel, prompts: list[list[int]]) -> None:
    """Nearly all tokens are equal; the two may differ where logits are nearly equal."""
    firsts = [tokens[0] for tokens in golden("smollm2")["greedy"]]
    got = [int(mx.argmax(loaded.model(mx.array([prompt]))[0, -1])) for prompt in prompts]
    assert sum(a == b for a, b in zip(got, firsts, strict=True)) >= len(prompts) - 1


@pytest.mark.long
def test_packed_gguf_gives_the_same_tokens(loaded: LoadedModel, prompts: list[list[int]]) -> None:
    packed = load(ModelFiles.from_directory(smollm2_gguf()), device="cpu", dense=False)
    assert packed.weight_bytes < 120_000_000
    assert greedy(packed.model, prompts[:2]) == greedy(loaded.model, prompts[:2])
