"""NgramProposer: prompt lookup. What a text has said before, it may say again.

Source: prompt lookup decoding (github.com/apoorvumang/prompt-lookup-decoding). The last few tokens
are looked up in the sequence itself, prompt and output, and what followed them is proposed. Costs
next to nothing, and pays where a text is copied: code that is edited, sources that are summarised,
conversations that quote themselves.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from modelpack_engine.core.sequence import Sequence

#: Tokens that have to be equal before a place counts as the same.
MIN_MATCH = 3
# Of the places that match, how many of the latest are compared, and over how many tokens.
_PLACES = 16
_COMPARED = 32


class NgramProposer:
    """Looks up the ends of sequences in themselves."""

    def __init__(self, min_match: int = MIN_MATCH) -> None:
        self._min_match = min_match
        self._indexes: dict[int, NgramIndex] = {}

    def expects(self, sequences: Iterable[Sequence]) -> bool:
        """Return whether the end of any sequence occurred before."""
        # All of them are brought up to date, whichever comes first.
        found = [self._index(sequence).place() is not None for sequence in sequences]
        return any(found)

    def propose(self, lengths: Mapping[Sequence, int]) -> Mapping[Sequence, list[int]]:
        """Return what followed where the end of a sequence occurred before."""
        found = {}
        for sequence, length in lengths.items():
            token_ids = self._index(sequence).continuation(length)
            if token_ids:
                found[sequence] = token_ids
        return found

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
    """The places of every n-gram of a growing text of tokens."""

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
        """Return where the text goes on after what is most like its end, the latest of the best."""
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
        """Return up to `length` tokens that come after that place, [] if there is none.

        Where these reach the end of the text, they go on with themselves: it repeats.
        """
        place = self.place()
        if place is None:
            return []
        found = self.token_ids[place : place + length]
        for index in range(length - len(found)):
            found.append(found[index])
        return found
