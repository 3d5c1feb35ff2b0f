"""NgramProposer: prompt lookup decoding.

The last few tokens of a sequence are looked up in its own prompt and output, and the tokens that
followed them are proposed. A lookup costs almost nothing. It helps when text is copied: when code
is edited, a source is summarised, or a conversation quotes itself. How many tokens are proposed
depends on how often tokens after matches as long were right, and on the cost of a row.

Source: github.com/apoorvumang/prompt-lookup-decoding.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from modelpack_engine.core.sequence import Sequence
from modelpack_engine.runner.step import count_equal

#: The least number of equal tokens for a match.
MIN_MATCH = 2
#: The default of the most tokens of a proposal: with the newest token, they fill a bucket of rows.
MOST_TOKENS = 15
# How many of the latest matches are compared, and over how many tokens.
_PLACES = 16
_COMPARED = 32
# Right and all tokens after matches of 2, 4, 8, 16 and 32 tokens, before any were measured.
_FIRST_RATES = ((1, 4), (1, 4), (2, 4), (3, 4), (6, 7), (9, 10), (19, 20))
# What remains of the counts with each further token.
_FADING = 0.995


@dataclass(frozen=True, slots=True)
class StepCost:
    """The cost of proposals, in steps of one sequence: of having any, and of each row."""

    proposals: float
    row: float

    def best_length(self, probability: float, most: int, num_sequences: int) -> int:
        """Return how many tokens to propose for one of the sequences that decode, at most `most`.

        Each token is right with `probability` if those before it are. The length is that with the
        most tokens in the time of the step; 0 if a step without proposals has more.
        """
        tokens, seconds = float(num_sequences), 1 + self.row * (num_sequences - 1)
        best, length, right = tokens / seconds, 0, 1.0
        seconds += self.proposals
        for count in range(1, most + 1):
            right *= probability
            tokens, seconds = tokens + right, seconds + self.row
            if tokens / seconds > best:
                best, length = tokens / seconds, count
        return length


#: The CPU's was measured with SmolLM2 on two cores (benchmarks/results/speculative.md). The GPU's
#: is assumed: a row costs almost nothing, but a step with proposals cannot be built ahead.
CPU_COST, GPU_COST = StepCost(0.2, 0.15), StepCost(0.3, 0.01)


class MatchRates:
    """How often a looked-up token was right, by the length of its match, in all sequences."""

    def __init__(self) -> None:
        self._counts = [(float(right), float(tokens)) for right, tokens in _FIRST_RATES]

    def probability(self, match: int) -> float:
        """Return the probability of the next token after a match, if those before it were right."""
        right, tokens = self._counts[self._size(match)]
        return right / tokens

    def observe(self, match: int, right: int, *, wrong: bool) -> None:
        """Count the first `right` tokens after a match; `wrong` says that the next one was not."""
        size = self._size(match)
        kept = _FADING ** (right + wrong)
        before, tokens = self._counts[size]
        self._counts[size] = before * kept + right, tokens * kept + right + wrong

    def _size(self, match: int) -> int:
        return min(match.bit_length(), len(_FIRST_RATES) - 1)


@dataclass(frozen=True, slots=True)
class _Guess:
    """The tokens from position `start` on by a lookup, and how many are expected to be right."""

    start: int
    match: int
    tokens: list[int]
    expected: float


class NgramProposer:
    """Proposes the tokens that followed an earlier occurrence of a sequence's last tokens."""

    def __init__(self, cost: StepCost = CPU_COST, min_match: int = MIN_MATCH) -> None:
        self._cost, self._min_match = cost, min_match
        self._rates = MatchRates()
        self._indexes: dict[int, NgramIndex] = {}
        self._guesses: dict[int, _Guess] = {}  # by seq_id

    def expects(self, sequences: Iterable[Sequence]) -> bool:
        """Return whether a proposal would pay for the end of any sequence."""
        # No early exit: the index of every sequence must be updated.
        matches = [self._index(sequence).match() for sequence in sequences]
        return any(match and self._length(match, MOST_TOKENS, len(matches)) for match in matches)

    def propose(self, lengths: Mapping[Sequence, int]) -> Mapping[Sequence, list[int]]:
        """Return the tokens that followed the best match of each sequence's last tokens."""
        found = {}
        for sequence, most in lengths.items():
            self._settle(sequence)
            index = self._index(sequence)
            match = index.match()
            if match is None:
                continue
            length = self._length(match, most, len(lengths))
            tokens, expected = index.after(match, most), self._expected(match, length)
            guess = _Guess(sequence.num_known_tokens, match.length, tokens, expected)
            self._guesses[sequence.seq_id] = guess
            if length:
                found[sequence] = tokens[:length]
        return found

    def after(
        self, sequence: Sequence, token_ids: list[int], num_sequences: int
    ) -> tuple[list[int], float]:
        """Add tokens to the index of a sequence that will have them, unless it ends.

        Return what `propose` and `expected` will return then, by today's rates.
        """
        index = self._index(sequence)
        index.extend(token_ids)
        match = index.match()
        if match is None:
            return [], 0.0
        length = self._length(match, MOST_TOKENS, num_sequences)
        return index.after(match, length), self._expected(match, length)

    def expected(self, sequence: Sequence) -> float:
        """Return how many tokens of the last proposal for a sequence are probably right."""
        guess = self._guesses.get(sequence.seq_id)
        return 0.0 if guess is None else guess.expected

    def release(self, seq_ids: Iterable[int]) -> None:
        """Forget sequences."""
        for seq_id in seq_ids:
            self._indexes.pop(seq_id, None)
            self._guesses.pop(seq_id, None)

    def _length(self, match: Match, most: int, num_sequences: int) -> int:
        probability = self._rates.probability(match.length)
        return self._cost.best_length(probability, most, num_sequences)

    def _expected(self, match: Match, length: int) -> float:
        probability = self._rates.probability(match.length)
        return sum(probability**count for count in range(1, length + 1))

    def _settle(self, sequence: Sequence) -> None:
        """Compare the last guess, proposed or not, with the tokens that came."""
        guess = self._guesses.pop(sequence.seq_id, None)
        if guess is None:
            return
        known = sequence.token_ids(guess.start, sequence.num_known_tokens)
        right, compared = count_equal(guess.tokens, known), min(len(guess.tokens), len(known))
        self._rates.observe(guess.match, right, wrong=right < compared)

    def _index(self, sequence: Sequence) -> NgramIndex:
        index = self._indexes.get(sequence.seq_id)
        if index is None:
            index = self._indexes[sequence.seq_id] = NgramIndex(self._min_match)
        index.extend(sequence.token_ids(len(index.token_ids), sequence.num_known_tokens))
        return index


