"""Prompt lookup proposes the tokens that followed an earlier match."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
from hypothesis import given

from modelpack_engine.core.sequence import Sequence
from modelpack_engine.request import SamplingParams
from modelpack_engine.speculation.ngram import NgramIndex, NgramProposer


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
    assert "".join(map(chr, index.continuation(length))) == expected


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
    assert growing.place() == whole.place()
    place = whole.place()
    if place is None:
        ends = [tuple(text[i : i + size]) for i in range(len(text) - size)]
        assert tuple(text[-size:]) not in ends or len(text) < size
    else:
        assert size <= place < len(text)
        assert text[place - size : place] == text[-size:]
        assert whole.continuation(1) == [text[place]]


def test_sequences_are_looked_up_in_themselves() -> None:
    proposer = NgramProposer(min_match=2)
    one, other = (Sequence("r", prompt, SamplingParams()) for prompt in ([1, 2, 3, 1], [7, 8, 9]))
    assert not proposer.expects([one, other])
    one.output_token_ids.append(2)
    assert proposer.expects([other, one])
    assert proposer.propose({one: 2, other: 2}) == {one: [3, 1]}
    other.output_token_ids += [1, 2]  # which is in the other's text
    assert proposer.propose({other: 4}) == {}
    proposer.release([one.seq_id, other.seq_id])
    assert proposer._indexes == {}
