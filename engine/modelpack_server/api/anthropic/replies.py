"""Answers of the Messages API, whole and as events."""

from __future__ import annotations

import uuid
from collections.abc import Iterable
from typing import Any

from modelpack_server.api.anthropic.blocks import Blocks
from modelpack_server.api.sse import event
from modelpack_server.conversation.spec import ChatDelta, ChatUsage

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
