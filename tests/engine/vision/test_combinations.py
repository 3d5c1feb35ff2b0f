"""Pictures together with other features of the engine: each leaves the tokens as they are."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from modelpack.formats.adapter import Adapter, read_adapter
from modelpack_engine.config import EngineConfig
from modelpack_engine.engine import Engine
from modelpack_engine.models import LoadedModel
from modelpack_engine.models.eagle import EagleHead, read_head_config
from tests.adapters import write_peft
from tests.engine.adapters.test_zoo import linears
from tests.engine.vision import tiny
from tests.engine.vision.tiny import KINDS, kinds, picture, request, run

pytestmark = pytest.mark.long

ONE, TWO = picture(1), picture(2, 31, 17)
TEXT, COUNT = "<image> and <image>: which one?", 24


def engine_of(kind: str, draft: LoadedModel | EagleHead | None, **given: Any) -> Engine:
    common: dict[str, Any] = {
        "device": "cpu", "max_num_seqs": 4, "max_num_batched_tokens": 48,
        "speculative_disable_by_batch_size": 4, "self_test": False, "block_size": 8,
    }  # fmt: skip
    return Engine(tiny.tiny_loaded(kind), EngineConfig(**common | given), draft=draft)


def head() -> EagleHead:
    """Return a random EAGLE-3 head for the tiny models."""
    config = {
        **tiny.config_of("llava")["text_config"], "architectures": ["LlamaForCausalLMEagle3"],
        "num_hidden_layers": 1, "draft_vocab_size": 100,
        "eagle_config": {"eagle_aux_hidden_state_layer_ids": [0, 0, 1]},
    }  # fmt: skip
    made = EagleHead(read_head_config(config))
    mx.random.seed(5)
    flat: Any = tree_flatten(made.parameters())
    made.load_weights(
        [
            (name, mx.random.normal(value.shape) / value.shape[-1] ** 0.5)
            for name, value in flat
            if name != "d2t"
        ],
        strict=False,
    )
    made.d2t = mx.arange(100)
    mx.eval(made.parameters())
    return made


@pytest.mark.parametrize(
    ("method", "kind"),
    [
        ("ngram", "llava"),
        ("draft", "llava"),
        ("eagle", "llava"),
        ("draft", "qwen2_vl"),
        ("draft", "gemma3"),
        ("draft", "mllama"),
    ],
)
def test_speculation(method: str, kind: str) -> None:
    """A draft model sees the tokens of a picture and not the picture; what it proposes is checked.

    A request without pictures is in the same batch.
    """
    draft: Any = {"ngram": None, "draft": tiny.tiny_loaded(kind), "eagle": head()}[method]
    named = {"draft_model": method} if method == "eagle" else {"speculative_method": method}
    engine = engine_of(kind, draft, **named)
    made = [
        request(engine, TEXT, [ONE, TWO], COUNT), request(engine, "hello hello hello", [], COUNT)
    ]  # fmt: skip
    expected = [
        tiny.expected(kind, TEXT, [ONE, TWO], COUNT),
        tiny.expected(kind, "hello hello hello", [], COUNT),
    ]
    assert run(engine, *made) == expected
    assert run(engine, *made) == expected  # from the prefix cache
    assert engine._speculator is not None


@pytest.mark.parametrize("kind", kinds(*KINDS))
def test_prompt_logprobs(kind: str) -> None:
    """Each token of the prompt has one, those that stand for pictures too, in chunks or not."""
    found = []
    for rows in (256, 24):
        engine = tiny.tiny_engine(kind, max_num_batched_tokens=rows)
        made = request(engine, "<image>What is it?", [ONE])
        params = replace(made.params, prompt_logprobs=1, max_tokens=1)
        engine.add_request("one", replace(made, params=params))
        [event] = [event for _ in range(99) if engine.has_work for event in engine.step()]
        assert event.prompt_logprobs is not None
        assert len(event.prompt_logprobs) == len(made.prompt_token_ids)
        assert event.prompt_logprobs[0] is None
        values = [entry.logprob for entry in event.prompt_logprobs[1:] if entry is not None]
        assert all(math.isfinite(value) and value <= 0 for value in values)
        found.append(values)
    assert np.allclose(*found, atol=1e-4)


def adapter(engine: Engine, model: Any, directory: Path) -> Adapter:
    targets = linears(model)
    return read_adapter(write_peft(directory, targets, rank=2, seed=1, size=0.3))


def test_adapters(tmp_path: Path) -> None:
    """They change the answer about a picture, and share no prefixes with the plain model."""
    loaded = tiny.tiny_loaded("llava")
    config = EngineConfig(
        device="cpu", max_num_seqs=4, max_num_batched_tokens=64, max_loras=1, block_size=8
    )
    engine = Engine(loaded, config)
    engine.add_adapter("one", adapter(engine, loaded.model, tmp_path / "one"), "digest of one")
    plain = request(engine, "<image>What is it?", [ONE])
    expected = tiny.expected("llava", "<image>What is it?", [ONE])
    with_adapter = replace(plain, adapter="one")
    [first] = run(engine, plain)
    cached = engine.stats().cached_tokens
    [second] = run(engine, with_adapter)
    assert engine.stats().cached_tokens == cached
    assert (first, second != expected) == (expected, True)
    assert run(engine, plain, with_adapter) == [expected, second]
    assert engine.vision is not None
    assert engine.vision.encoder.misses == 1  # the vision tower has no adapters


def test_two_owners_in_one_batch() -> None:
    """Owners with the same picture get the same tokens, and share neither blocks nor embeddings."""
    engine = tiny.tiny_engine("idefics3", block_size=8)
    assert engine.vision is not None
    made = [
        request(engine, "<image>What?", [ONE], owner=owner, cache_salt=owner)
        for owner in (b"a", b"b")
    ]
    expected = tiny.expected("idefics3", "<image>What?", [ONE])
    assert run(engine, *made) == [expected, expected]
    assert engine.stats().cached_tokens == 0
    assert engine.vision.encoder.misses == 2


def test_a_request_that_is_aborted_between_its_pictures() -> None:
    engine = tiny.tiny_engine("llava", max_num_batched_tokens=24, block_size=8)
    assert engine.vision is not None
    memory = engine.vision.processor.memory
    engine.add_request("gone", request(engine, TEXT, [ONE, TWO]))
    engine.step()
    assert engine.vision.encoder.misses == 1
    engine.abort("gone")
    while engine.has_work:
        engine.step()
    assert engine.vision.encoder.misses == 1
    assert engine.stats().blocks_used == 0
    assert run(engine, request(engine, TEXT, [ONE, TWO])) == [
        tiny.expected("llava", TEXT, [ONE, TWO])
    ]
    run(engine, request(engine, "hello", []))  # the engine holds its last step
    assert memory.nbytes == 0
