"""What a reply that passes by tells of itself: token counts, how it ended, when tokens came.

The bytes are looked through, not parsed: a pattern with its closing quote cannot occur inside a
JSON string, where quotes are escaped. Only the last few bytes of a piece are kept for the next.
"""

from __future__ import annotations

import re

from modelpack.gateway.families import Family
from modelpack.gateway.traces import Trace

_CARRY = 64  # longer than the longest field below with its value
_COUNT = re.compile(
    rb'"(prompt_tokens|completion_tokens|input_tokens|output_tokens|cached_tokens'
    rb"|cache_read_input_tokens|cache_creation_input_tokens|prompt_eval_count|eval_count)"
    rb'"\s{0,4}:\s{0,4}(\d{1,15})'
)
# finish_reason, stop_reason or done_reason; a pattern that begins with a literal is found fast.
_FINISH = re.compile(rb'_reason"\s{0,4}:\s{0,4}"(\w{1,24})"')
_TOKEN = re.compile(
    rb'"(?:content|reasoning_content|reasoning|text|response|thinking|arguments|partial_json|delta)'
    rb'"\s{0,4}:\s{0,4}"(?!")'
)
_STREAMS = ("text/event-stream", "application/x-ndjson")


class ReplyReader:
    """Fills in `trace` from the pieces of its reply."""

    def __init__(self, trace: Trace, media_type: str) -> None:
        """`media_type` is the reply's, without parameters."""
        self._trace = trace
        self._streams = media_type in _STREAMS
        self._reads = self._streams or media_type == "application/json"
        self._carry = b""
        self._counts: dict[bytes, int] = {}

    def feed(self, piece: bytes, now: float) -> None:
        """Read the next piece, which came at `now`."""
        if not self._reads or not piece:
            return
        if self._streams:
            tokens = len(_TOKEN.findall(piece))
            if tokens:
                self._trace.counted_tokens += tokens
                self._trace.last_token_at = now
                if self._trace.first_token_at is None:
                    self._trace.first_token_at = now
        window = self._carry + piece
        if b"_reason" in window:
            for match in _FINISH.finditer(window):
                self._trace.finish = match[1].decode()
        if b"_tokens" in window or b"eval_count" in window:
            self._count(window)
        self._carry = window[-_CARRY:]

    def _count(self, window: bytes) -> None:
        for match in _COUNT.finditer(window):
            self._counts[match[1]] = int(match[2])
        counts = self._counts
        trace = self._trace
        if trace.family is Family.ANTHROPIC:
            # Its input_tokens leave out what came from the cache or went there.
            cached = counts.get(b"cache_read_input_tokens")
            created = counts.get(b"cache_creation_input_tokens", 0)
            prompt = counts.get(b"input_tokens")
            if prompt is not None:
                prompt += (cached or 0) + created
            completion = counts.get(b"output_tokens")
        else:
            cached = counts.get(b"cached_tokens")
            prompt = _first(counts, b"prompt_tokens", b"input_tokens", b"prompt_eval_count")
            completion = _first(counts, b"completion_tokens", b"output_tokens", b"eval_count")
        trace.prompt_tokens = prompt if prompt is not None else trace.prompt_tokens
        trace.cached_tokens = cached if cached is not None else trace.cached_tokens
        trace.completion_tokens = completion if completion is not None else trace.completion_tokens


def _first(counts: dict[bytes, int], *names: bytes) -> int | None:
    return next((counts[name] for name in names if name in counts), None)
