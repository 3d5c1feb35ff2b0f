"""What ends a text besides its length: tokens, and strings that may span tokens."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Sequence
from functools import lru_cache

from modelpack_engine.sampling_params import SamplingParams


def ending_token_ids(params: SamplingParams, eos_token_ids: Collection[int]) -> frozenset[int]:
    """Return the tokens that end a request's text once `min_tokens` others have come.

    The sampler does not choose them before that; whoever collects tokens ends the text at the
    first one, and does not pass it to the Detokenizer.
    """
    eos = () if params.ignore_eos else eos_token_ids
    return frozenset(params.stop_token_ids).union(eos)


class StopStrings:
    """An automaton that finds any of some strings in a text given piece by piece.

    Aho and Corasick's (doi:10.1145/360825.360855): a character costs constant time on average, and
    the state's depth is the number of last characters that may yet begin a match: just so many have
    to be held back. The automaton holds no text, so that requests can share it.
    """

    __slots__ = ("_depth", "_fall_back", "_found", "_next")

    def __init__(self, strings: Sequence[str]) -> None:
        self._next: list[dict[str, int]] = [{}]
        self._depth = [0]
        self._fall_back = [0]
        self._found: list[str | None] = [None]  # the longest string that ends in this state
        for string in strings:
            self._insert(string)
        self._link()

    def step(self, state: int, character: str) -> int:
        """Return the state after one more character; the first state is 0."""
        while character not in self._next[state]:
            if state == 0:
                return 0
            state = self._fall_back[state]
        return self._next[state][character]

    def depth(self, state: int) -> int:
        """Return how many of the last characters may be the beginning of a match."""
        return self._depth[state]

    def found(self, state: int) -> str | None:
        """Return the longest of the strings that the text ends with, if any."""
        return self._found[state]

    def _insert(self, string: str) -> None:
        state = 0
        for depth, character in enumerate(string, 1):
            following = self._next[state].get(character)
            if following is None:
                following = self._next[state][character] = len(self._next)
                self._next.append({})
                self._depth.append(depth)
                self._fall_back.append(0)
                self._found.append(None)
            state = following
        self._found[state] = string

    def _link(self) -> None:
        """Breadth first, let each state fall back to its longest proper suffix that is a state."""
        queue = deque(self._next[0].values())
        while queue:
            state = queue.popleft()
            for character, following in self._next[state].items():
                self._fall_back[following] = self.step(self._fall_back[state], character)
                queue.append(following)
            shorter = self._fall_back[state]
            if self._found[state] is None:
                self._found[state] = self._found[shorter]
            if not self._next[state]:  # nothing longer can come of it: a match that was let pass
                self._depth[state] = self._depth[shorter]


@lru_cache(maxsize=256)
def stop_strings(strings: tuple[str, ...]) -> StopStrings:
    """Return the automaton of `strings`, shared by the choices of a request."""
    return StopStrings(strings)
