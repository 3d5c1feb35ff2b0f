"""The collector for readers: it emits text, reasoning and calls as parts."""

from __future__ import annotations

import json
import re
import secrets
import string
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from modelpack_server.tool_parsers.json_text import JsonScanner, dump
from modelpack_server.tool_parsers.parts import (
    Part,
    Reasoning,
    Text,
    Tool,
    ToolArguments,
    ToolStart,
)
from modelpack_server.tool_parsers.source import MAX_HELD, Broken, NotACall, Reading, Source, Stops

_NEWLINES = "\r\n"
_ALPHANUMERIC = string.ascii_letters + string.digits
_MISTRAL_ID = re.compile(r"[a-zA-Z0-9]{9}")


class Enough(Exception):
    """Raised after the first call if parallel calls are not allowed."""


def new_call_id() -> str:
    """Return a new call id in the form of OpenAI's API."""
    return "call_" + secrets.token_hex(12)


def new_mistral_id() -> str:
    """Return a new call id for Mistral's templates, which require nine letters and digits."""
    return "".join(secrets.choice(_ALPHANUMERIC) for _ in range(9))


def is_mistral_id(text: str) -> bool:
    return _MISTRAL_ID.fullmatch(text) is not None


class Found:
    """Collects parts, without the whitespace that belongs to the layout of markup.

    Whitespace next to markup and before, between and after calls is dropped; whitespace between two
    texts is kept. If there are tools, a call may follow at any time, so trailing whitespace is held
    back.
    """

    def __init__(self, tools: Sequence[Tool], *, parallel: bool, mistral_ids: bool = False) -> None:
        self.tools: Mapping[str, Tool] = {tool.name: tool for tool in tools}
        self.calls = 0
        self.any_text = False
        self.thinking = False
        self.cut = False  # the output ended at its limit: a call in it stays incomplete
        self._parallel = parallel
        self._new_id = new_mistral_id if mistral_ids else new_call_id
        self._mistral_ids = mistral_ids
        self._parts: list[Part] = []
        self._spaces = ""
        self._thought_spaces = ""
        self._skips_newlines = False  # after and at the beginning of a block of reasoning

    def take(self) -> list[Part]:
        parts, self._parts = self._parts, []
        return parts

    def text(self, text: str) -> None:
        if self._skips_newlines:
            text = text.lstrip(_NEWLINES)
        if not text:
            return
        self._skips_newlines = False
        text = self._spaces + text
        kept = text.rstrip() if self.tools else text
        self._spaces = text[len(kept) :]
        if not self.any_text and self.calls:
            kept = kept.lstrip()
        if kept:
            self.any_text = True
            self._add(Text(kept))

    def begin_reasoning(self) -> None:
        self.thinking = True
        self._skips_newlines = True

    def reasoning(self, text: str) -> None:
        if self._skips_newlines:
            text = text.lstrip(_NEWLINES)
        if not text:
            return
        self._skips_newlines = False
        text = self._thought_spaces + text
        kept = text.rstrip()
        self._thought_spaces = text[len(kept) :]
        if kept:
            self._add(Reasoning(kept))

    def end_reasoning(self, *, lines_follow: bool = True) -> None:
        """End a block of reasoning; with `lines_follow`, line breaks after it are layout."""
        self.thinking = False
        self._thought_spaces = ""
        self._skips_newlines = lines_follow

    def known(self, name: str) -> Tool:
        """Return the tool with this name; raises `NotACall` if the request has none."""
        tool = self.tools.get(name)
        if tool is None:
            raise NotACall
        return tool

    def start(self, name: str, call_id: str | None = None) -> None:
        """Begin a call; afterwards it cannot become text any more."""
        self.known(name)
        if self.calls and not self._parallel:
            raise Enough
        if not call_id or (self._mistral_ids and not is_mistral_id(call_id)):
            call_id = self._new_id()
        self._parts.append(ToolStart(self.calls, call_id, name))
        self.calls += 1

    def arguments(self, fragment: str) -> None:
        """Emit a piece of the arguments of the latest call."""
        if fragment:
            self._add(ToolArguments(self.calls - 1, fragment))

    def _add(self, part: Part) -> None:
        """Add a part, joined with the last part if that is of the same text or call."""
        match self._parts[-1:], part:
            case [Text(last)], Text(text):
                self._parts[-1] = Text(last + text)
            case [Reasoning(last)], Reasoning(text):
                self._parts[-1] = Reasoning(last + text)
            case [ToolArguments(call, last)], ToolArguments(index, text) if call == index:
                self._parts[-1] = ToolArguments(index, last + text)
            case _:
                self._parts.append(part)

    def whole(self, name: str, arguments: Mapping[str, Any], call_id: str | None = None) -> None:
        """Emit a complete call; raises `NotACall` if the arguments are not JSON."""
        try:
            text = dump(dict(arguments))
        except ValueError:
            raise NotACall from None
        self.start(name, call_id)
        self.arguments(text)

    def finish(self) -> None:
        """Emit the whitespace held back that turns out to be text, since the output has ended."""
        if self._spaces and not self.calls:
            self._parts.append(Text(self._spaces))
        if self._thought_spaces:
            self._parts.append(Reasoning(self._thought_spaces))
        self._spaces = self._thought_spaces = ""


