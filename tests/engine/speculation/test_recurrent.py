"""Speculation with recurrent state: the state returns to the last accepted token."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType

import mlx.core as mx
import mlx.nn as nn
import pytest

from modelpack_engine.config import EngineConfig
from modelpack_engine.core.sequence import Sequence
from modelpack_engine.engine import Engine
from modelpack_engine.errors import EngineError
from modelpack_engine.models import LoadedModel
from modelpack_engine.models.eagle import EagleHead, HeadConfig
from modelpack_engine.request import EngineRequest, SamplingParams
from modelpack_engine.runner.adapted import _Pieces
from modelpack_engine.runner.hidden_states import embeddings_of
from modelpack_engine.runner.model_layout import find_layout
from modelpack_engine.runner.recurrent import StateRows
from modelpack_engine.speculation import acceptance
from modelpack_engine.speculation.draft import DraftProposer
from modelpack_engine.speculation.speculator import _state_rows
from tests.engine.serving.tiny import tiny_tokenizer
from tests.engine.speculation.oracle import Oracle, speculate
from tests.engine.speculation.test_same_output import Events, check_same, shapes, tokens
from tests.engine.zoo.configuration import VOCABULARY, Configuration
from tests.engine.zoo.recurrent import RECURRENT

pytestmark = pytest.mark.long

__all__ = ["shapes"]  # a fixture

GREEDY = SamplingParams(max_tokens=24, temperature=0, ignore_eos=True)
SEEDED = SamplingParams(max_tokens=24, temperature=0.9, seed=3, ignore_eos=True)
SOME = [c for c in RECURRENT if c.id in {"mamba2", "qwen3_next", "falcon_h1", "lfm2"}]


#: So few tokens that a response repeats itself, and that models often agree.
FEW = {65: 40.0, 66: 40.0, 67: 40.0}


def loaded_of(model: nn.Module) -> LoadedModel:
    config = {"vocab_size": VOCABULARY}
    return LoadedModel(model, config, tiny_tokenizer(), "tiny", 256, (), 0)


def engine_of(model: nn.Module, draft: LoadedModel | None = None, **given: object) -> Engine:
    settings = {"max_num_seqs": 8, "max_num_batched_tokens": 32, "device": "cpu"} | given
    return Engine(loaded_of(model), EngineConfig(**settings), draft=draft)  # type: ignore[arg-type]


def drafting(model: nn.Module, draft: LoadedModel) -> Engine:
    return engine_of(model, draft, speculative_method="draft", speculative_disable_by_batch_size=8)


def ask(
    engine: Engine,
    max_tokens: int = 24,
    logit_bias: Mapping[int, float] = MappingProxyType({}),
    *,
    late: int = 0,
) -> Events:
    """Run four requests, the last two `late` steps after the others."""
    waiting: list[tuple[str, EngineRequest]] = []
    for number, params in enumerate([GREEDY, SEEDED, replace(GREEDY, logprobs=2), SEEDED]):
        prompt = [number + 1, 2, 3, 4, 2, 3, 4, 2, 3][: 4 + number]
        params = replace(params, max_tokens=max_tokens - number, logit_bias=logit_bias)
        waiting.append((str(number), EngineRequest(prompt, params)))
    found: Events = {}
    steps = 0
    while engine.has_work or waiting:
        count = 4 if steps == late else 2 if steps == 0 else 0
        for name, request in waiting[:count]:
            engine.add_request(name, request)
        del waiting[:count]
        for event in engine.step():
            found.setdefault((event.request_id, event.index), []).append(event)
        steps += 1
    return found


def check_all(plain: Events, found: Events) -> None:
    assert found.keys() == plain.keys()
    for key, expected in plain.items():
        check_same(expected, found[key])


@pytest.mark.usefixtures("shapes")
@pytest.mark.parametrize(
    "configuration", [c for c in RECURRENT if c not in SOME], ids=lambda c: c.id
)
def test_outputs_of_all_architectures(configuration: Configuration) -> None:
    check_outputs(configuration, 0.4)


@pytest.mark.usefixtures("shapes")
@pytest.mark.parametrize(
    "wrong", [0.4, *(pytest.param(share, marks=pytest.mark.long) for share in (0.0, 1.0))]
)
@pytest.mark.parametrize("configuration", SOME, ids=lambda c: c.id)
def test_outputs_are_the_same(configuration: Configuration, wrong: float) -> None:
    check_outputs(configuration, wrong)


def check_outputs(configuration: Configuration, wrong: float) -> None:
    model = configuration.build()
    plain = ask(engine_of(model))
    engine = engine_of(model)
    answers = {key: tokens(events) for key, events in plain.items()}
    speculate(engine, Oracle(answers, wrong=wrong, wrong_tokens=range(VOCABULARY)))
    check_all(plain, ask(engine))
    assert engine.stats().proposed_tokens
    assert wrong == 1.0 or engine.stats().accepted_tokens


@pytest.mark.usefixtures("shapes")
@pytest.mark.parametrize("configuration", SOME, ids=lambda c: c.id)
def test_outputs_are_the_same_with_an_eagle_head(
    configuration: Configuration, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(acceptance, "_LEAST_ACCEPTED", -1.0)
    model = configuration.build()
    plain = ask(engine_of(model))
    layout = find_layout(model)
    size = embeddings_of(layout.inner)(mx.array([0])).shape[-1]
    config = HeadConfig(size, size, 32, 4, 2, 8, VOCABULARY, VOCABULARY, layers=(1, 1, 2))
    mx.random.seed(3)
    loaded = loaded_of(model)
    given = EngineConfig(
        max_num_seqs=8, max_num_batched_tokens=32, device="cpu", draft_model="head",
        speculative_disable_by_batch_size=8,
    )  # fmt: skip
    engine = Engine(loaded, given, draft=EagleHead(config))
    check_all(plain, ask(engine))
    assert engine.stats().proposed_tokens > 40


@pytest.mark.usefixtures("shapes")
@pytest.mark.parametrize("configuration", SOME, ids=lambda c: c.id)
def test_outputs_are_the_same_with_a_draft_model(
    configuration: Configuration, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The draft is a plain transformer: it is often wrong, and the state goes back."""
    monkeypatch.setattr(acceptance, "_LEAST_ACCEPTED", -1.0)
    model = configuration.build()
    plain = ask(engine_of(model), 60, FEW)
    draft = loaded_of(Configuration("llama", {"num_hidden_layers": 1}).build())
    engine = drafting(model, draft)
    assert find_layout(model).recurrent
    assert not [note for note in engine.notes if "no speculation" in note]
    for _ in range(2):  # the second time, from the prefix caches of both models
        check_all(plain, ask(engine, 60, FEW))
    stats = engine.stats()
    assert 20 < stats.accepted_tokens < stats.proposed_tokens - 20


