"""Responses of the Messages API: content blocks and the events of a stream."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterable
from typing import Any

from modelpack_server.api.continuation import carry, fingerprint
from modelpack_server.api.sse import event
from modelpack_server.conversation.spec import ChatDelta, ChatUsage
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


_STOP_REASONS = {"stop": "end_turn", "tool_calls": "tool_use", "length": "max_tokens"}

PING = event({"type": "ping"}, "ping")


class Reply:
    """One answer: hand it the deltas, and take events or, in the end, the whole message.

    `limit` is how many tokens could be generated, `asked` how many the request wants at most.
    """

    def __init__(
        self, model: str, prompt_tokens: int, *, asked: int, limit: int, show_thinking: bool
    ) -> None:
        self._id = f"msg_{uuid.uuid4().hex[:24]}"
        self._model = model
        self._blocks = Blocks(show_thinking=show_thinking)
        self._usage = usage_json(ChatUsage(prompt_tokens, 0))
        self._full = limit < asked
        self._stop_reason: str | None = None
        self._stop_sequence: str | None = None

    def begin(self) -> str:
        """Return the events that begin the stream; nothing has been taken yet."""
        return event({"type": "message_start", "message": self.json()}, "message_start")

    def take(self, delta: ChatDelta) -> str:
        """Return the events of what is new; with the end of the answer, those that end it."""
        events = self._blocks.take(delta.parts)
        if delta.finish is None:
            return _written(events)
        events += self._blocks.end()
        if delta.usage is not None:
            self._usage = usage_json(delta.usage)
        self._stop_sequence = delta.stop_sequence
        self._stop_reason = self._reason(delta)
        why = {"stop_reason": self._stop_reason, "stop_sequence": self._stop_sequence}
        events.append({"type": "message_delta", "delta": why, "usage": self._usage})
        events.append({"type": "message_stop"})
        return _written(events)

    def json(self) -> dict[str, Any]:
        """Return the message as far as it has come."""
        return {
            "id": self._id,
            "type": "message",
            "role": "assistant",
            "model": self._model,
            "content": self._blocks.content,
            "stop_reason": self._stop_reason,
            "stop_sequence": self._stop_sequence,
            "usage": self._usage,
        }

    def _reason(self, delta: ChatDelta) -> str:
        if delta.stop_sequence is not None:
            return "stop_sequence"
        if delta.finish == "length" and self._full:
            return "model_context_window_exceeded"
        return _STOP_REASONS.get(delta.finish or "stop", "end_turn")


def usage_json(usage: ChatUsage) -> dict[str, Any]:
    """Return token counts: `input_tokens` are those of the prompt that were not cached."""
    return {
        "input_tokens": usage.prompt_tokens - usage.cached_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": usage.cached_tokens,
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"thinking_tokens": usage.reasoning_tokens},
    }


def _written(events: Iterable[dict[str, Any]]) -> str:
    return "".join(event(body, body["type"]) for body in events)
