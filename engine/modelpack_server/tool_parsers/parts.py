"""What a model's output consists of, piece by piece."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Text:
    """A piece of the answer."""

    text: str


@dataclass(frozen=True, slots=True)
class Reasoning:
    """A piece of what the model thinks before it answers."""

    text: str


@dataclass(frozen=True, slots=True)
class ToolStart:
    """A call begins: the `index`-th of this output, from 0, of a tool that was offered."""

    index: int
    id: str
    name: str


@dataclass(frozen=True, slots=True)
class ToolArguments:
    """A piece of a call's arguments; all pieces of one index together are a JSON object."""

    index: int
    fragment: str


Part = Text | Reasoning | ToolStart | ToolArguments
