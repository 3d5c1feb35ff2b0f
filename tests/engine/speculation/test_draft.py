"""Draft models: their proposals, their KV cache, and which models can be draft models."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import mlx.core as mx
import pytest
from mlx.utils import tree_map

from modelpack_engine.config import EngineConfig
from modelpack_engine.core.buckets import FEW
from modelpack_engine.core.sequence import Sequence
from modelpack_engine.engine import Engine
from modelpack_engine.errors import EngineError
from modelpack_engine.models import LoadedModel
from modelpack_engine.outputs import RequestEvent
from modelpack_engine.request import EngineRequest, SamplingParams
from modelpack_engine.runner import kv_cache_size
from modelpack_engine.runner.paged import PagedRunner
from modelpack_engine.speculation.draft import DraftProposer
from tests.engine.serving.test_bad_logits import PoisonedEmbedding
from tests.engine.serving.tiny import VOCAB, tiny_engine, tiny_loaded
from tests.engine.speculation.test_same_output import check_same, run

pytestmark = pytest.mark.long

LONG = SamplingParams(max_tokens=40, temperature=0, ignore_eos=True)
PROMPTS = [
    [(7 * n + i * i) % 256 for i in range(length)] for n, length in enumerate((3, 70, 9, 33))
]
SAMPLED = [
    LONG,
    replace(LONG, temperature=0.8, seed=3, logprobs=1),
    replace(LONG, temperature=1.2, top_p=0.9, seed=4),
    replace(LONG, temperature=0.3, seed=5, repetition_penalty=1.2, frequency_penalty=0.3),
]


def noisy(amount: float, vocab: int = VOCAB) -> LoadedModel:
    """Return the tiny model with `amount` of noise in its weights, and `vocab` logits."""
    loaded = tiny_loaded()
    mx.random.seed(2)
    loaded.model.update(
        tree_map(
            lambda weight: weight + amount * mx.random.normal(weight.shape) * weight.abs().mean(),
            loaded.model.parameters(),
        )
    )
    if vocab != VOCAB:
        weight = loaded.model.model.embed_tokens.weight
        more = mx.concatenate([weight, 9 * weight[: max(vocab - VOCAB, 0)]])
        loaded.model.model.embed_tokens.weight = more[:vocab]
    return loaded


def engine_with(draft: LoadedModel, **given: Any) -> Engine:
    common: dict[str, Any] = {
        "device": "cpu", "max_num_seqs": 8, "max_num_batched_tokens": 32,
        "speculative_method": "draft", "speculative_disable_by_batch_size": 8, "self_test": False,
    }  # fmt: skip
    return Engine(tiny_loaded(), EngineConfig(**common | given), draft=draft)


def proposer(engine: Engine) -> DraftProposer:
    assert engine._speculator is not None
    made = engine._speculator._proposer
    assert isinstance(made, DraftProposer)
    return made


def ask_all(engine: Engine) -> list[list[RequestEvent]]:
    for number, (prompt, params) in enumerate(zip(PROMPTS, SAMPLED, strict=True)):
        engine.add_request(str(number), EngineRequest(prompt, params))
    found = run(engine, [], {})
    return [found[str(number), 0] for number in range(len(PROMPTS))]


@pytest.fixture(scope="module")
def plain() -> list[list[RequestEvent]]:
    return ask_all(tiny_engine())


@pytest.fixture(params=["exact", "bucketed"])
def shapes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "bucketed":
        monkeypatch.setattr(kv_cache_size, "EXACT", FEW)
        monkeypatch.setattr(PagedRunner, "writes_in_place", property(lambda self: True))


@pytest.mark.usefixtures("shapes")
@pytest.mark.parametrize(
    ("amount", "vocab", "least"),
    [(0, VOCAB, 1.0), (0.05, VOCAB, 0.3), (2, VOCAB, 0), (0, 300, 0), (0, 200, 0)],
)
def test_outputs_are_the_same_whatever_the_draft_model_thinks(
    plain: list[list[RequestEvent]], amount: float, vocab: int, least: float
) -> None:
    engine = engine_with(noisy(amount, vocab))
    for _ in range(2):  # the second time, the prompts are in the draft model's prefix cache
        for found, expected in zip(ask_all(engine), plain, strict=True):
            check_same(expected, found)
    stats = engine.stats()
    assert stats.accepted_tokens >= 0.9 * least * stats.proposed_tokens
    assert stats.proposed_tokens > 50
    engine.step()
    assert proposer(engine)._drafts == {}
    assert proposer(engine)._blocks.num_used == 0


def test_the_same_model_is_right_at_any_temperature() -> None:
    """The draft model draws with the same noise, so all its proposals are accepted."""
    engine = engine_with(noisy(0))
    wild = replace(LONG, temperature=1.5, seed=1)
    engine.generate([PROMPTS[0]], wild)
    stats = engine.stats()
    assert stats.accepted_tokens == stats.proposed_tokens > 25
    assert stats.num_steps < 12


def test_a_draft_with_a_small_cache_gives_up_the_oldest(plain: list[list[RequestEvent]]) -> None:
    engine = engine_with(noisy(0.05))
    blocks = proposer(engine)._blocks
    taken = [blocks.pool.allocate() for _ in range(blocks.num_available - 8)]
    for found, expected in zip(ask_all(engine), plain, strict=True):
        check_same(expected, found)
    assert engine.stats().proposed_tokens > 0
    engine.step()
    assert blocks.num_used == len(taken)


def test_nothing_is_proposed_past_the_draft_models_context(
    plain: list[list[RequestEvent]],
) -> None:
    engine = engine_with(replace(noisy(0), context_length=20))
    for found, expected in zip(ask_all(engine), plain, strict=True):
        check_same(expected, found)
        usage, start = found[-1].usage, found[0].usage
        assert start is None
        assert usage is not None
        assert usage.accepted_tokens <= max(0, 20 - usage.prompt_tokens)


def test_unsure_guesses_are_not_made(plain: list[list[RequestEvent]]) -> None:
    sure = engine_with(noisy(0.05), speculative_min_acceptance=0.9)
    any_ = engine_with(noisy(0.05))
    for engine in (sure, any_):
        for found, expected in zip(ask_all(engine), plain, strict=True):
            check_same(expected, found)
    assert sure.stats().proposed_tokens < any_.stats().proposed_tokens


def test_a_draft_that_is_no_number_is_dropped(plain: list[list[RequestEvent]]) -> None:
    draft = noisy(0)
    embedding = PoisonedEmbedding(VOCAB, 64)
    embedding.weight = draft.model.model.embed_tokens.weight
    draft.model.model.embed_tokens = embedding
    engine = engine_with(draft)
    poisoned = [[250, 1, 2], *PROMPTS]
    clean = tiny_engine().generate(poisoned, LONG)
    for found, expected in zip(engine.generate(poisoned, LONG), clean, strict=True):
        check_same(expected, found)
    assert engine.stats().accepted_tokens > 0


def test_a_draft_shares_prefixes_by_salt() -> None:
    engine = engine_with(noisy(0))
    blocks = proposer(engine)._blocks
    share_prefix, shared = blocks.share_prefix, list[int]()

    def noted(sequence: Sequence) -> int:
        shared.append(share_prefix(sequence))
        return shared[-1]

    blocks.share_prefix = noted  # type: ignore[method-assign]
    prompt = list(range(1, 50))
    for number, salt in enumerate([b"", b"one", b"two", b"one", b""]):
        engine.add_request(str(number), EngineRequest(prompt, LONG, cache_salt=salt))
        run(engine, [], {})
    assert engine.stats().proposed_tokens > 0
    assert shared == [0, 0, 0, 48, 48]


def test_more_sequences_than_pay_run_without(plain: list[list[RequestEvent]]) -> None:
    engine = engine_with(noisy(0), speculative_disable_by_batch_size=0)
    for found, expected in zip(ask_all(engine), plain, strict=True):
        check_same(expected, found)
    assert engine.stats().num_proposals == 0


def other_words(letters: str) -> LoadedModel:
    """Return a draft model whose tokenizer has other tokens."""
    import tokenizers

    from modelpack_engine.models import Tokenizer
    from modelpack_engine.models.tokenizer import TokenText

    backend = tokenizers.Tokenizer(
        tokenizers.models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[])
    )
    tokenizer = Tokenizer(backend, text=TokenText.BYTE_LEVEL, eos_token_ids=[0])
    return replace(tiny_loaded(), tokenizer=tokenizer)


@pytest.mark.parametrize(
    ("draft", "says"),
    [
        (None, "no draft model is loaded"),
        (other_words("".join(random.Random(1).sample("abcdefgh", 8))), "another vocabulary: token"),
        (other_words("!"), "1 tokens in the draft model, 257 in the main model"),
    ],
)
def test_models_that_cannot_draft(draft: LoadedModel | None, says: str) -> None:
    with pytest.raises(EngineError, match=says) as caught:
        Engine(tiny_loaded(), EngineConfig(device="cpu", speculative_method="draft"), draft=draft)
    assert caught.value.hint


def test_a_closed_engine_leaves_the_draft_model_as_it_was() -> None:
    draft = noisy(0)
    before = [type(module) for module in draft.model.modules()]
    engine = engine_with(draft)
    assert [type(module) for module in draft.model.modules()] != before
    engine.close()
    assert [type(module) for module in draft.model.modules()] == before


def test_a_draft_without_its_model_named_means_draft() -> None:
    assert EngineConfig(draft_model="x").speculation == "draft"
    assert EngineConfig(draft_model="x", speculative_method="ngram").speculation == "ngram"
    assert EngineConfig().speculation is None


def test_the_draft_models_cache_is_counted() -> None:
    alone, both = tiny_engine(), engine_with(noisy(0))
    assert both.memory_bytes > alone.memory_bytes
    limited = engine_with(noisy(0), kv_cache_bytes=1 << 17, max_num_seqs=2)
    own = limited._runner.pools()
    others = proposer(limited)._runner.pools()
    assert sum(pool.nbytes for pool in own + others) <= 1 << 17


@pytest.mark.parametrize("method", ["ngram", "draft"])
def test_state_that_cannot_go_back_does_without(
    plain: list[list[RequestEvent]], monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    monkeypatch.setattr(PagedRunner, "can_go_back", property(lambda self: False))
    engine = engine_with(noisy(0), speculative_method=method)
    assert any("no speculation" in note for note in engine.notes)
    for found, expected in zip(ask_all(engine), plain, strict=True):
        check_same(expected, found)
    assert engine.stats().proposed_tokens == 0
