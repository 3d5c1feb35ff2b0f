"""Blocks: the parts of an answer as blocks of content, one after the other, and their events."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from modelpack_server.api.carried import carry, fingerprint
from modelpack_server.tool_parsers.parts import Part, Reasoning, Text, ToolArguments, ToolStart

Event = dict[str, Any]


class Blocks:
    """`take` and `end` return the events of what is new; `content` has the blocks that are over.

    Space before a text is held back: between thoughts and calls it makes no block of its own.
    Without `show_thinking` thoughts are carried by their signature only.
    """

    def __init__(self, *, show_thinking: bool = True) -> None:
        self.content: list[dict[str, Any]] = []
        self._show_thinking = show_thinking
        self._open: dict[str, Any] | None = None
        self._pieces: list[str] = []
        self._space = ""

    def take(self, parts: Iterable[Part]) -> list[Event]:
        """Return the events of the next parts."""
        events: list[Event] = []
        for part in parts:
            match part:
                case Text():
                    events += self._text(part.text)
                case Reasoning():
                    events += self._to("thinking", {"thinking": "", "signature": ""})
                    self._pieces.append(part.text)
                    if self._show_thinking:
                        events.append(self._delta("thinking_delta", "thinking", part.text))
                case ToolStart():
                    events += self._close()
                    events += self._to("tool_use", {"id": part.id, "name": part.name, "input": {}})
                case ToolArguments():
                    self._pieces.append(part.fragment)
                    events.append(self._delta("input_json_delta", "partial_json", part.fragment))
        return events

    def end(self) -> list[Event]:
        """Return the events of the end."""
        events: list[Event] = []
        if not self.content and self._open is None and self._space:
            events += self._say(self._space)  # there was nothing else
        return events + self._close()

    def _text(self, text: str) -> list[Event]:
        if self._open is None or self._open["type"] != "text":
            text = self._space + text
            if not text.strip():
                self._space = text
                return []
        return self._say(text)

    def _say(self, text: str) -> list[Event]:
        events = self._to("text", {"text": "", "citations": None})
        self._pieces.append(text)
        return [*events, self._delta("text_delta", "text", text)]

    def _to(self, kind: str, fields: dict[str, Any]) -> list[Event]:
        """Open a block, unless one of its kind is open."""
        if self._open is not None and self._open["type"] == kind:
            return []
        events = self._close()
        self._space = ""
        self._open = {"type": kind, **fields}
        return [
            *events,
            {
                "type": "content_block_start",
                "index": len(self.content),
                "content_block": dict(self._open),
            },
        ]

    def _close(self) -> list[Event]:
        block, index = self._open, len(self.content)
        if block is None:
            return []
        text = "".join(self._pieces)
        events: list[Event] = []
        if block["type"] == "text":
            block["text"] = text
        elif block["type"] == "tool_use":
            block["input"] = json.loads(text or "{}")
        else:
            block["signature"] = fingerprint(text) if self._show_thinking else carry(text)
            block["thinking"] = text if self._show_thinking else ""
            events.append(self._delta("signature_delta", "signature", block["signature"]))
        self.content.append(block)
        self._open, self._pieces = None, []
        return [*events, {"type": "content_block_stop", "index": index}]

    def _delta(self, kind: str, field: str, text: str) -> Event:
        return {
            "type": "content_block_delta",
            "index": len(self.content),
            "delta": {"type": kind, field: text},
        }
