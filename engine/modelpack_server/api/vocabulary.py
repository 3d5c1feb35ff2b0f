"""Token texts and bytes, as log-probabilities show them."""

from __future__ import annotations

from typing import Protocol


class _TokenBytes(Protocol):
    def token_bytes(self, token_id: int) -> bytes: ...


class Vocabulary:
    """The bytes and the text of single tokens; the same few are asked for again and again."""

    def __init__(self, tokenizer: _TokenBytes) -> None:
        self._tokenizer = tokenizer
        self._known: dict[int, tuple[str, list[int]]] = {}

    def text(self, token_id: int) -> str:
        """Return the token as text; bytes that are no whole character are shown as such."""
        return self.shown(token_id)[0]

    def shown(self, token_id: int) -> tuple[str, list[int]]:
        """Return the token as text, and its bytes."""
        known = self._known.get(token_id)
        if known is None:
            raw = self._tokenizer.token_bytes(token_id)
            known = self._known[token_id] = raw.decode(errors="replace"), list(raw)
        return known
