"""Drafting by a head stops where steps with drafts take longer than they save."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from modelpack_engine.core.scheduler import SchedulerOutput
from modelpack_engine.engine import Engine
from modelpack_engine.speculation import acceptance
from modelpack_engine.speculation.acceptance import HeadWithLookup, StepTimes, _Score
from modelpack_engine.speculation.ngram import NgramProposer
from tests.engine.speculation.test_draft import LONG, PROMPTS
from tests.engine.speculation.test_mtp import engine_of, markov_head, target

pytestmark = pytest.mark.usefixtures("measured_steps")


@pytest.mark.parametrize(
    ("plain", "drafting", "least"),
    [
        ([], [], 0.4),
        ([1.0] * 5, [], 0.4),
        ([], [2.0] * 4, 0.4),
        ([1.0] * 5, [2.0] * 3, 0.4),
        ([1.0] * 5, [1.3] * 4, 0.3),
        ([1.0] * 5, [3.5] * 4, 2.5),
        ([1.0] * 5, [0.9] * 4, 0.1),  # noise: drafts are never free
        ([1.0] * 5, [90.0, 1.5, 1.5, 1.5], 0.5),  # the first step with drafts is compiled
        ([5.0] * 5 + [1.0] * 9, [1.5] * 9, 0.5),  # the newest steps count
    ],
)
def test_the_fewest_accepted_tokens(
    plain: list[float], drafting: list[float], least: float
) -> None:
    times = StepTimes()
    for drafts, found in ((False, plain), (True, drafting)):
        for seconds in found:
            times.observe(4, seconds, drafts=drafts)
    assert times.least_accepted(4) == pytest.approx(least)
    assert times.least_accepted(7) == pytest.approx(least)  # sizes of 4 to 7
    assert times.least_accepted(8) == times.least_accepted(3) == 0.4


def test_steps_without_drafts_are_measured_first_and_again() -> None:
    times = StepTimes()
    for _ in range(2):
        for _ in range(5):
            assert times.needs_plain_step(2)
            times.observe(2, 1.0, drafts=False)
        for _ in range(512):
            assert not times.needs_plain_step(2)
            times.observe(2, 1.0, drafts=True)
    assert times.needs_plain_step(2)
    assert times.needs_plain_step(1)


def test_prompts_do_not_keep_drafts_away() -> None:
    times = StepTimes()
    for _ in range(5):
        assert times.needs_plain_step(1)
        times.observe(1, None, drafts=False)
    assert not times.needs_plain_step(1)
    for _ in range(4):
        times.observe(1, 5.0, drafts=True)
    assert times.least_accepted(1) == 0.4


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Engine:
    """Return an engine whose head is always right, without lookups."""
    monkeypatch.setattr(NgramProposer, "propose", lambda self, lengths: {})
    monkeypatch.setattr(NgramProposer, "expects", lambda self, sequences: False)
    model = target("mimo", markov=True)
    return engine_of(model, "mimo", markov_head(model, "mimo"), num_speculative_tokens=3)


def timed(
    cost: float, seen: list[bool]
) -> Callable[[HeadWithLookup, SchedulerOutput, float], None]:
    """Return a `stepped` to which steps with proposals take `cost` times those without."""
    stepped = HeadWithLookup.stepped

    def call(self: HeadWithLookup, output: SchedulerOutput, seconds: float) -> None:
        assert seconds > 0
        if not output.prefill:
            seen.append(bool(output.proposals))
        stepped(self, output, cost if output.proposals else 1.0)

    return call


@pytest.mark.sample(1)
@pytest.mark.parametrize(("cost", "drafts"), [(1.2, True), (3.5, True), (6.0, False)])
@pytest.mark.parametrize("together", [1, 3])
def test_a_head_that_costs_more_than_it_saves_pauses(
    engine: Engine, cost: float, drafts: bool, together: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each draft has three tokens, all right: it pays if its step takes less than four others."""
    seen: list[bool] = []
    monkeypatch.setattr(HeadWithLookup, "stepped", timed(cost, seen))
    params = replace(LONG, max_tokens=90)
    found = engine.generate(PROMPTS[:1] * together, params)
    without = engine_of(target("mimo", markov=True), "mimo", None).generate(PROMPTS[:1], params)
    expected = [event.token_ids for event in without[0]]
    for events in found:
        assert sum((e.token_ids for e in events), ()) == sum(expected, ())
    assert seen[:5] == [False] * 5
    measured = seen[5 : 5 + acceptance._PAUSE]
    fewest = acceptance._FEWEST_DRAFTS
    assert sum(measured) > 12 if drafts else fewest <= sum(measured) <= fewest + 1


def scored(right: list[int], usual: float = 2.0) -> list[float]:
    """Return the averages of a sequence after each of its drafts of four tokens."""
    score, tokens, found = _Score(usual), [0], []
    sequence: Any = SimpleNamespace(
        num_known_tokens=1, token_ids=lambda start, end: tokens[start:end]
    )
    score.settle(sequence)
    for count in right:
        score.drafted = [1] * 4
        new = [*[1] * count, 2]
        expected = score.expected_after(new)
        tokens += new
        sequence.num_known_tokens = len(tokens)
        assert score.settle(sequence) == count
        assert score.head == expected
        assert score.expected_after([1]) == expected, "there is no draft"
        found.append(score.head)
    assert score.drafts == len(right)
    return found


def test_few_wrong_drafts_say_little() -> None:
    """A head whose next token is right in 63 of 100 places goes on where 0.57 tokens pay."""
    chooser, fewest = random.Random(5), acceptance._FEWEST_DRAFTS
    for _ in range(200):
        right = [next((n for n in range(4) if chooser.random() > 0.63), 4) for _ in range(160)]
        assert min(scored(right)[fewest - 1 :]) > 0.57
    assert scored([0] * 11)[-1] < 0.57
    assert scored([4] * 8, usual=0.5)[-1] > 2.5


def test_a_pause_ends_after_some_steps() -> None:
    """Steps count, proposed for or not: while a head pauses, the next step is built ahead."""
    sequence: Any = SimpleNamespace(
        seq_id=7, num_known_tokens=1, token_ids=lambda start, end: [0] * (end - start)
    )
    head: Any = SimpleNamespace(expects=lambda sequences: bool(list(sequences)))
    lookup: Any = SimpleNamespace(expects=lambda sequences: False)
    proposer = HeadWithLookup(lookup, head, 4)
    output: Any = SimpleNamespace(decoding=(sequence,), sampled=(sequence,), proposals=())
    output.prefill = ()
    for _ in range(5):
        proposer.stepped(output, 1.0)
    assert proposer.expects([sequence])
    proposer._score(sequence).pause = 3
    for _ in range(3):
        assert not proposer.expects([sequence])
        proposer.stepped(output, 1.0)
    assert proposer.expects([sequence])
