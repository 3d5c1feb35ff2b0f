"""A request with NaN logits fails alone, without effect on others or on its blocks' next users."""

from __future__ import annotations

import random

import mlx.core as mx
import mlx.nn as nn
import pytest

from modelpack_engine.config import EngineConfig
from modelpack_engine.engine import Engine
from modelpack_engine.models import LoadedModel
from modelpack_engine.outputs import FinishReason, RequestEvent
from modelpack_engine.request import EngineRequest, SamplingParams
from tests.engine.launching import WAYS, launch
from tests.engine.serving.tiny import (
    CONTEXT,
    VOCAB,
    reference_tokens,
    tiny_model,
    tiny_tokenizer,
)

POISON = 250  # the self-test's tokens are below 241
GREEDY = SamplingParams(max_tokens=12, temperature=0, ignore_eos=True)


class PoisonedEmbedding(nn.Embedding):  # type: ignore[misc]
    """An embedding with NaN for one token; as the output layer it has no NaN."""

    def __call__(self, ids: mx.array) -> mx.array:
        found = super().__call__(ids)
        return mx.where((ids == POISON)[..., None], mx.array(mx.nan), found)


def poisoned_engine() -> Engine:
    model = tiny_model()
    embedding = PoisonedEmbedding(VOCAB, 64)
    embedding.weight = model.model.embed_tokens.weight
    model.model.embed_tokens = embedding
    loaded = LoadedModel(model, {"vocab_size": VOCAB}, tiny_tokenizer(), "llama", CONTEXT, (), 0)
    # Blocks for one long and one short request: the next long one gets the blocks of the bad one.
    per_token = 2 * 2 * 2 * 16 * 4
    config = EngineConfig(
        device="cpu", max_num_seqs=4, max_num_batched_tokens=32, max_model_len=64,
        kv_cache_bytes=8 * 16 * per_token,
    )  # fmt: skip
    return Engine(loaded, config)


@pytest.fixture(autouse=True, params=WAYS)
def launches(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    launch(request.param, monkeypatch)


@pytest.mark.sample(1)
def test_a_poisoned_prompt_fails_alone() -> None:
    engine = poisoned_engine()
    assert engine._runner.tier == "paged"
    good, bad = [1, 2, 3], [*range(10, 40), POISON, *range(40, 50)]
    found: dict[str, list[RequestEvent]] = {"good": [], "bad": []}
    engine.add_request("good", EngineRequest(good, GREEDY))
    engine.add_request("bad", EngineRequest(bad, GREEDY))
    while engine.has_work:
        for event in engine.step():
            found[event.request_id].append(event)
    assert [t for event in found["good"] for t in event.token_ids] == reference_tokens(good, 12)
    last = found["bad"][-1]
    assert last.finish_reason is FinishReason.ERROR
    assert "not numbers" in (last.error or "")
    assert engine.stats().blocks_used == 0
    # The same blocks, and the same prefix up to the NaN.
    for prompt in ([*range(60, 100)], bad[:30], [*bad[:16], *range(100, 120)]):
        [events] = engine.generate([prompt], GREEDY)
        assert [t for e in events for t in e.token_ids] == reference_tokens(prompt, 12)
        assert engine.stats().blocks_used == 0


def test_a_neighbour_keeps_the_blocks_that_it_shares() -> None:
    engine = poisoned_engine()
    prefix = [*range(10, 26)]
    sound = [*prefix, 1, 2]
    found: dict[str, list[RequestEvent]] = {"sound": [], "bad": []}
    engine.add_request("sound", EngineRequest(sound, GREEDY))
    for _ in range(3):
        for event in engine.step():
            found[event.request_id].append(event)
    engine.add_request("bad", EngineRequest([*prefix, POISON, 3], GREEDY))
    while engine.has_work:
        for event in engine.step():
            found[event.request_id].append(event)
    assert engine.stats().cached_tokens == 16
    assert found["bad"][-1].finish_reason is FinishReason.ERROR
    assert [t for event in found["sound"] for t in event.token_ids] == reference_tokens(sound, 12)
    assert engine.stats().blocks_used == 0


@pytest.mark.parametrize("seed", range(3))
def test_an_aborted_prompt_leaves_nothing_in_its_blocks(seed: int) -> None:
    """It has written NaN, and no token of it was ever sampled."""
    chooser, prompts = random.Random(seed), list[list[int]]()
    while len(prompts) < 16:
        first = chooser.randrange(1, 190)
        prompt = [*range(first, first + chooser.choice((1, 3, 9, 17, 21, 33, 40, 47, 5)))]
        if POISON not in (*prompt, *reference_tokens(prompt, 12)):
            prompts.append(prompt)
    engine = poisoned_engine()
    engine.add_request("bad", EngineRequest([POISON, *range(10, 61)], GREEDY))
    engine.step()
    engine.abort("bad")
    for prompt, events in zip(prompts, engine.generate(prompts, GREEDY), strict=True):
        assert [t for e in events for t in e.token_ids] == reference_tokens(prompt, 12)
