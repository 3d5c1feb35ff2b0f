"""ReasoningBudget: a mask that ends a block of reasoning after so many tokens."""

from __future__ import annotations

from copy import copy
from typing import Protocol

from modelpack_engine.speculation.masks import CopyableMask


class _Tokens(Protocol):
    def token_bytes(self, token_id: int) -> bytes: ...


class ReasoningBudget:
    """A `LogitsMask` around another one, or around none.

    It allows what `inner` allows until the block of reasoning has `budget` tokens; then it allows
    the tokens of the closing marker only, one after the other. `opening` is None where the prompt
    has opened the block.
    """

    def __init__(
        self,
        budget: int,
        tokens: _Tokens,
        *,
        opening: str | None,
        closing: str,
        closing_ids: tuple[int, ...],
        inner: CopyableMask | None = None,
    ) -> None:
        self._budget = budget
        self._tokens = tokens
        self._opening = opening.encode() if opening is not None else None
        self._closing = closing.encode()
        self._forced = list(closing_ids)
        self._inner = inner
        self._text = b""
        self._reasons = opening is None
        self._ended = False
        self._spent = 0

    def allowed(self) -> bytes | None:
        """Return a bit per token id (LSB first), or None if any token may come."""
        if self._is_forced:
            token_id = self._forced[0]
            bits = bytearray(token_id // 8 + 1)
            bits[-1] = 1 << token_id % 8
            return bytes(bits)
        return self._inner.allowed() if self._inner is not None else None

    def accept(self, token_id: int) -> None:
        """Take notice of the token that was chosen."""
        if self._inner is not None:
            self._inner.accept(token_id)
        if self._ended:
            return
        if self._is_forced:
            self._forced.pop(0)
            self._ended = not self._forced
            return
        self._text += self._tokens.token_bytes(token_id)
        if self._reasons:
            self._spent += 1
            self._ended = self._closing in self._text
        elif self._opening is not None and self._opening in self._text:
            self._reasons = True
            self._text = b""
        elif self._opening is not None and not _may_become(self._text.lstrip(), self._opening):
            self._ended = True  # the answer began without reasoning

    def copy(self) -> ReasoningBudget:
        """Return a mask at the same place."""
        made = copy(self)
        made._forced = self._forced.copy()
        made._inner = self._inner.copy() if self._inner is not None else None
        return made

    @property
    def _is_forced(self) -> bool:
        return self._reasons and not self._ended and self._spent >= self._budget


def _may_become(text: bytes, opening: bytes) -> bool:
    return opening.startswith(text)
