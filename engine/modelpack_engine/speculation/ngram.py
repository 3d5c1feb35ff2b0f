"""NgramProposer: prompt lookup decoding.

The last few tokens of a sequence are looked up in its own prompt and output, and the tokens that
followed them are proposed. A lookup costs almost nothing. It helps when text is copied: when code
is edited, a source is summarised, or a conversation quotes itself.

Source: github.com/apoorvumang/prompt-lookup-decoding.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from modelpack_engine.core.sequence import Sequence

#: The least number of equal tokens for a match.
MIN_MATCH = 3
# How many of the latest matches are compared, and over how many tokens.
_PLACES = 16
_COMPARED = 32


class NgramProposer:
    """Proposes the tokens that followed an earlier occurrence of a sequence's last tokens."""

    def __init__(self, min_match: int = MIN_MATCH) -> None:
        self._min_match = min_match
        self._indexes: dict[int, NgramIndex] = {}

    def expects(self, sequences: Iterable[Sequence]) -> bool:
        """Return whether the end of any sequence occurred before."""
        # No early exit: the index of every sequence must be updated.
        found = [self._index(sequence).place() is not None for sequence in sequences]
        return any(found)

    def propose(self, lengths: Mapping[Sequence, int]) -> Mapping[Sequence, list[int]]:
        """Return the tokens that followed the best match of each sequence's last tokens."""
        found = {seq: self._index(seq).continuation(length) for seq, length in lengths.items()}
        return {sequence: token_ids for sequence, token_ids in found.items() if token_ids}

    def release(self, seq_ids: Iterable[int]) -> None:
        """Forget sequences."""
        for seq_id in seq_ids:
            self._indexes.pop(seq_id, None)

    def _index(self, sequence: Sequence) -> NgramIndex:
        index = self._indexes.get(sequence.seq_id)
        if index is None:
            index = self._indexes[sequence.seq_id] = NgramIndex(self._min_match)
        index.extend(sequence.token_ids(len(index.token_ids), sequence.num_known_tokens))
        return index


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

    def place(self) -> int | None:
        """Return the position after the longest match of the last tokens, the latest if several."""
        tokens, size = self.token_ids, self._size
        if len(tokens) < size:
            return None
        *places, end = self._places[tuple(tokens[-size:])]
        best, best_match = None, 0
        for place in reversed(places[-_PLACES:]):
            match = size
            while (
                match < min(_COMPARED, place)
                and tokens[place - 1 - match] == tokens[end - 1 - match]
            ):
                match += 1
            if match > best_match:
                best, best_match = place, match
        return best

    def continuation(self, length: int) -> list[int]:
        """Return up to `length` tokens that follow the best match; empty without a match.

        If the match reaches the end of the tokens, the continuation repeats itself.
        """
        place = self.place()
        if place is None:
            return []
        found = self.token_ids[place : place + length]
        for index in range(length - len(found)):
            found.append(found[index])
        return found
