"""Detokenizer: turn the output tokens of one sequence into final text, up to a stop string."""

from __future__ import annotations

import codecs
from collections import deque
from collections.abc import Collection, Container, Iterable, Sequence
from functools import lru_cache
from typing import NamedTuple, Protocol

from modelpack_engine.request import SamplingParams


def ending_token_ids(params: SamplingParams, eos_token_ids: Collection[int]) -> frozenset[int]:
    """Return the tokens that end a request's text after its first `min_tokens` tokens.

    The sampler does not choose them before that. `SequenceOutput` ends the text at the first of
    them, and does not pass it to the Detokenizer.
    """
    eos = () if params.ignore_eos else eos_token_ids
    return frozenset(params.stop_token_ids).union(eos)


class StopStrings:
    """An Aho-Corasick automaton that finds stop strings in a text, one character at a time.

    A character takes constant time on average. The depth of a state is the number of last
    characters that may begin a match, which must be held back. The automaton holds no text, so
    requests can share it. Source: doi:10.1145/360825.360855.
    """

    __slots__ = ("_depth", "_fall_back", "_found", "_next")

    def __init__(self, strings: Sequence[str]) -> None:
        self._next: list[dict[str, int]] = [{}]
        self._depth = [0]
        self._fall_back = [0]
        self._found: list[str | None] = [None]  # longest string that ends in the state
        for string in strings:
            self._insert(string)
        self._link()

    def step(self, state: int, character: str) -> int:
        """Return the state after one more character; the initial state is 0."""
        while character not in self._next[state]:
            if state == 0:
                return 0
            state = self._fall_back[state]
        return self._next[state][character]

    def depth(self, state: int) -> int:
        """Return how many of the last characters may begin a match."""
        return self._depth[state]

    def found(self, state: int) -> str | None:
        """Return the longest stop string that the text ends with, if any."""
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
        """Set the fallback of each state, breadth first: the longest proper suffix with a state."""
        queue = deque(self._next[0].values())
        while queue:
            state = queue.popleft()
            for character, following in self._next[state].items():
                self._fall_back[following] = self.step(self._fall_back[state], character)
                queue.append(following)
            shorter = self._fall_back[state]
            if self._found[state] is None:
                self._found[state] = self._found[shorter]
            if not self._next[state]:  # no longer match is possible
                self._depth[state] = self._depth[shorter]


@lru_cache(maxsize=256)
def stop_strings(strings: tuple[str, ...]) -> StopStrings:
    """Return the automaton of `strings`, shared by the choices of a request."""
    return StopStrings(strings)


class TokenBytes(Protocol):
    """The part of a tokenizer that a Detokenizer needs."""

    @property
    def special_token_ids(self) -> Container[int]:
        """Tokens that are not text: begin and end of sequence, roles of a chat template."""

    @property
    def strips_leading_space(self) -> bool:
        """Whether the tokenizer adds the first space of a text (SentencePiece's dummy prefix)."""

    def token_bytes(self, token_id: int) -> bytes:
        """Return the bytes of a token's text, also of a special one; empty for an unused id.

        A token may be part of a character (byte-level BPE, byte fallback).
        """


class TextDelta(NamedTuple):
    """New final text, and the stop string that ended it, if any."""

    text: str
    stopped_by: str | None = None


class Detokenizer:
    """Turns the output tokens of one sequence into text that is never retracted.

    All deltas and `finish()` together are the tokens' bytes, decoded as UTF-8 with U+FFFD for
    invalid bytes, up to the first stop string. If a text contains several stop strings, the one
    that ends first counts, and the longest of those that end at the same character. The result does
    not depend on how tokens are grouped in calls of `push`, nor (except for `min_tokens`) on how
    the text is divided into tokens.

    Only an incomplete character and the possible beginning of a stop string are held back. A stop
    string counts if it ends after the first `min_tokens` tokens.

    `continues_text` is for completions, whose text continues the prompt: SentencePiece's leading
    space is part of the text. In chat replies it is stripped, as when the output is decoded alone.
    """

    def __init__(
        self, tokenizer: TokenBytes, params: SamplingParams, *, continues_text: bool = False
    ) -> None:
        self._tokenizer = tokenizer
        special = tokenizer.special_token_ids
        self._skipped: Container[int] = special if params.skip_special_tokens else ()
        self._strips_space = tokenizer.strips_leading_space and not continues_text
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._automaton = stop_strings(tuple(params.stop)) if params.stop else None
        self._state = 0
        self._held = ""
        self._tokens_before_stop = params.min_tokens
        self._stopped_by: str | None = None

    def push(self, token_ids: Iterable[int]) -> TextDelta:
        """Return the text that is final after these tokens; empty after a stop string."""
        text = ""
        for token_id in token_ids:
            if self._stopped_by is not None:
                break
            data = b"" if token_id in self._skipped else self._tokenizer.token_bytes(token_id)
            piece = self._utf8.decode(data)
            if self._automaton is not None or self._strips_space:
                piece = self._emit(piece, may_stop=self._tokens_before_stop <= 0)
            self._tokens_before_stop -= 1
            text += piece
        return TextDelta(text, self._stopped_by)

    def finish(self) -> str:
        """Return the text that was held back, after the last token."""
        if self._stopped_by is not None:
            return ""
        rest = self._emit(self._utf8.decode(b"", final=True), may_stop=self._tokens_before_stop < 0)
        rest, self._held = rest + self._held, ""
        return rest

    def _emit(self, text: str, *, may_stop: bool) -> str:
        """Add `text` to the held text; return the part that is final now."""
        if self._strips_space and text:
            self._strips_space = False
            text = text.removeprefix(" ")
        if self._automaton is None:
            return text
        automaton, state = self._automaton, self._state
        for end, character in enumerate(text, 1):
            state = automaton.step(state, character)
            if may_stop and (found := automaton.found(state)) is not None:
                self._stopped_by = found
                kept = self._held + text[:end]
                self._held = ""
                return kept[: len(kept) - len(found)]
        self._state, text = state, self._held + text
        final = len(text) - automaton.depth(state)
        self._held = text[final:]
        return text[:final]
