"""Tools, tool choice, and the parts of parsed output."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True, slots=True)
class Tool:
    """A function that the caller offers; `parameters` is the JSON schema of its arguments."""

    name: str
    description: str = ""
    parameters: Mapping[str, Any] = field(default_factory=dict)
    strict: bool = False


@dataclass(frozen=True, slots=True)
class ToolChoice:
    """`names` narrows what may be called: one for a named tool, several for allowed tools."""

    mode: Literal["auto", "none", "required"] = "auto"
    names: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class ReasoningMarkers:
    """`opening` and `closing` enclose reasoning.

    `anywhere`: the opening is a special token, which no model writes by accident, so it counts
    wherever it stands. Otherwise it counts only where a block can begin: at the beginning, after
    another block, and after calls. A model that explains the tag in its answer keeps it.
    """

    opening: str
    closing: str
    anywhere: bool = False


THINK = ReasoningMarkers("<think>", "</think>")
MISTRAL = ReasoningMarkers("[THINK]", "[/THINK]", anywhere=True)
GEMMA = ReasoningMarkers("<|channel>thought", "<channel|>", anywhere=True)
KIMI_K3 = ReasoningMarkers("<|open|>think<|sep|>", "<|close|>think<|sep|>", anywhere=True)
LONGCAT = ReasoningMarkers("<longcat_think>", "</longcat_think>")
SEED = ReasoningMarkers("<seed:think>", "</seed:think>")
HARMONY = ReasoningMarkers("<|channel|>analysis<|message|>", "<|end|>", anywhere=True)


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