#: Draft models with layers of attention, and those without.
DRAFTS = [c for c in SOME if c.id != "mamba2"]


@pytest.mark.usefixtures("shapes")
@pytest.mark.parametrize("configuration", DRAFTS, ids=lambda c: c.id)
@pytest.mark.parametrize("of_target", [True, False], ids=["itself", "another model's"])
def test_a_recurrent_draft_model(
    configuration: Configuration, of_target: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It goes back to its state before the guesses. A model that drafts for itself is right."""
    monkeypatch.setattr(acceptance, "_LEAST_ACCEPTED", -1.0)
    target = configuration if of_target else Configuration("llama", {"num_hidden_layers": 1})
    model = target.build()
    plain = ask(engine_of(model), 60, FEW)
    draft = loaded_of(configuration.build())
    engine = drafting(model, draft)
    assert find_layout(draft.model).recurrent
    assert not [note for note in engine.notes if "no speculation" in note]
    for _ in range(2):
        check_all(plain, ask(engine, 60, FEW))
    stats = engine.stats()
    if of_target:
        assert stats.accepted_tokens == stats.proposed_tokens > 100
    else:
        assert 20 < stats.accepted_tokens < stats.proposed_tokens - 20
    engine.step()
    assert engine._speculator is not None
    made = engine._speculator._proposer
    assert isinstance(made, DraftProposer)
    assert made._recurrent is not None
    assert made._recurrent.rows.rows == {}


@pytest.mark.usefixtures("shapes")
@pytest.mark.parametrize("configuration", DRAFTS, ids=lambda c: c.id)
@pytest.mark.parametrize("goes_back", [True, False])
def test_a_draft_model_is_right_after_wrong_guesses(
    configuration: Configuration, goes_back: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each second proposal has a wrong token; all others are accepted as the state goes back."""
    monkeypatch.setattr(acceptance, "_LEAST_ACCEPTED", -1.0)
    real, calls, right, most = DraftProposer.propose, 0, 0, 0
    finish, totals = StateRows.finish, dict[int, list[int]]()

    def finished(self: StateRows) -> None:
        totals.setdefault(id(self), []).append(self.next_total)
        finish(self)

    monkeypatch.setattr(StateRows, "finish", finished)

    def propose(
        self: DraftProposer, lengths: Mapping[Sequence, int]
    ) -> Mapping[Sequence, list[int]]:
        nonlocal calls, right, most
        found = real(self, lengths)
        assert self._recurrent is not None
        most = max(most, *totals.pop(id(self._recurrent.rows)))
        calls += 1
        for tokens_ in found.values():
            if calls % 2 and len(tokens_) > 1:
                tokens_[1] = (tokens_[1] + 1) % 60
                right += 1
            else:
                right += len(tokens_)
        return found

    monkeypatch.setattr(DraftProposer, "propose", propose)
    if not goes_back:
        monkeypatch.setattr(StateRows, "go_back", lambda self, seq_id: None)
    model = configuration.build()
    plain = ask(engine_of(model), 60)
    engine = drafting(model, loaded_of(configuration.build()))
    check_all(plain, ask(engine, 60))
    stats = engine.stats()
    assert stats.proposed_tokens > right > 50
    assert 12 < most <= _state_rows(engine.config)
    assert (stats.accepted_tokens >= right - 8) == goes_back  # the last ones may be cut off


@pytest.mark.parametrize("configuration", DRAFTS, ids=lambda c: c.id)
def test_a_draft_that_fails_leaves_no_states(
    configuration: Configuration, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next draft does not compute the failed step again."""
    model = configuration.build()
    plain = ask(engine_of(model), 60)
    engine = drafting(model, loaded_of(configuration.build()))
    assert engine._speculator is not None
    made = engine._speculator._proposer
    assert isinstance(made, DraftProposer)
    assert made._recurrent is not None
    compute = made._compute

    def fail(arrays: list[mx.array]) -> None:
        raise RuntimeError("no memory")

    with monkeypatch.context() as patch:
        patch.setattr(made, "_compute", fail)
        with pytest.raises(RuntimeError, match="no memory"):
            ask(engine, 60)
    assert made._compute == compute
    assert made._recurrent.rows.rows == {}
    assert all(array is None for state in made._recurrent.states for array in state.arrays)
    engine.fail_all("no memory")
    check_all(plain, ask(engine, 60))


def test_a_draft_model_without_attention() -> None:
    [configuration] = [c for c in SOME if c.id == "mamba2"]
    with pytest.raises(EngineError, match="cannot be a draft model: it has no layers with att"):
        engine_of(
            configuration.build(), loaded_of(configuration.build()), speculative_method="draft"
        )


def test_embeddings_of_another_name() -> None:
    with pytest.raises(EngineError, match="embeddings are not where"):
        embeddings_of(nn.Linear(2, 2))


@pytest.mark.usefixtures("shapes")
@pytest.mark.parametrize("configuration", SOME, ids=lambda c: c.id)
def test_prompts_that_come_during_speculation(
    configuration: Configuration, monkeypatch: pytest.MonkeyPatch
) -> None:
    both = 0
    real = _Pieces._run_together

    def run(self: _Pieces, mask_position: int) -> mx.array:
        nonlocal both
        both += any(piece.follows for piece in self.pieces)
        return real(self, mask_position)

    monkeypatch.setattr(_Pieces, "_run_together", run)
    model = configuration.build()
    plain = ask(engine_of(model), 60, late=5)
    engine = engine_of(model, max_num_batched_tokens=128)
    answers = {key: tokens(events) for key, events in plain.items()}
    speculate(engine, Oracle(answers, wrong=0.4, wrong_tokens=range(VOCABULARY)))
    check_all(plain, ask(engine, 60, late=5))
    assert both


@pytest.mark.usefixtures("shapes")
def test_preemption_and_the_prefix_cache() -> None:
    model = next(c for c in SOME if c.id == "qwen3_next").build()
    roomy = engine_of(model)
    plain = ask(roomy, 90)
    per_block = roomy.kv_cache_bytes // roomy._sizes.num_blocks
    engine = engine_of(model, kv_cache_bytes=18 * per_block)
    answers = {key: tokens(events) for key, events in plain.items()}
    speculate(engine, Oracle(answers, wrong=0.3, wrong_tokens=range(VOCABULARY)))
    check_all(plain, ask(engine, 90))
    assert engine.stats().num_preemptions
    check_all(plain, ask(engine, 90))  # from the prefix cache


def test_prompt_lookup() -> None:
    model = next(c for c in SOME if c.id == "lfm2").build()
    plain = ask(engine_of(model), 60, FEW)
    engine = engine_of(model, speculative_method="ngram")
    check_all(plain, ask(engine, 60, FEW))
    assert not [note for note in engine.notes if "no speculation" in note]
    assert engine.stats().proposed_tokens
