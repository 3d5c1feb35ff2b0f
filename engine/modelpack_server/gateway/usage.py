"""Token counts and finish reasons, read from responses that pass through the gateway.

A response may be large, so it is neither stored nor parsed completely: containers without wanted
fields are skipped, and keys and values are truncated. Memory does not grow with the input.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from modelpack_server.gateway.traces import Trace

_LONGEST = 64  # bytes kept of a key or value
_MARK = re.compile(rb'["{}\[\],:]')
_BRACKET = re.compile(rb'["{}\[\]]')  # the marks that matter in a skipped container
_STRING = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"', re.DOTALL)
# Not repeated possessively: up to Python 3.11.4, what a failed repeat matched is kept.
_WHOLE_STRINGS = re.compile(rb'(?>(?:[^"]++|' + _STRING.pattern + rb")*)", re.DOTALL)
_NOT_BRACKETS = bytes(set(range(256)) - set(b"{}[]"))
_DEPTHS = {byte: 1 if byte in b"{[" else -1 for byte in b"{}[]"}
_SKIP = 16 * 1024  # the limit of bytes of a skipped container per step
_LEAST_SKIP = 512
_IN_STRING = re.compile(rb'[^"\\]*+(?:\\.[^"\\]*+)*+', re.DOTALL)


@dataclass(slots=True)
class _Field:
    """A key on the path to wanted fields; `name` is its dotted path if it is wanted itself."""

    name: str | None
    inner: dict[str, _Field]


@dataclass(slots=True)
class _Frame:
    """An open container; the objects in an array have the fields of the array."""

    field: _Field
    is_object: bool
    key: str | None = None

    def current(self) -> _Field | None:
        """Return the field of the next value, or None if it is not wanted."""
        if not self.is_object:
            return self.field
        return None if self.key is None else self.field.inner.get(self.key)


class JsonFields:
    """Calls `found(path, value)` for each scalar at a wanted path and `ended()` after a document.

    Paths are dotted keys, such as `choices.delta.content`, without arrays. Strings longer than 64
    bytes are truncated. The input may have several documents in a row.
    """

    def __init__(
        self,
        paths: Iterable[str],
        found: Callable[[str, Any], None],
        ended: Callable[[], None],
    ) -> None:
        self._root = _Field(None, {})
        for path in paths:
            field = self._root
            for key in path.split("."):
                field = field.inner.setdefault(key, _Field(None, {}))
            field.name = path
        self._found = found
        self._ended = ended
        self.reset()

    def reset(self) -> None:
        """Drop an unfinished document."""
        self._stack: list[_Frame] = []
        self._skipped = 0  # depth within a container without wanted fields
        self._in_string = False
        self._escaped = False
        self._text = bytearray()
        self._is_string = False

    @property
    def is_idle(self) -> bool:
        """Whether no document is open."""
        return not self._stack and not self._skipped and not self._in_string

    def read(self, document: bytes) -> None:
        """Read a text that is probably a whole document; faster than `feed` for a small one."""
        try:
            value = json.loads(document)
        except (ValueError, RecursionError):
            self.feed(document)
            return
        if isinstance(value, (dict, list)):
            self._walk(self._root, value)
            self._ended()

    def feed(self, piece: bytes) -> None:
        """Read the next piece of a document."""
        at, end, one_by_one = 0, len(piece), 0
        while at < end:
            if self._skipped and not self._in_string and one_by_one <= at < end - _LEAST_SKIP:
                block = min(_SKIP, end - at)
                at, before = self._skip(piece, at), at
                if at < before + block // 2:  # the end is near, or a long string follows
                    one_by_one = before + block
                if at == end:
                    return
            if self._escaped:
                self._escaped = False
                self._keep(piece[at : at + 1])
                at += 1
            elif self._in_string:
                at = self._read_string(piece, at)
            else:
                mark = (_BRACKET if self._skipped else _MARK).search(piece, at)
                if not self._is_string:  # only blanks follow a string
                    self._keep(piece[at : mark.start() if mark else end])
                if mark is None:
                    return
                self._take(mark[0])
                at = mark.end()

    def _skip(self, piece: bytes, at: int) -> int:
        """Return the position up to which a skipped container was read without its end."""
        whole = _WHOLE_STRINGS.match(piece, at, at + _SKIP)
        assert whole is not None, "the pattern matches the empty string"
        brackets = _STRING.sub(b"", whole[0]).translate(None, _NOT_BRACKETS)
        depths = list(accumulate(map(_DEPTHS.__getitem__, brackets), initial=self._skipped))
        if min(depths) <= 0:
            return at
        self._skipped = depths[-1]
        return whole.end()

    def _walk(self, field: _Field, value: Any) -> None:
        for item in value if isinstance(value, list) else (value,):
            if not isinstance(item, dict):
                continue
            for key, found in item.items():
                inner = field.inner.get(key)
                if inner is None:
                    continue
                if isinstance(found, (dict, list)):
                    self._walk(inner, found)
                elif inner.name is not None:
                    self._found(inner.name, found)

    def _read_string(self, piece: bytes, at: int) -> int:
        inside = _IN_STRING.match(piece, at)
        assert inside is not None, "the pattern matches the empty string"
        stop = inside.end()
        self._keep(piece[at:stop])
        if stop == len(piece):
            return stop
        if piece[stop : stop + 1] == b"\\":  # the last byte: the escaped byte is in the next piece
            self._escaped = True
            self._keep(b"\\")
        else:
            self._in_string = False
        return stop + 1

    def _keep(self, content: bytes) -> None:
        if not self._skipped and len(self._text) < _LONGEST:
            self._text += content[: _LONGEST - len(self._text)]

    def _take(self, mark: bytes) -> None:
        """Process a structural character."""
        if mark == b'"':
            self._in_string = True
            if not self._skipped:
                self._is_string = True
                self._text.clear()
        elif self._skipped:
            self._skipped += 1 if mark in b"{[" else -1
        elif mark in b"{[":
            self._open(is_object=mark == b"{")
        elif not self._stack:
            self._forget_text()
        elif mark == b":":
            self._stack[-1].key = _string(self._text) if self._is_string else None
            self._forget_text()
        else:
            self._report()
            self._stack[-1].key = None
            if mark in b"}]":
                self._stack.pop()
                if not self._stack:
                    self._ended()

    def _open(self, *, is_object: bool) -> None:
        self._forget_text()
        if not self._stack:
            self._stack.append(_Frame(self._root, is_object))
            return
        frame = self._stack[-1]
        field = frame.current()
        # An array in an array has no wanted fields, so the paths limit the stack's depth.
        if field is None or not field.inner or not (is_object or frame.is_object):
            self._skipped = 1
        else:
            self._stack.append(_Frame(field, is_object))

    def _report(self) -> None:
        frame = self._stack[-1]
        field = frame.current() if frame.is_object else None
        if field is not None and field.name is not None:
            if self._is_string:
                self._found(field.name, _string(self._text))
            elif text := bytes(self._text).strip():
                self._found(field.name, _scalar(text))
        self._forget_text()

    def _forget_text(self) -> None:
        self._text.clear()
        self._is_string = False


def _string(text: bytearray) -> str:
    """Return the string for its escaped bytes, which may be truncated."""
    try:
        value = json.loads(b'"' + text + b'"', strict=False)
    except ValueError:
        return text.decode(errors="replace")
    return str(value)


def _scalar(text: bytes) -> Any:
    """Return a number, a boolean or None; None also for invalid JSON."""
    try:
        return json.loads(text)
    except ValueError:
        return None


#: More tokens than any request has: a larger count is an error.
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
# The place of the usage: the reply or the last event in most APIs, the final event in Responses,
# and message_start in Anthropic's, whose output_tokens are preliminary.
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
_LONGEST_READ = 64 * 1024  # bytes of an event that are parsed in one step


class ReplyReader:
    """Sets the fields of `trace` from the pieces of the reply."""

    def __init__(self, trace: Trace, media_type: str) -> None:
        """`media_type` is the reply's media type without parameters."""
        self._trace = trace
        self._now = 0.0
        self._json = JsonFields(_PATHS, self._found, self._ended)
        self._events = _Lines(self._json, is_sse=media_type == "text/event-stream")
        self._streams = media_type in ("text/event-stream", "application/x-ndjson")
        self._reads = self._streams or media_type == "application/json"
        # State of the current document.
        self._kind: Any = None
        self._tokens = 0
        self._counts: dict[str, dict[str, int]] = {}
        # Values of the latest documents that had any.
        self._usage: dict[str, int] = {}

    def feed(self, piece: bytes, now: float) -> None:
        """Read the next piece, which arrived at `now`."""
        self._now = now
        if self._streams:
            if not self._trace.counts_known or b'_reason":"' in piece:
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
        """Use the values of a document."""
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
        # A rerank response has only the total.
        total = get("total_tokens") if completion is None else None
        prompt = _first(get("prompt_tokens"), get("input_tokens"), total)
        read, created = get("cache_read_input_tokens"), get("cache_creation_input_tokens")
        if prompt is not None:  # Anthropic's count excludes tokens of the cache
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
    """Feeds the documents of a stream, in lines or in SSE's data fields, to `documents`."""

    def __init__(self, documents: JsonFields, *, is_sse: bool) -> None:
        self._documents = documents
        self._is_sse = is_sse
        self._head = b""  # the beginning of a line whose field is not known yet
        self._is_data: bool | None = None  # None at the beginning of a line
        self._after_cr = False

    def feed(self, piece: bytes) -> None:
        if self._after_cr and piece.startswith(b"\n"):
            piece = piece[1:]  # the second half of CR LF
        if piece:
            self._after_cr = piece.endswith(b"\r")
        for line in piece.splitlines(keepends=True):
            self._take(line)

    def _take(self, part: bytes) -> None:
        """Process a line or a part of one."""
        ends = part.endswith((b"\n", b"\r"))
        if self._is_data is None:
            part, self._head = self._head + part, b""
            if not ends and len(part) < len(b"data:") and self._is_sse:
                self._head = part
                return
            is_blank = not part.strip(b"\r\n")
            if is_blank or not self._is_sse:
                self._documents.reset()  # the previous document has ended
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
