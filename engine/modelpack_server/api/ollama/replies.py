"""Responses of the Ollama API: a line for each delta, then one with counts and durations."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from modelpack_engine.outputs import Timing, TokenLogprob
from modelpack_server.api.ollama.ndjson import now
from modelpack_server.api.vocabulary import Vocabulary
from modelpack_server.conversation.spec import ChatDelta, ChatUsage
from modelpack_server.tool_parsers.parts import Reasoning, Text, ToolArguments, ToolStart

_NANOSECONDS = 10**9


@dataclass(slots=True)
class Clock:
    """When a request arrived and when its model was loaded, in monotonic nanoseconds."""

    began: int = field(default_factory=time.monotonic_ns)
    loaded: int = 0

    def model_is_there(self) -> None:
        self.loaded = time.monotonic_ns()

    @property
    def total(self) -> int:
        """Nanoseconds since the request arrived."""
        return time.monotonic_ns() - self.began

    @property
    def load(self) -> int:
        """Nanoseconds until the model was loaded."""
        return max(0, self.loaded - self.began)


@dataclass(slots=True)
class Pieces:
    """The content of one or more deltas: text, thinking, complete tool calls, logprobs."""

    text: str = ""
    thinking: str = ""
    calls: list[dict[str, Any]] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.text or self.thinking or self.calls or self.logprobs)

    def add(self, other: Pieces) -> None:
        """Append the content of later deltas."""
        self.text += other.text
        self.thinking += other.thinking
        self.calls += other.calls
        self.logprobs += other.logprobs


class Reader:
    """Reads the deltas of one reply; holds tool calls back until they are complete."""

    def __init__(self, *, logprobs: bool) -> None:
        self._logprobs = logprobs
        self._call: ToolStart | None = None  # the incomplete call, and its arguments so far
        self._fragments: list[str] = []
        self.usage: ChatUsage | None = None
        self.timing: Timing | None = None
        self.done_reason = "stop"
        self.token_ids: list[int] = []

    def take(self, delta: ChatDelta) -> Pieces:
        """Return the new content of a delta."""
        pieces = Pieces()
        self.token_ids += delta.token_ids
        if self._logprobs and delta.logprobs:
            pieces.logprobs += delta.logprobs
        for part in delta.parts:
            match part:
                case ToolArguments():
                    self._fragments.append(part.fragment)
                case ToolStart():
                    self._complete(pieces)
                    self._call = part
                case Text():
                    self._complete(pieces)
                    pieces.text += part.text
                case Reasoning():
                    self._complete(pieces)
                    pieces.thinking += part.text
        if delta.finish is not None:
            self._complete(pieces)
            self.usage, self.timing = delta.usage, delta.timing
            self.done_reason = "length" if delta.finish == "length" else "stop"
        return pieces

    def _complete(self, pieces: Pieces) -> None:
        call, text = self._call, "".join(self._fragments)
        self._call, self._fragments = None, []
        if call is None:
            return
        try:
            arguments = json.loads(text or "{}")
        except ValueError:  # the reply ended within the arguments
            return
        function = {"index": call.index, "name": call.name, "arguments": arguments}
        pieces.calls.append({"id": call.id, "function": function})


def counts(clock: Clock, reader: Reader) -> dict[str, Any]:
    """Return the finish reason, token counts and durations of a reply."""
    usage, timing = reader.usage, reader.timing
    prompt = answer = 0.0
    if timing is not None:
        first = timing.finished if timing.first_token is None else timing.first_token
        prompt = first - (timing.arrived if timing.scheduled is None else timing.scheduled)
        answer = timing.finished - first
    return {
        "done": True,
        "done_reason": reader.done_reason,
        "total_duration": clock.total,
        "load_duration": clock.load,
        "prompt_eval_count": usage.prompt_tokens if usage else 0,
        "prompt_eval_duration": round(max(0.0, prompt) * _NANOSECONDS),
        "eval_count": usage.completion_tokens if usage else 0,
        "eval_duration": round(max(0.0, answer) * _NANOSECONDS),
    }


#: Returns pieces as the fields of a route's objects.
Body = Callable[[Pieces], dict[str, Any]]


def generated(pieces: Pieces) -> dict[str, Any]:
    """Return pieces as fields of /api/generate."""
    thinking = {"thinking": pieces.thinking} if pieces.thinking else {}
    return {"response": pieces.text} | thinking


def message(pieces: Pieces) -> dict[str, Any]:
    """Return pieces as fields of /api/chat."""
    body: dict[str, Any] = {"role": "assistant", "content": pieces.text}
    if pieces.thinking:
        body["thinking"] = pieces.thinking
    if pieces.calls:
        body["tool_calls"] = pieces.calls
    return {"message": body}


class Writer:
    """Builds the JSON objects of one reply."""

    def __init__(self, model: str, body: Body, words: Vocabulary | None) -> None:
        self._model = model
        self._body = body
        self._words = words

    def write(self, pieces: Pieces, ending: dict[str, Any] | None = None) -> dict[str, Any]:
        """Return the object for pieces; `ending` has the additional fields of the last object."""
        made = {"model": self._model, "created_at": now(), **self._body(pieces)}
        if self._words is not None and pieces.logprobs:
            made["logprobs"] = [self._logprob(item, self._words) for item in pieces.logprobs]
        return made | ({"done": False} if ending is None else ending)

    def _logprob(self, item: TokenLogprob, words: Vocabulary) -> dict[str, Any]:
        found = _token(item.token_id, item.logprob, words, item.data)
        if item.top:
            found["top_logprobs"] = [_token(token, value, words) for token, value in item.top]
        return found


def _token(
    token_id: int, logprob: float, words: Vocabulary, data: bytes | None = None
) -> dict[str, Any]:
    text, raw = words.shown(token_id, data)
    return {"token": text, "logprob": logprob, "bytes": raw}


def unanswered(model: str, body: Body, reason: str, clock: Clock) -> dict[str, Any]:
    """Return the reply to a request without a prompt, which only loaded or unloaded its model."""
    head = {"model": model, "created_at": now(), **body(Pieces())}
    return head | {
        "done": True, "done_reason": reason,
        "total_duration": clock.total, "load_duration": clock.load,
    }  # fmt: skip
