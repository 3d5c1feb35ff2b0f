"""EAGLE-3 heads: their files, what they draft, and that outputs stay the same."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

from modelpack.errors import ModelpackError
from modelpack_engine.config import EngineConfig
from modelpack_engine.core.buckets import FEW
from modelpack_engine.core.sequence import Sequence
from modelpack_engine.engine import Engine
from modelpack_engine.errors import EngineError, ModelLoadError
from modelpack_engine.models import ModelFiles
from modelpack_engine.models.eagle import EagleHead, HeadConfig, load_head, read_head_config
from modelpack_engine.outputs import RequestEvent
from modelpack_engine.runner import kv_cache_size
from modelpack_engine.runner.paged import PagedRunner
from modelpack_engine.speculation import acceptance
from modelpack_engine.speculation.acceptance import HeadWithLookup
from modelpack_engine.speculation.eagle import EagleProposer, _Followed
from modelpack_engine.speculation.ngram import NgramProposer
from tests.engine.serving.tiny import VOCAB, tiny_engine, tiny_loaded
from tests.engine.speculation.test_draft import LONG, PROMPTS, ask_all
from tests.engine.speculation.test_same_output import check_same

DRAFT_VOCAB = 100
PUBLISHED: dict[str, Any] = {
    "architectures": ["LlamaForCausalLMEagle3"], "model_type": "llama", "hidden_size": 64,
    "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2,
    "num_hidden_layers": 1, "vocab_size": VOCAB, "draft_vocab_size": DRAFT_VOCAB,
    "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "max_position_embeddings": 256,
    "eagle_config": {"eagle_aux_hidden_state_layer_ids": [0, 0, 1]},
}  # fmt: skip


def random_head(**changed: Any) -> EagleHead:
    head = EagleHead(replace(read_head_config(PUBLISHED), **changed))
    mx.random.seed(5)
    flat: Any = tree_flatten(head.parameters())
    head.load_weights(
        [
            (name, 1 + 0.1 * noise if value.ndim == 1 else noise / value.shape[-1] ** 0.5)
            for name, value in flat
            if name != "d2t"
            for noise in [mx.random.normal(value.shape)]
        ],
        strict=False,
    )
    head.d2t = mx.arange(head.config.draft_vocab_size)  # token 2i for i
    mx.eval(head.parameters())
    return head


def write_head(
    directory: Path,
    config: Mapping[str, Any] = PUBLISHED,
    tensors: Mapping[str, mx.array] | None = None,
) -> ModelFiles:
    """Write a head as published ones are; `tensors` replaces those of `random_head`."""
    flat: Any = tree_flatten(random_head().parameters())
    arrays = dict(flat) | {"t2d": mx.zeros((VOCAB,), mx.bool_)} if tensors is None else tensors
    (directory / "config.json").write_text(json.dumps(config))
    mx.save_safetensors(str(directory / "model.safetensors"), dict(arrays))
    return ModelFiles.from_directory(directory)


def engine_with(head: EagleHead | None, **given: Any) -> Engine:
    common: dict[str, Any] = {
        "device": "cpu", "max_num_seqs": 8, "max_num_batched_tokens": 32, "draft_model": "head",
        "speculative_disable_by_batch_size": 8, "self_test": False, "backend": "mlx",
    }  # fmt: skip
    return Engine(tiny_loaded(), EngineConfig(**common | given), draft=head)


def proposer_of(engine: Engine) -> HeadWithLookup:
    assert engine._speculator is not None
    made = engine._speculator._proposer
    assert isinstance(made, HeadWithLookup)
    return made


def head_of(engine: Engine) -> EagleProposer:
    head = proposer_of(engine).head
    assert isinstance(head, EagleProposer)
    return head


@pytest.fixture(scope="module")
def plain() -> list[list[RequestEvent]]:
    return ask_all(tiny_engine())


@pytest.fixture(params=["exact", "bucketed"])
def shapes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "bucketed":
        monkeypatch.setattr(kv_cache_size, "EXACT", FEW)
        monkeypatch.setattr(PagedRunner, "writes_in_place", property(lambda self: True))


def expected_drafts(head: EagleHead, tokens: list[int], count: int) -> list[int]:
    """Return what a head drafts after `tokens`, with the model and the head run from the start."""
    inner: Any = tiny_loaded().model.model
    hidden, inputs = inner.embed_tokens(mx.array([tokens[:-1]])), []
    for layer in inner.layers:
        inputs.append(hidden)
        hidden = layer(hidden, "causal", None)
    inputs.append(hidden)
    layers = head.config.layers_of(len(inner.layers))
    rows = head.fc(mx.concatenate([inputs[layer][0] for layer in layers], axis=-1))
    ids, drafted = list(tokens[1:]), list[int]()
    for _ in range(count):
        total = len(ids)
        residual, q, k, v = head.project(rows, inner.embed_tokens(mx.array(ids)), mx.arange(total))
        k, v = (mx.repeat(array, 2, axis=1) for array in (k, v))
        scores = mx.einsum("qhd,khd->hqk", q, k) * head.scale
        causal = mx.arange(total)[None] <= mx.arange(total)[:, None]
        weights = mx.softmax(mx.where(causal, scores, -1e9), axis=-1)
        after = head.finish(residual, mx.einsum("hqk,khd->qhd", weights, v).reshape(total, -1))
        best: Any = mx.argmax(head.logits(after)[-1]).item()
        distance: Any = head.d2t[best].item()
        drafted.append(best + distance)
        ids.append(drafted[-1])
        rows = mx.concatenate([rows, after[-1:]])
    return drafted


@pytest.mark.sample(1)
@pytest.mark.usefixtures("shapes")
@pytest.mark.parametrize("lookups", [False, True])
def test_the_head_drafts_from_the_models_own_hidden_states(
    monkeypatch: pytest.MonkeyPatch, lookups: bool
) -> None:
    """Whatever was rejected before, the drafts are those of a head that read the whole text."""
    monkeypatch.setattr(acceptance, "_LEAST_ACCEPTED", -1.0)
    calls = itertools.count()

    def guess(self: NgramProposer, lengths: Mapping[Sequence, int]) -> Any:
        """Propose wrong tokens in two steps of three."""
        return {seq: [0] * 5 for seq in lengths} if next(calls) % 3 else {}

    if lookups:
        monkeypatch.setattr(NgramProposer, "propose", guess)
        monkeypatch.setattr(NgramProposer, "expected", lambda self, sequence: 5.0)
    seen: list[tuple[list[int], list[int]]] = []
    propose = EagleProposer.propose

    def noted(self: EagleProposer, lengths: Mapping[Sequence, int]) -> Any:
        found = propose(self, lengths)
        seen.extend((s.token_ids(0, s.num_known_tokens), t) for s, t in found.items())
        return found

    monkeypatch.setattr(EagleProposer, "propose", noted)
    head = random_head()
    engine = engine_with(head, enable_prefix_caching=False, num_speculative_tokens=4)
    engine.generate(PROMPTS[:2], replace(LONG, max_tokens=24 if lookups else 12))
    assert len(seen) > 10
    for tokens, drafted in seen:
        assert drafted == expected_drafts(random_head(), tokens, len(drafted))
    assert max(len(drafted) for _, drafted in seen) == 4


@pytest.mark.long
@pytest.mark.usefixtures("shapes")
@pytest.mark.parametrize("given", [{}, {"num_speculative_tokens": 6}, {"max_num_seqs": 2}])
def test_outputs_are_the_same_with_any_head(
    plain: list[list[RequestEvent]], given: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(acceptance, "_LEAST_ACCEPTED", -1.0)
    engine = engine_with(random_head(), **given)
    for _ in range(2):  # the second time, the head does not see the prompts' cached blocks
        for found, expected in zip(ask_all(engine), plain, strict=True):
            check_same(expected, found)
    assert engine.stats().proposed_tokens > 100
    engine.step()
    assert not proposer_of(engine)._scores
    head = head_of(engine)
    assert not head._drafts
    assert sorted(head._regions) == list(range(head._max_sequences))
    assert head._runner._pools.keys.size == 0


def test_drafts_of_a_head_are_compiled_at_the_start(
    shapes: None, plain: list[list[RequestEvent]]
) -> None:
    engine = engine_with(random_head())
    head = head_of(engine)
    assert engine._speculator is not None
    engine._speculator.warm_up()
    compiled = set(head._runner._graphs)
    assert head._runner._pools.keys.size == 0
    [found] = engine.generate([PROMPTS[0]], LONG)
    check_same(plain[0], found)
    assert engine.stats().num_proposals
    assert set(head._runner._graphs) == compiled


def test_a_head_that_is_mostly_wrong_pauses() -> None:
    engine = engine_with(random_head())
    engine.generate([PROMPTS[0]], replace(LONG, max_tokens=100))
    stats = engine.stats()
    assert 3 <= stats.num_proposals < 30
    assert stats.generated_tokens == 100


def test_rows_of_rejected_tokens_are_dropped() -> None:
    """Three steps without a draft: a proposal of 4 of which 2 are accepted, then one row each."""
    draft = _Followed(region=0)
    for index, (start, count) in enumerate([(10, 5), (13, 1), (14, 1)]):
        draft.add(start, mx.arange(100 * index, 100 * index + count)[:, None])
    found = draft.take(known=16)
    assert found is not None
    assert found[0] == [10, 11, 12, 13, 14]
    assert found[1][:, 0].tolist() == [0, 1, 2, 100, 200]


def test_unsure_tokens_are_not_proposed() -> None:
    engine = engine_with(random_head(), speculative_min_acceptance=0.99)
    engine.generate([PROMPTS[0]], LONG)
    assert head_of(engine)._drafts
    assert all(not score.drafted for score in proposer_of(engine)._scores.values())


def test_more_sequences_than_pay_run_without(plain: list[list[RequestEvent]]) -> None:
    engine = engine_with(random_head(), speculative_disable_by_batch_size=0)
    for found, expected in zip(ask_all(engine), plain, strict=True):
        check_same(expected, found)
    assert engine.stats().num_proposals == 0


SPECULATORS = {
    "architectures": ["Eagle3Speculator"], "speculators_model_type": "eagle3",
    "draft_vocab_size": DRAFT_VOCAB, "target_hidden_size": 64, "norm_before_residual": True,
    "eagle_aux_hidden_state_layer_ids": [1, 1, 2],
    "transformer_layer_config": {
        name: value for name, value in PUBLISHED.items()
        if name not in ("architectures", "eagle_config", "draft_vocab_size")
    },
}  # fmt: skip


def test_published_formats_are_read(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir()
    two.mkdir()
    head = load_head(write_head(one))
    assert head.config == HeadConfig(
        64, 64, 96, 4, 2, 16, VOCAB, DRAFT_VOCAB, max_position_embeddings=256, layers=(1, 1, 2)
    )
    flat: Any = tree_flatten(random_head().parameters())
    renamed = {name.replace("midlayer.", "layers.0."): array for name, array in flat}
    renamed["embed_tokens.weight"] = mx.ones((VOCAB, 64))
    other = load_head(write_head(two, SPECULATORS, renamed))
    assert other.config == replace(head.config, norm_before_residual=True)
    assert "embed_tokens" in other
    assert mx.array_equal(other.fc.weight, head.fc.weight)


def without(name: str) -> dict[str, mx.array]:
    flat: Any = tree_flatten(random_head().parameters())
    return {key: array for key, array in flat if key != name}


@pytest.mark.parametrize(
    ("config", "tensors", "says"),
    [
        ({"architectures": ["LlamaForCausalLM"]}, None, "is not that of an EAGLE-3 head"),
        ({"hidden_size": 0}, None, "hidden_size is '0', expected a size"),
        ({"hidden_size": 1 << 40}, None, "hidden_size is"),
        ({"num_hidden_layers": 2}, None, "num_hidden_layers is not 1"),
        ({"num_key_value_heads": 3}, None, "cannot share 3 key heads"),
        ({"eagle_aux_hidden_state_layer_ids": [1, 2]}, None, "expected three layers"),
        ({"draft_vocab_size": 99}, None, r"lm_head.weight is \[100, 64\], expected \[99, 64\]"),
        ({}, without("fc.weight"), "has no tensor fc.weight"),
        (
            {},
            {**without(""), "norm.weight": mx.ones((64,), mx.uint8)},
            "norm.weight is stored as uint8",
        ),
        ({}, {**without(""), "d2t": mx.full((DRAFT_VOCAB,), 200)}, "tokens outside of its vocab"),
        ({}, {**without(""), "layers.1.mlp": mx.zeros((1,))}, "an unknown tensor: layers.1.mlp"),
    ],
)
def test_bad_heads(
    tmp_path: Path, config: dict[str, Any], tensors: dict[str, mx.array] | None, says: str
) -> None:
    files = write_head(tmp_path, {**PUBLISHED, **config}, tensors)
    with pytest.raises(ModelLoadError, match=says):
        load_head(files)


def test_a_truncated_head(tmp_path: Path) -> None:
    files = write_head(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ModelpackError, match=r"model\.safetensors"):
        load_head(files)


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"target_hidden_size": 32}, "hidden states of 32, this model has 64"),
        ({"vocab_size": 300}, "a vocabulary of 300 tokens, this model has 257"),
        ({"hidden_size": 32}, "no embeddings of its own size, 32"),
        ({"layers": (1, 2, 9)}, "reads layers 1, 2, 9, but the model has 2"),
    ],
)
def test_heads_of_other_models(changed: dict[str, Any], says: str) -> None:
    with pytest.raises(EngineError, match=says) as caught:
        engine_with(random_head(**changed))
    assert caught.value.hint


def test_eagle3_requires_a_head() -> None:
    with pytest.raises(EngineError, match="no EAGLE-3 head is loaded"):
        engine_with(None, speculative_method="eagle3")


def test_a_runner_without_hidden_states_notes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_METAL_USE_PAGED_ATTENTION", "0")
    monkeypatch.setattr("modelpack_engine.runner.fallback.FallbackRunner.can_go_back", True)
    engine = engine_with(random_head())
    assert any("hands out no hidden states for the EAGLE head" in note for note in engine.notes)
    assert engine._speculator is None