class Match(NamedTuple):
    """The last `length` tokens are also those before position `place`."""

    place: int
    length: int


class NgramIndex:
    """The positions after every n-gram in a growing list of tokens."""

    def __init__(self, size: int) -> None:
        self.token_ids: list[int] = []
        self._size = size
        self._places: dict[tuple[int, ...], list[int]] = {}

    def extend(self, token_ids: list[int]) -> None:
        """Add tokens to the end."""
        size, tokens, places = self._size, self.token_ids, self._places
        first = max(len(tokens) + 1, size)
        tokens += token_ids
        for end in range(first, len(tokens) + 1):
            places.setdefault(tuple(tokens[end - size : end]), []).append(end)

    def match(self) -> Match | None:
        """Return the longest match of the last tokens, the latest if several."""
        tokens, size = self.token_ids, self._size
        if len(tokens) < size:
            return None
        *places, end = self._places[tuple(tokens[-size:])]
        best: Match | None = None
        for place in reversed(places[-_PLACES:]):
            length = size
            while (
                length < min(_COMPARED, place)
                and tokens[place - 1 - length] == tokens[end - 1 - length]
            ):
                length += 1
            if best is None or length > best.length:
                best = Match(place, length)
        return best

    def after(self, match: Match, length: int) -> list[int]:
        """Return the `length` tokens that follow a match.

        If the match reaches the end of the tokens, they repeat themselves.
        """
        found = self.token_ids[match.place : match.place + length]
        for index in range(length - len(found)):
            found.append(found[index])
        return found
