"""OpenAI's harmony format: messages with a channel, a recipient and a content type.

Source: OpenAI's description of the harmony response format. A message is
<|start|>assistant<|channel|>CHANNEL<|message|>BODY<|end|>; the prompt ends within the first one,
usually after `assistant`. A recipient, ` to=functions.NAME`, after the role or the channel makes
the message a call. The channels are analysis (reasoning), commentary (calls, and text before them)
and final. <|call|> ends a call and <|return|> the reply.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from modelpack_server.tool_parsers.calls import Found, read_object
from modelpack_server.tool_parsers.source import NotACall, Reading, Source, stops

_START, _CHANNEL, _CONSTRAIN = "<|start|>", "<|channel|>", "<|constrain|>"
_MESSAGE, _END, _CALL, _RETURN = "<|message|>", "<|end|>", "<|call|>", "<|return|>"
_HEADER = stops(_START, _CHANNEL, _CONSTRAIN, _MESSAGE, _END, _CALL, _RETURN)
_BODY_ENDS = stops(_END, _CALL, _RETURN, _START, _CHANNEL)
_RECIPIENT = re.compile(r"(?:^|\s)to=([^\s<]+)")
_HEADER_LIMIT = 1024  # characters; real headers are short
_BETWEEN = "\n\n"  # separates the texts of two messages


def read_harmony(source: Source, found: Found, *, starts_reasoning: bool) -> Reading[None]:
    """Read a whole reply, which continues the prompt's last message."""
    messages = _Messages(source, found)
    if starts_reasoning:
        yield from messages.body("analysis")
    while (yield from source.peek()):
        if not (yield from _begins_with_header(source)):
            yield from messages.body("final")
            continue
        try:
            channel, recipient = yield from _header(source)
        except NotACall:  # the header is incomplete, and contains no text
            source.forget()
            continue
        if recipient:
            yield from messages.call(recipient, channel)
        else:
            yield from messages.body(channel)
        source.forget()


def _begins_with_header(source: Source) -> Reading[bool]:
    """Return whether `<|start|>assistant` or the rest of a header is next; consume nothing."""
    start = source.position
    yield from source.spaces()
    yield from source.accept("assistant")
    yield from source.spaces()
    found = yield from source.accept("to=")
    for token in () if found else (_CHANNEL, _START, _CONSTRAIN, _MESSAGE):
        found = found or (yield from source.accept(token))
    source.back_to(start)
    return found


def _header(source: Source) -> Reading[tuple[str, str]]:
    """Read through <|message|>; return the channel and the recipient, each possibly "".

    Raises `NotACall` if the header does not end. The caller drops it, since it contains no text.
    """
    channel = recipient = ""
    in_channel = False
    while True:
        text, stop = yield from source.until(_HEADER, _HEADER_LIMIT)
        if found := _RECIPIENT.search(text):
            recipient = found[1]
        if in_channel:
            words = text.split()
            channel = words[0] if words else ""
        in_channel = stop == _CHANNEL
        if stop == _MESSAGE:
            return channel, recipient
        if stop == _START:
            channel = recipient = ""


class _Messages:
    def __init__(self, source: Source, found: Found) -> None:
        self._source = source
        self._found = found
        self._spoke: set[str] = set()  # the kinds of content, text or reasoning, emitted so far

    def call(self, recipient: str, channel: str) -> Reading[None]:
        source, found = self._source, self._found
        name = recipient if recipient in found.tools else recipient.removeprefix("functions.")
        found.thinking = False
        start = source.position
        try:
            yield from source.spaces()
            if not name or name not in found.tools:
                raise NotACall
            if (yield from source.peek()) == "{":
                yield from read_object(source, found, name)
            else:
                body, _ = yield from source.until(_BODY_ENDS, 16)
                if body.strip():
                    raise NotACall
                found.whole(name, {})
                return
        except NotACall:  # an unknown tool: show the message as text
            source.back_to(start)
            yield from self.body(channel)
            return
        yield from self._end(lambda text: None)  # what follows the arguments

    def body(self, channel: str) -> Reading[None]:
        """Emit a message: reasoning in the channel analysis, otherwise text."""
        found = self._found
        thinks = found.thinking = channel == "analysis"
        hand_out = found.reasoning if thinks else found.text
        kind = "reasoning" if thinks else "text"
        separator = _BETWEEN if kind in self._spoke else ""

        def emit(text: str) -> None:
            nonlocal separator
            if text:
                hand_out(separator + text)
                separator = ""
                self._spoke.add(kind)

        if (yield from self._end(emit)) and thinks:
            found.end_reasoning(lines_follow=False)

    def _end(self, emit: Callable[[str], None]) -> Reading[bool]:
        """Pass the rest of the message to `emit`; return whether the message has an end."""
        stop = yield from self._source.hand_out(_BODY_ENDS, emit)
        if stop in (_END, _CALL, _RETURN):
            self._source.advance(len(stop))
        return stop is not None
