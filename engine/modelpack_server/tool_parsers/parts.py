"""Tools, tool choice, and the parts of parsed output."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from modelpack_engine.errors import RequestError


@dataclass(frozen=True, slots=True)
class Tool:
    """A function that the model may call; `parameters` is the JSON schema of its arguments."""

    name: str
    description: str = ""
    parameters: Mapping[str, Any] = field(default_factory=dict)
    strict: bool = False


def described(tool: Tool) -> dict[str, Any]:
    """Return a tool in the form that templates expect."""
    function = {"name": tool.name, "description": tool.description}
    return {"type": "function", "function": function | {"parameters": dict(tool.parameters)}}


def check_names(tools: Sequence[Tool]) -> None:
    """Raise `RequestError` if two tools have the same name."""
    seen: set[str] = set()
    for tool in tools:
        if tool.name in seen:
            raise RequestError(f"two tools have the same name: {tool.name!r}", param="tools")
        seen.add(tool.name)


@dataclass(frozen=True, slots=True)
class ToolChoice:
    """Whether the model calls tools; `names` restricts them: to a named tool, or allowed tools."""

    mode: Literal["auto", "none", "required"] = "auto"
    names: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class ReasoningMarkers:
    """The markers around reasoning.

    `anywhere`: the opening is a special token, which models do not write as text, so it counts
    anywhere. Otherwise it counts only where a block can begin: at the beginning, after another
    block and after calls. A reply that explains the tag keeps it as text.
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
    """A piece of the reply's text."""

    text: str


@dataclass(frozen=True, slots=True)
class Reasoning:
    """A piece of the reasoning."""

    text: str


@dataclass(frozen=True, slots=True)
class ToolStart:
    """The beginning of a call: call number `index` of this reply, from 0."""

    index: int
    id: str
    name: str


@dataclass(frozen=True, slots=True)
class ToolArguments:
    """A piece of a call's arguments; the pieces of one index form a JSON object."""

    index: int
    fragment: str


Part = Text | Reasoning | ToolStart | ToolArguments
