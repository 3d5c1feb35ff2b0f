"""Detokenizer: token ids to text, piece by piece, up to the first stop string."""

from __future__ import annotations

import codecs
from collections.abc import Container, Iterable
from typing import NamedTuple, Protocol

from modelpack_engine.sampling_params import SamplingParams
from modelpack_engine.stopping import stop_strings


class TokenBytes(Protocol):
    """What a Detokenizer needs to know of a tokenizer."""

    @property
    def special_token_ids(self) -> Container[int]:
        """Tokens that are no text: begin and end of sequence, roles of a chat template."""
        ...

    @property
    def strips_leading_space(self) -> bool:
        """Whether a text's first space is the tokenizer's own (SentencePiece's dummy prefix)."""
        ...

    def token_bytes(self, token_id: int) -> bytes:
        """Return the bytes of a token's text, for a special one too; none for an unused id.

        A token may be a part of a character (byte-level BPE, byte fallback).
        """
        ...


class TextDelta(NamedTuple):
    """Text that became final, and the stop string that ended it, if one did."""

    text: str
    stopped_by: str | None = None


class Detokenizer:
    """Turns one choice's output tokens into text that never has to be taken back.

    All deltas and `finish()` together are the tokens' bytes, decoded as UTF-8 with U+FFFD for what
    is not, up to the first stop string. Where a text holds several, the one that ends first counts;
    of those that end together, the longest. How the tokens are cut into calls of `push` makes no
    difference, nor (but for `min_tokens`) how the text is cut into tokens.

    Held back are half a character and what may become a stop string; no more than that. A stop
    string counts if it ends after the first `min_tokens` tokens.

    `continues_text` says that the text goes on after a prompt (a completion): then SentencePiece's
    leading space is text. Otherwise (a chat's answer) it is stripped, as decoding the output alone
    does.
    """

    def __init__(
        self, tokenizer: TokenBytes, params: SamplingParams, *, continues_text: bool = False
    ) -> None:
        self._tokenizer = tokenizer
        self._skipped: Container[int] = (
            tokenizer.special_token_ids if params.skip_special_tokens else ()
        )
        self._strips_space = tokenizer.strips_leading_space and not continues_text
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._automaton = stop_strings(tuple(params.stop)) if params.stop else None
        self._state = 0
        self._held = ""
        self._tokens_before_stop = params.min_tokens
        self._stopped_by: str | None = None

    def push(self, token_ids: Iterable[int]) -> TextDelta:
        """Return the text that these tokens make final; nothing once a stop string was found."""
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
        """Return what was held back, now that no more tokens come."""
        if self._stopped_by is not None:
            return ""
        rest = self._emit(self._utf8.decode(b"", final=True), may_stop=self._tokens_before_stop < 0)
        rest, self._held = rest + self._held, ""
        return rest

    def _emit(self, text: str, *, may_stop: bool) -> str:
        """Return the part of what was held and `text` that is final now."""
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
        self._state = state
        return self._release(self._held + text, automaton.depth(state))

    def _release(self, text: str, held: int) -> str:
        final = len(text) - held
        self._held = text[final:]
        return text[:final]