Reader = Callable[[Source, Found], Reading[None]]


def read_object(
    source: Source, found: Found, name: str, call_id: str | None = None
) -> Reading[bool]:
    """Read an object and emit it, piece by piece, as the arguments of a new call.

    Returns False if the object is incomplete or invalid, after completing the arguments, unless the
    output was cut. Raises `NotACall` if the next text is not an object.
    """
    found.known(name)
    if (yield from source.peek()) != "{":
        raise NotACall
    found.start(name, call_id)
    source.forget()
    scanner = JsonScanner()
    while True:
        source.advance(scanner.scan(source.rest))
        found.arguments(scanner.take())
        if scanner.done:
            return True
        source.forget()
        if scanner.failed or not (yield from source.more()):
            cut = found.cut and not scanner.failed
            found.arguments(scanner.held() if cut else scanner.completion())
            return False


def read_value(source: Source) -> Reading[Any]:
    """Read a JSON value with its mistakes corrected; raises `NotACall` if there is none."""
    scanner = JsonScanner()
    start = source.position
    pieces = []
    while True:
        source.advance(scanner.scan(source.rest))
        pieces.append(scanner.take())
        if scanner.done:
            return json.loads("".join(pieces))
        if scanner.failed or source.position - start > MAX_HELD:
            raise NotACall
        if not (yield from source.more()):
            scanner.end_atom()
            if not scanner.done:
                raise NotACall


@dataclass(slots=True)
class Members:
    """Emits arguments as members of an object: strings piece by piece, other values whole.

    The call begins with its first argument, or at its end if it has none. Until then, the text may
    turn out not to be a call.
    """

    found: Found
    name: str
    call_id: str | None = None
    _count: int = 0
    begun: bool = False

    def begin(self) -> None:
        if not self.begun:
            self.found.start(self.name, self.call_id)
            self.found.arguments("{")
            self.begun = True

    def add(self, key: str, value: Any, raw: str) -> None:
        """Emit one argument; `raw` is its text, used if JSON cannot represent `value`."""
        try:
            spelled = dump(value)
        except ValueError:
            spelled = dump(raw)
        self._key(key)
        self.found.arguments(spelled)

    def _key(self, key: str) -> None:
        self.begin()
        separator = ", " if self._count else ""
        self.found.arguments(f"{separator}{dump(key)}: ")
        self._count += 1

    def end(self) -> None:
        self.begin()
        self.found.arguments("}")

    @contextmanager
    def completed(self) -> Iterator[None]:
        """Complete the arguments, unless the output was cut, and raise `Broken` if the block raises
        `NotACall` after the call has begun."""
        try:
            yield
        except NotACall:
            if not self.begun:
                raise
            if not self.found.cut:
                self.end()
            raise Broken from None

    def read_string(
        self, source: Source, key: str, ends: Stops, *, trims: bool = False
    ) -> Reading[str]:
        """Read a string through one of `ends`, emit it piece by piece, and return that end.

        `trims`: a line break at the beginning and one at the end are layout. Raises `Broken`, after
        completing the arguments unless it was cut, if the output ends within the string.
        """
        self._key(key)
        self.found.arguments('"')
        held, at_start = "", trims

        def emit(text: str) -> None:
            nonlocal held, at_start
            text = held + text
            if at_start and text:
                text, at_start = text.removeprefix("\n"), False
            kept = text.removesuffix("\n") if trims else text
            held = text[len(kept) :]
            self.found.arguments(dump(kept)[1:-1])

        end = yield from source.hand_out(ends, emit)
        if end is None and self.found.cut:
            raise Broken
        self.found.arguments('"')
        if end is None:
            self.end()
            raise Broken
        source.advance(len(end))
        return end


def read_each(
    reader: Reader, opening: str, closing: str, source: Source, found: Found
) -> Reading[None]:
    """Read calls that begin with `opening`, up to `closing`, which is optional."""
    read = 0
    while True:
        yield from source.spaces()
        if read and (yield from source.close(closing)):
            return
        if not (yield from source.accept(opening)):
            if read:
                return
            raise NotACall
        yield from reader(source, found)
        source.forget()
        read += 1
