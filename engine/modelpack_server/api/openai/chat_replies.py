"""Answers of the chat completions API, whole and in chunks, from the deltas of a conversation."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from modelpack_engine.outputs import TokenLogprob
from modelpack_server.api.large_json import written
from modelpack_server.api.openai.replies import Envelope, chat_logprobs, quoted, total_usage
from modelpack_server.api.vocabulary import Vocabulary
from modelpack_server.conversation.spec import ChatDelta, ChatUsage
from modelpack_server.tool_parsers.parts import Reasoning, Text, ToolArguments, ToolStart


@dataclass(slots=True)
class _Call:
    id: str
    name: str
    fragments: list[str] = field(default_factory=list)

    def json(self) -> dict[str, Any]:
        return {"id": self.id, "type": "function", "function": self.function()}

    def function(self) -> dict[str, str]:
        return {"name": self.name, "arguments": "".join(self.fragments)}


@dataclass(slots=True)
class WholeChoice:
    """One choice of an answer that is sent as a whole."""

    texts: list[str] = field(default_factory=list)
    reasoning: list[str] = field(default_factory=list)
    calls: list[_Call] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish: str | None = None
    usage: ChatUsage | None = None

    def add(self, delta: ChatDelta) -> None:
        """Take in what is new."""
        for part in delta.parts:
            match part:
                case Text():
                    self.texts.append(part.text)
                case Reasoning():
                    self.reasoning.append(part.text)
                case ToolStart():
                    self.calls.append(_Call(part.id, part.name))
                case ToolArguments():
                    self.calls[-1].fragments.append(part.fragment)
        self.logprobs += delta.logprobs or ()
        if delta.finish is not None:
            self.finish = finish_reason(delta)
            self.usage = delta.usage

    def json(self, index: int, words: Vocabulary | None, *, legacy: bool) -> dict[str, Any]:
        """Return the choice; with `words`, its log-probabilities too."""
        text = "".join(self.texts)
        silent = bool(self.calls or self.reasoning)
        message: dict[str, Any] = {
            "role": "assistant",
            "content": text if text or not silent else None,
            "refusal": None,
        }
        if self.reasoning:
            message["reasoning_content"] = "".join(self.reasoning)
        if self.calls and legacy:
            message["function_call"] = self.calls[0].function()
        elif self.calls:
            message["tool_calls"] = [call.json() for call in self.calls]
        return {
            "index": index,
            "message": message,
            "logprobs": chat_logprobs(self.logprobs, words) if words is not None else None,
            "finish_reason": _legacy(self.finish) if legacy else self.finish,
        }


class ChunkWriter:
    """Writes the events of a streamed answer."""

    def __init__(
        self, envelope: Envelope, words: Vocabulary | None, *, include_usage: bool, legacy: bool
    ) -> None:
        self._envelope = envelope
        self._words = words
        self._usage = "null" if include_usage else ""
        self._legacy = legacy

    def role(self, index: int) -> str:
        """Return the event that begins a choice."""
        return self._chunk(index, '{"role":"assistant","content":"","refusal":null}')

    def events(self, delta: ChatDelta) -> str:
        """Return the events of what is new: one for each part, and one for the end."""
        logprobs = "null"
        if self._words is not None and delta.logprobs:
            logprobs = written(chat_logprobs(delta.logprobs, self._words))
        if logprobs == "null" and delta.finish is None and len(delta.parts) == 1:
            return self._chunk(delta.index, self._delta(delta.parts[0]))
        events = []
        bodies = [self._delta(part) for part in delta.parts]
        if not bodies and logprobs != "null":
            bodies = ['{"content":""}']
        for body in bodies:
            events.append(self._chunk(delta.index, body, logprobs))
            logprobs = "null"
        if delta.finish is not None:
            reason = _legacy(finish_reason(delta)) if self._legacy else finish_reason(delta)
            events.append(self._chunk(delta.index, "{}", finish=f'"{reason}"'))
        return "".join(events)

    def usage(self, usages: list[ChatUsage]) -> str:
        """Return the event of the token counts."""
        return self._envelope.chunk("", json.dumps(total_usage(usages)))

    def _delta(self, part: Text | Reasoning | ToolStart | ToolArguments) -> str:
        match part:
            case Text():
                return f'{{"content":{quoted(part.text)}}}'
            case Reasoning():
                return f'{{"reasoning_content":{quoted(part.text)}}}'
            case ToolStart() if self._legacy:
                return f'{{"function_call":{{"name":{quoted(part.name)},"arguments":""}}}}'
            case ToolArguments() if self._legacy:
                return f'{{"function_call":{{"arguments":{quoted(part.fragment)}}}}}'
            case ToolStart():
                return (
                    f'{{"tool_calls":[{{"index":{part.index},"id":{quoted(part.id)},'
                    f'"type":"function","function":{{"name":{quoted(part.name)},'
                    '"arguments":""}}]}'
                )
            case ToolArguments():
                return (
                    f'{{"tool_calls":[{{"index":{part.index},'
                    f'"function":{{"arguments":{quoted(part.fragment)}}}}}]}}'
                )

    def _chunk(self, index: int, delta: str, logprobs: str = "null", finish: str = "null") -> str:
        return self._envelope.chunk(
            f'{{"index":{index},"delta":{delta},"logprobs":{logprobs},"finish_reason":{finish}}}',
            self._usage,
        )


def finish_reason(delta: ChatDelta) -> str:
    """Return the API's word for why a choice ended."""
    return "stop" if delta.finish in (None, "abort") else str(delta.finish)


def _legacy(reason: str | None) -> str | None:
    return "function_call" if reason == "tool_calls" else reason
