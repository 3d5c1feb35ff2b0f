"""ReplyReader: token counts, finish reason and times of tokens, read from a reply that passes by.

Only the fields where an API reports its usage count. What a reply repeats of its request (such as
`metadata`) or generates stands elsewhere, whatever it looks like.
"""

from __future__ import annotations

import re
from typing import Any

from modelpack_server.gateway.json_fields import JsonFields
from modelpack_server.gateway.traces import Trace

#: More tokens than any request takes: a larger count is a mistake.
MOST_TOKENS = 100_000_000

_FINISH = re.compile(r"\w{1,24}")
_FINISH_PATHS = frozenset(
    ("choices.finish_reason", "stop_reason", "delta.stop_reason", "done_reason")
)
_TEXT_PATHS = frozenset((
    "choices.text", "choices.delta.content", "choices.delta.reasoning_content",
    "choices.delta.reasoning", "choices.delta.tool_calls.function.arguments",
    "delta",  # Responses
    "delta.text", "delta.thinking", "delta.partial_json",  # Anthropic
    "response", "message.content", "message.thinking", "thinking",  # Ollama
))  # fmt: skip
# Where usage stands: in a reply or the last event of most APIs, in the event of Responses that
# ends it, and in Anthropic's message_start, whose output_tokens are those of its beginning.
_FINAL = ""
_RESPONSE = "response."
_MESSAGE = "message."
_COUNTS = (
    "prompt_tokens", "completion_tokens", "total_tokens", "input_tokens", "output_tokens",
    "prompt_tokens_details.cached_tokens", "input_tokens_details.cached_tokens",
    "cache_read_input_tokens", "cache_creation_input_tokens",
)  # fmt: skip
_USAGE_PATHS = {
    f"{place}usage.{count}": (place, count)
    for place in (_FINAL, _RESPONSE, _MESSAGE)
    for count in _COUNTS
} | {
    "prompt_eval_count": (_FINAL, "prompt_tokens"),  # Ollama
    "eval_count": (_FINAL, "completion_tokens"),
    "input_tokens": (_FINAL, "input_tokens"),  # Anthropic's count_tokens
}
_PATHS = (*_USAGE_PATHS, *_FINISH_PATHS, *_TEXT_PATHS, "type")
_RESPONSE_ENDS = ("response.completed", "response.incomplete", "response.failed")
_LONGEST_READ = 64 * 1024  # bytes of an event that are parsed at once


class ReplyReader:
    """Fills in `trace` from the pieces of its reply."""

    def __init__(self, trace: Trace, media_type: str) -> None:
        """`media_type` is the reply's, without parameters."""
        self._trace = trace
        self._now = 0.0
        self._json = JsonFields(_PATHS, self._found, self._ended)
        self._events = _Lines(self._json, is_sse=media_type == "text/event-stream")
        self._streams = media_type in ("text/event-stream", "application/x-ndjson")
        self._reads = self._streams or media_type == "application/json"
        # Of the document that is being read.
        self._kind: Any = None
        self._tokens = 0
        self._counts: dict[str, dict[str, int]] = {}
        # Of the last documents that had any.
        self._usage: dict[str, int] = {}

    def feed(self, piece: bytes, now: float) -> None:
        """Read the next piece, which came at `now`."""
        self._now = now
        if self._streams:
            self._events.feed(piece)
        elif self._reads:
            self._json.feed(piece)

    def _found(self, path: str, value: Any) -> None:
        if path in _USAGE_PATHS:
            place, count = _USAGE_PATHS[path]
            if type(value) is int and 0 <= value <= MOST_TOKENS:
                self._counts.setdefault(place, {})[count] = value
        elif path in _FINISH_PATHS:
            if isinstance(value, str) and _FINISH.fullmatch(value):
                self._trace.finish = value
        elif path == "type":
            self._kind = value
        elif isinstance(value, str) and value:
            self._tokens += 1

    def _ended(self) -> None:
        """Take over what a document said."""
        trace = self._trace
        if self._tokens and self._streams:
            trace.counted_tokens += self._tokens
            trace.last_token_at = self._now
            if trace.first_token_at is None:
                trace.first_token_at = self._now
        for place, counts in self._counts.items():
            if place == _RESPONSE and self._kind not in _RESPONSE_ENDS:
                continue
            if place == _MESSAGE:
                counts.pop("output_tokens", None)
            self._usage |= counts
        if self._counts:
            self._take_usage()
        self._kind, self._tokens = None, 0
        self._counts.clear()

    def _take_usage(self) -> None:
        trace, get = self._trace, self._usage.get
        completion = _first(get("completion_tokens"), get("output_tokens"))
        total = get("total_tokens") if completion is None else None  # all there is of a rerank
        prompt = _first(get("prompt_tokens"), get("input_tokens"), total)
        read, created = get("cache_read_input_tokens"), get("cache_creation_input_tokens")
        if prompt is not None:  # Anthropic's leave out what came from the cache or went there
            prompt += (read or 0) + (created or 0)
        cached = _first(
            get("prompt_tokens_details.cached_tokens"),
            get("input_tokens_details.cached_tokens"),
            read,
        )
        trace.prompt_tokens = _first(prompt, trace.prompt_tokens)
        trace.cached_tokens = _first(cached, trace.cached_tokens)
        trace.completion_tokens = _first(completion, trace.completion_tokens)


class _Lines:
    """Feeds the documents of a stream to `documents`: of its lines, or of SSE's data fields."""

    def __init__(self, documents: JsonFields, *, is_sse: bool) -> None:
        self._documents = documents
        self._is_sse = is_sse
        self._head = b""  # of a line whose field is not known yet
        self._is_data: bool | None = None  # None at the beginning of a line
        self._after_cr = False

    def feed(self, piece: bytes) -> None:
        if self._after_cr and piece.startswith(b"\n"):
            piece = piece[1:]  # one line break, cut in two
        if piece:
            self._after_cr = piece.endswith(b"\r")
        for line in piece.splitlines(keepends=True):
            self._take(line)

    def _take(self, part: bytes) -> None:
        """Take a line, or a part of one."""
        ends = part.endswith((b"\n", b"\r"))
        if self._is_data is None:
            part, self._head = self._head + part, b""
            if not ends and len(part) < len(b"data:") and self._is_sse:
                self._head = part
                return
            is_blank = not part.strip(b"\r\n")
            if is_blank or not self._is_sse:
                self._documents.reset()  # whatever went before has ended
            self._is_data = part.startswith(b"data:") if self._is_sse else True
            if self._is_data:
                content = part[len(b"data:") :] if self._is_sse else part
                if ends and self._documents.is_idle and len(content) <= _LONGEST_READ:
                    self._documents.read(content)
                else:
                    self._documents.feed(content)
        elif self._is_data:
            self._documents.feed(part)
        if ends:
            self._is_data = None


def _first(*counts: int | None) -> int | None:
    return next((count for count in counts if count is not None), None)
