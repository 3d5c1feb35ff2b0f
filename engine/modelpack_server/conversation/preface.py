"""Preface: what a model's package puts before every conversation with it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Preface:
    """A system prompt, which a conversation's own replaces, and messages that come after it."""

    system: str = ""
    messages: tuple[dict[str, Any], ...] = ()

    def before(self, messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """Return the messages with those of the preface put before them."""
        own = list(messages)
        system = []
        if own and own[0].get("role") == "system":
            system = [own.pop(0)]
        elif self.system:
            system = [{"role": "system", "content": self.system}]
        return [*system, *self.messages, *own]
