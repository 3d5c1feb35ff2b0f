"""Prompt lookup proposes the tokens that followed an earlier match."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
from hypothesis import given

from modelpack_engine.core.sequence import Sequence
from modelpack_engine.request import SamplingParams
from modelpack_engine.speculation.ngram import (
    CPU_COST,
    GPU_COST,
    MatchRates,
    NgramIndex,
    NgramProposer,
    StepCost,
)

FREE = StepCost(0.0, 0.0)


@pytest.mark.parametrize(
    ("text", "length", "expected"),
    [
        ("abcdeXabc", 2, "de"),
        ("abcdeXabc", 9, "deXabcdeX"),  # the match repeats
        ("ab", 5, ""),
        ("abc", 5, ""),
        ("abcXbc", 5, ""),  # two tokens are too few
        ("aaaa", 3, "aaa"),
        ("zabcPabcQabc", 1, "Q"),  # the latest of equal matches
        ("zabcPabcQzabc", 1, "P"),  # a longer match is better
        ("zabcPabcQzabc", 0, ""),
    ],
)
def test_what_followed_is_proposed(text: str, length: int, expected: str) -> None:
    index = NgramIndex(3)
    index.extend([ord(letter) for letter in text])
    match = index.match()
    assert "".join(map(chr, index.after(match, length) if match else [])) == expected


@given(
    st.lists(st.integers(0, 2), max_size=40),
    st.lists(st.integers(0, 40), max_size=5),
    st.integers(1, 4),
)
def test_an_index_that_grows_finds_what_one_made_at_once_does(
    text: list[int], cuts: list[int], size: int
) -> None:
    whole, growing = NgramIndex(size), NgramIndex(size)
    whole.extend(text)
    for start, stop in zip([0, *sorted(cuts)], [*sorted(cuts), 40], strict=True):
        growing.extend(text[start:stop])
    assert growing.token_ids == text
    assert growing.match() == whole.match()
    match = whole.match()
    if match is None:
        ends = [tuple(text[i : i + size]) for i in range(len(text) - size)]
        assert tuple(text[-size:]) not in ends or len(text) < size
    else:
        assert size <= match.length <= match.place < len(text)
        assert text[match.place - match.length : match.place] == text[-match.length :]
        assert whole.after(match, 1) == [text[match.place]]


def test_sequences_are_looked_up_in_themselves() -> None:
    proposer = NgramProposer(FREE)
    one, other = (Sequence("r", prompt, SamplingParams()) for prompt in ([1, 2, 3, 1], [7, 8, 9]))
    assert not proposer.expects([one, other])
    one.output_token_ids.append(2)
    assert proposer.expects([other, one])
    assert proposer.propose({one: 2, other: 2}) == {one: [3, 1]}
    other.output_token_ids += [1, 2]  # which is in the other's text
    assert proposer.propose({other: 4}) == {}
    proposer.release([one.seq_id, other.seq_id])
    assert proposer._indexes == proposer._guesses == {}


@given(
    st.lists(st.integers(0, 2), min_size=1, max_size=20), st.lists(st.integers(0, 2), max_size=8)
)
def test_what_will_be_proposed_after_more_tokens(prompt: list[int], more: list[int]) -> None:
    proposer, sequence = NgramProposer(GPU_COST), Sequence("r", prompt, SamplingParams())
    tokens, expected = proposer.after(sequence, more, 1)
    sequence.output_token_ids += more
    assert proposer.propose({sequence: 15}) == ({sequence: tokens} if tokens else {})
    assert proposer.expected(sequence) == expected
    assert proposer._indexes[sequence.seq_id].token_ids == prompt + more


@pytest.mark.parametrize(
    ("cost", "probability", "num_sequences", "length"),
    [
        (FREE, 0.5, 1, 15),
        (FREE, 0.0, 1, 0),
        (StepCost(0.0, 1.0), 0.99, 1, 0),  # a row costs as much as a step
        (StepCost(0.0, 0.1), 1.0, 1, 15),
        (StepCost(0.0, 0.1), 0.09, 1, 0),
        (StepCost(0.0, 0.1), 0.11, 1, 1),
        (StepCost(0.5, 0.1), 0.4, 1, 0),  # one token pays for itself, but not for the proposal
        (CPU_COST, 0.5, 1, 2),
        (CPU_COST, 0.9, 1, 9),
        (CPU_COST, 0.9, 8, 0),  # a batch computes rows more cheaply than guesses
        (GPU_COST, 0.9, 1, 15),
        (GPU_COST, 0.9, 4, 15),
        (GPU_COST, 0.2, 1, 0),
    ],
)
def test_the_length_that_makes_the_most_tokens_in_a_time(
    cost: StepCost, probability: float, num_sequences: int, length: int
) -> None:
    assert cost.best_length(probability, 15, num_sequences) == length


@given(
    st.floats(0, 1), st.floats(0, 1), st.floats(0, 1), st.integers(1, 9), st.integers(0, 9),
)  # fmt: skip
def test_no_other_length_is_better(
    proposals: float, row: float, probability: float, num_sequences: int, most: int
) -> None:
    def rate(length: int) -> float:
        tokens = num_sequences + sum(probability**n for n in range(1, length + 1))
        rows = num_sequences - 1 + length
        return tokens / (1 + row * rows + (proposals if length else 0))

    chosen = StepCost(proposals, row).best_length(probability, most, num_sequences)
    assert 0 <= chosen <= most
    assert rate(chosen) >= max(map(rate, range(most + 1))) - 1e-9


def test_rates_follow_what_was_right() -> None:
    """Each length of a match has its own rate, and old tokens count less and less."""
    rates = MatchRates()
    first = [rates.probability(match) for match in (2, 4, 8, 16, 32)]
    assert first == sorted(first)
    for _ in range(300):
        rates.observe(9, 0, wrong=True)
        rates.observe(2, 3, wrong=False)
    assert rates.probability(15) < 0.02
    assert rates.probability(3) > 0.98
    assert rates.probability(16) == first[3]
    for _ in range(300):
        rates.observe(9, 2, wrong=False)
    assert rates.probability(8) > 0.9


def test_lookups_that_are_wrong_are_proposed_no_longer_and_again_once_they_are_right() -> None:
    proposer = NgramProposer(CPU_COST)
    sequence = Sequence("r", [1, 2, 3, 4, 5] * 2, SamplingParams())
    asked = {sequence: 15}
    repeated = proposer.propose(asked)[sequence]
    assert repeated == ([1, 2, 3, 4, 5] * 3)[: len(repeated)]
    assert proposer.expected(sequence) > 2
    for token in range(100, 160):  # 1 2 is followed by something else each time
        sequence.output_token_ids += [1, 2]
        found = proposer.propose(asked)
        sequence.output_token_ids += [token]
    assert not found
    assert not proposer.expects([sequence])
    for _ in range(60):
        sequence.output_token_ids += [1, 2]
        found = proposer.propose(asked)
        sequence.output_token_ids += [7]
    assert found[sequence][0] == 7
