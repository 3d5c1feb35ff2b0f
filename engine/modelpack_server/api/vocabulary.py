"""Token texts and bytes for log-probabilities."""

from __future__ import annotations

from modelpack_engine.models.tokenizer import Tokenizer


class Vocabulary:
    """A cache of the texts and bytes of single tokens."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._known: dict[int, tuple[str, list[int]]] = {}

    def text(self, token_id: int) -> str:
        """Return the token as text; an incomplete character becomes U+FFFD."""
        return self.shown(token_id)[0]

    def shown(self, token_id: int, data: bytes | None = None) -> tuple[str, list[int]]:
        """Return the text and the bytes of a token, or of `data`, the part that a text has."""
        if data is not None:
            return data.decode(errors="replace"), list(data)
        known = self._known.get(token_id)
        if known is None:
            raw = self._tokenizer.token_bytes(token_id)
            known = self._known[token_id] = raw.decode(errors="replace"), list(raw)
        return known
