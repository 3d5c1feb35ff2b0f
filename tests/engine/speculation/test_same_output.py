"""Speculation changes neither the tokens, text and ends of a request nor its probabilities."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from modelpack_engine.core.block_manager import BlockManager
from modelpack_engine.core.buckets import FEW
from modelpack_engine.core.sequence import Sequence
from modelpack_engine.engine import Engine
from modelpack_engine.outputs import FinishReason, RequestEvent
from modelpack_engine.request import EngineRequest, SamplingParams
from modelpack_engine.runner import kv_cache_size
from modelpack_engine.runner.paged import PagedRunner
from tests.engine.serving.test_bad_logits import POISON, poisoned_engine
from tests.engine.serving.tiny import VOCAB, tiny_engine
from tests.engine.speculation.oracle import Oracle, speculate
from tests.engine.structured.test_engine_masks import MASKS, Breaks

Events = dict[tuple[str, int], list[RequestEvent]]
_KV = 2 * 2 * 2 * 16 * 4  # bytes of a token of the tiny model


@dataclass(frozen=True)
class Asked:
    """A request, and the step before which it arrives."""

    prompt: list[int]
    params: SamplingParams
    n: int
    arrives: int


def sampling() -> st.SearchStrategy[SamplingParams]:
    plain = st.builds(
        SamplingParams,
        max_tokens=st.integers(1, 24),
        temperature=st.sampled_from([0.0, 0.0, 0.4, 1.2]),
        top_k=st.sampled_from([0, 0, 5]),
        top_p=st.sampled_from([1.0, 1.0, 0.8]),
        min_p=st.sampled_from([0.0, 0.05]),
        repetition_penalty=st.sampled_from([1.0, 1.0, 1.3]),
        presence_penalty=st.sampled_from([0.0, 0.5]),
        frequency_penalty=st.sampled_from([0.0, -0.4]),
        logit_bias=st.sampled_from([{}, {}, {65: 4.0, 66: -100.0}]),
        seed=st.integers(0, 5),
        logprobs=st.sampled_from([None, 0, 2]),
        prompt_logprobs=st.sampled_from([None, None, 1]),
        stop=st.sampled_from([(), (), ("a", "e", "zq")]),
        stop_token_ids=st.sampled_from([(), range(0, VOCAB, 9)]),
        ignore_eos=st.booleans(),
    ).flatmap(
        lambda params: st.integers(0, params.max_tokens).map(
            lambda least: replace(params, min_tokens=least)
        )
    )
    masked = st.builds(
        SamplingParams,
        max_tokens=st.integers(1, 30),
        temperature=st.sampled_from([0.0, 1.5]),
        seed=st.integers(0, 5),
        frequency_penalty=st.sampled_from([0.0, 0.5]),
        mask=st.sampled_from([*MASKS, Breaks]),
    )
    return st.one_of(plain, plain, masked)


BASE = [(7 * i * i + 3 * i) % 256 for i in range(80)]
requests = st.lists(
    st.builds(
        lambda cut, tail, params, n, arrives: Asked(BASE[:cut] + tail, params, n, arrives),
        cut=st.sampled_from([0, 5, 33, 64]),
        tail=st.lists(st.integers(0, 255), min_size=1, max_size=6),
        params=sampling(),
        n=st.sampled_from([1, 1, 2]),
        arrives=st.integers(0, 12),
    ),
    min_size=1,
    max_size=5,
)


def run(engine: Engine, asked: list[Asked], aborts: Mapping[int, int]) -> Events:
    """Return all events; request `aborts[step]` is aborted before that step."""
    found: Events = {}
    waiting = dict(enumerate(asked))
    step = 0
    while waiting or engine.has_work:
        for number, one in list(waiting.items()):
            if one.arrives <= step:
                del waiting[number]
                engine.add_request(str(number), EngineRequest(one.prompt, one.params, n=one.n))
        events = engine.abort(str(aborts[step])) if step in aborts else []
        for event in events + engine.step():
            found.setdefault((event.request_id, event.index), []).append(event)
        step += 1
    assert engine.stats().blocks_used == 0
    return found


def tokens(events: list[RequestEvent]) -> list[int]:
    return [token for event in events for token in event.token_ids]


def check_same(plain: list[RequestEvent], found: list[RequestEvent]) -> None:
    assert tokens(found) == tokens(plain)
    assert "".join(event.text for event in found) == "".join(event.text for event in plain)
    ends = [(e[-1].finish_reason, e[-1].stop_reason, e[-1].error) for e in (found, plain)]
    assert ends[0] == ends[1]
    assert [event.finished for event in found].count(True) == 1
    usage, expected = found[-1].usage, plain[-1].usage
    assert usage is not None
    assert expected is not None
    assert usage.completion_tokens == expected.completion_tokens
    for ours, theirs in zip(found, plain, strict=True):
        for field in ("logprobs", "prompt_logprobs"):
            a, b = getattr(ours, field), getattr(theirs, field)
            assert (a is None) == (b is None)
            for one, other in zip(a or (), b or (), strict=True):
                assert (one is None) == (other is None)
                if one is not None:
                    assert one.token_id == other.token_id
                    assert one.logprob == pytest.approx(other.logprob, abs=1e-4)
                    assert len(one.top) == len(other.top)


@pytest.fixture(autouse=True, params=["exact", "bucketed"])
def shapes(request: pytest.FixtureRequest) -> Iterator[None]:
    """Proposals as chunks, and launches as on a CPU; or as padded rows, and launches as on GPUs."""
    with pytest.MonkeyPatch.context() as patch:
        bucketed = request.param == "bucketed"
        if bucketed:
            patch.setattr(kv_cache_size, "EXACT", FEW)
        patch.setattr(PagedRunner, "writes_in_place", property(lambda self: bucketed))
        published = BlockManager.publish_prefix

        def within_known(self: BlockManager, sequence: Sequence) -> None:
            published(self, sequence)
            assert sequence.num_computed_tokens <= sequence.num_known_tokens
            full = sequence.num_known_tokens // self.block_size
            assert sequence.num_published_blocks <= full

        patch.setattr(BlockManager, "publish_prefix", within_known)
        yield


drawn: dict[str, st.SearchStrategy[Any]] = {
    "asked": requests,
    "wrong": st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    "silent": st.sampled_from([0.0, 0.4]),
    "num_tokens": st.integers(1, 9),
    "max_batch": st.sampled_from([2, 64]),
    "caching": st.booleans(),
    "blocks": st.sampled_from([16, 24, 200]),
    "seed": st.integers(0, 99),
}


@pytest.mark.sample(1)
@given(**drawn)
@settings(max_examples=6, deadline=None)
def test_nothing_changes_whatever_is_proposed(**drawn: Any) -> None:
    check_nothing_changes(**drawn)


@pytest.mark.long
@given(**drawn)
@settings(max_examples=30, deadline=None)
def test_nothing_changes_in_many_more_cases(**drawn: Any) -> None:
    check_nothing_changes(**drawn)


def check_nothing_changes(
    asked: list[Asked],
    wrong: float,
    silent: float,
    num_tokens: int,
    max_batch: int,
    caching: bool,
    blocks: int,
    seed: int,
) -> None:
    common = {"enable_prefix_caching": caching, "self_test": False}
    plain = run(tiny_engine(**common), asked, {})
    engine = tiny_engine(**common, kv_cache_bytes=blocks * 16 * _KV)
    answers = {key: tokens(events) for key, events in plain.items()}
    speculate(engine, Oracle(answers, seed=seed, wrong=wrong, silent=silent), num_tokens, max_batch)
    found = run(engine, asked, {})
    assert found.keys() == plain.keys()
    for key, events in plain.items():
        check_same(events, found[key])
    # The prefix cache is correct afterwards: other requests continue from it.
    again = [
        Asked((one.prompt + answers[str(i), 0])[:200], GREEDY, 1, 0) for i, one in enumerate(asked)
    ]
    fresh = tiny_engine(enable_prefix_caching=False, self_test=False)
    after, expected = run(engine, again, {}), run(fresh, again, {})
    for key, events in expected.items():
        assert tokens(after[key]) == tokens(events)


GREEDY = SamplingParams(max_tokens=8, temperature=0, ignore_eos=True)
LONG = SamplingParams(max_tokens=40, temperature=0, ignore_eos=True)


def test_right_guesses_save_steps_and_are_counted() -> None:
    [plain] = tiny_engine().generate([[1, 2, 3]], LONG)
    engine = tiny_engine()
    speculate(engine, Oracle({("generate-0", 0): tokens(plain)}), num_tokens=4)
    [found] = engine.generate([[1, 2, 3]], LONG)
    check_same(plain, found)
    stats = engine.stats()
    # One step for the prompt, and 39 tokens in steps of five.
    assert stats.num_steps == 1 + 8
    assert (stats.num_proposals, stats.proposed_tokens, stats.accepted_tokens) == (8, 31, 31)
    usage = found[-1].usage
    assert usage is not None
    assert (usage.accepted_tokens, usage.rejected_tokens) == (31, 0)


def test_wrong_guesses_cost_no_more_than_rows() -> None:
    [plain] = tiny_engine().generate([[1, 2, 3]], LONG)
    engine = tiny_engine()
    never = next(token for token in range(VOCAB) if token not in tokens(plain))
    speculate(engine, Oracle({}, wrong=1, wrong_tokens=[never]), num_tokens=4)
    [found] = engine.generate([[1, 2, 3]], LONG)
    check_same(plain, found)
    stats = engine.stats()
    assert stats.num_steps == 40
    assert stats.accepted_tokens == 0
    assert stats.proposed_tokens == 4 + 37  # it is shorter after the first, and none at the end
    usage = found[-1].usage
    assert usage is not None
    assert (usage.accepted_tokens, usage.rejected_tokens) == (0, 41)


def test_many_sequences_decode_without_guesses_and_ahead() -> None:
    prompts = [[n, 2, 3] for n in range(5)]
    plain = tiny_engine().generate(prompts, LONG)
    engine = tiny_engine(max_num_batched_tokens=128)  # all prompts in one step
    answers = {(f"generate-{i}", 0): tokens(events) for i, events in enumerate(plain)}
    speculate(engine, Oracle(answers), num_tokens=4, max_batch=4)
    found = engine.generate(prompts, LONG)
    for events, expected in zip(found, plain, strict=True):
        check_same(expected, events)
    assert engine.stats().num_proposals == 0


@pytest.mark.sample(1)
@pytest.mark.parametrize("step", range(2, 12, 3))
def test_an_abort_amid_a_proposal_leaves_nothing_behind(step: int) -> None:
    asked = [Asked([n, 2, 3], LONG, 2, 0) for n in range(3)]
    plain = run(tiny_engine(), asked, {})
    engine = tiny_engine()
    answers = {key: tokens(events) for key, events in plain.items()}
    oracle = Oracle(answers, wrong=0.2)
    speculate(engine, oracle)
    found = run(engine, asked, {step: 1})
    for key, events in found.items():
        if key[0] == "1":
            assert events[-1].finish_reason is FinishReason.ABORT
            assert tokens(events) == answers[key][: len(tokens(events))]
        else:
            check_same(plain[key], events)
    engine.step()
    assert len(oracle.released) == len(set(oracle.released)) >= 5  # one may never have run


def test_a_step_that_fails_fails_what_was_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    [plain] = tiny_engine().generate([[1, 2, 3]], LONG)
    engine = tiny_engine()
    speculate(engine, Oracle({("r", 0): tokens(plain), ("s", 0): tokens(plain)}))
    engine.add_request("r", EngineRequest([1, 2, 3], LONG))
    for _ in range(4):
        engine.step()
    with monkeypatch.context() as patch:
        patch.setattr("modelpack_engine.engine.read_step", lambda step: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            engine.step()
    [event] = engine.fail_all("it broke")
    assert event.finish_reason is FinishReason.ERROR
    found = run(engine, [], {})
    assert not found
    engine.add_request("s", EngineRequest([1, 2, 3], LONG))
    check_same(plain, run(engine, [], {})["s", 0])


def test_a_guess_that_is_no_number_spoils_nothing() -> None:
    """NaN keys and values of a rejected token reach neither its sequence nor the next one."""
    params = replace(LONG, max_tokens=30, logit_bias={POISON: -100})
    asked = [Asked([n, 2, 3], params, 1, 0) for n in range(3)]
    plain = run(poisoned_engine(), asked, {})
    assert all(POISON not in tokens(events) for events in plain.values())
    engine = poisoned_engine()
    answers = {key: tokens(events) for key, events in plain.items()}
    oracle = Oracle(answers, wrong=0.1, wrong_tokens=[POISON])
    speculate(engine, oracle)
    for _ in range(2):
        found = run(engine, asked, {})
        for key, events in plain.items():
            check_same(events, found[key])
    assert engine.stats().proposed_tokens > engine.stats().accepted_tokens > 0
