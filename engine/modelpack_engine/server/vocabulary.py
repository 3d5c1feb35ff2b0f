"""Tokens as clients see them."""

from __future__ import annotations

from typing import Protocol


class _TokenBytes(Protocol):
    def token_bytes(self, token_id: int) -> bytes: ...


class Vocabulary:
    """The bytes and the text of single tokens."""

    def __init__(self, tokenizer: _TokenBytes) -> None:
        self._tokenizer = tokenizer

    def raw(self, token_id: int) -> bytes:
        """Return the bytes that a token stands for."""
        return self._tokenizer.token_bytes(token_id)

    def text(self, token_id: int) -> str:
        """Return the token as text; bytes that are no whole character are shown as such."""
        return self.raw(token_id).decode(errors="replace")
