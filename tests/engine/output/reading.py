"""Feeds a parser in pieces and joins its parts, so that results can be compared."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any

from modelpack_server.tool_parsers.families import OutputFormat
from modelpack_server.tool_parsers.parser import OutputParser
from modelpack_server.tool_parsers.parts import (
    Part,
    Reasoning,
    Text,
    Tool,
    ToolArguments,
    ToolStart,
)

WEATHER = Tool(
    "get_weather",
    "Tells the weather",
    {
        "type": "object",
        "properties": {
            "city": {"type": "string"},
            "days": {"type": "integer"},
            "metric": {"type": "boolean"},
            "where": {"type": "object"},
            "tags": {"type": "array"},
            "note": {"anyOf": [{"type": "string"}, {"type": "null"}]},
        },
    },
)
TIME = Tool("time.now-utc", "Tells the time", {"type": "object", "properties": {}})
NOW = Tool("now", "Tells the time", {"type": "object", "properties": {}})
TOOLS = (WEATHER, TIME, NOW)

Found = list[tuple[Any, ...]]


def call(name: str, **arguments: Any) -> tuple[Any, ...]:
    return ("call", name, arguments)


def text(words: str) -> tuple[Any, ...]:
    return ("text", words)


def thought(words: str) -> tuple[Any, ...]:
    return ("thought", words)


def parts_of(
    format: OutputFormat,
    pieces: Iterable[str],
    *,
    tools: Sequence[Tool] = TOOLS,
    starts_reasoning: bool = False,
    parallel: bool = True,
) -> list[Part]:
    parser = OutputParser(format, tools, starts_reasoning=starts_reasoning, parallel=parallel)
    parts = [part for piece in pieces for part in parser.feed(piece)] + parser.finish()
    assert parser.tool_calls == sum(isinstance(p, ToolStart) for p in parts)
    assert parser.feed("more") == []
    assert parser.finish() == []
    return parts


def joined(parts: Iterable[Part]) -> Found:
    """Join adjacent parts, and check the invariants of every output."""
    found: Found = []
    for part in parts:
        kind = {Text: "text", Reasoning: "thought"}.get(type(part))
        if isinstance(part, ToolStart):
            assert part.index == sum(entry[0] == "call" for entry in found)
            assert part.id
            found.append(("call", part.name, ""))
        elif isinstance(part, ToolArguments):
            calls = [n for n, entry in enumerate(found) if entry[0] == "call"]
            assert part.index == len(calls) - 1
            assert part.fragment
            assert calls[-1] == len(found) - 1, "arguments after something else"
            _, name, so_far = found[-1]
            found[-1] = ("call", name, so_far + part.fragment)
        else:
            assert part.text, "an empty part"
            if found and found[-1][0] == kind:
                found[-1] = (kind, found[-1][1] + part.text)
            else:
                found.append((kind, part.text))
    for n, entry in enumerate(found):
        if entry[0] == "call":
            arguments = json.loads(entry[2])
            assert isinstance(arguments, dict)
            found[n] = ("call", entry[1], arguments)
    return found


def read(family: str | OutputFormat, pieces: Iterable[str], **options: Any) -> Found:
    chosen = family if isinstance(family, OutputFormat) else OutputFormat.named(family)
    return joined(parts_of(chosen, pieces, **options))
