"""What a reader has found: text, thoughts and calls, handed out as parts."""

from __future__ import annotations

import re
import secrets
import string
from collections.abc import Mapping, Sequence
from typing import Any

from modelpack_server.tool_parsers.json_text import JsonScanner, dump
from modelpack_server.tool_parsers.parts import Part, Reasoning, Text, ToolArguments, ToolStart
from modelpack_server.tool_parsers.source import NotACall, Reading, Source
from modelpack_server.tool_parsers.tools import Tool

_NEWLINES = "\r\n"
_ALPHANUMERIC = string.ascii_letters + string.digits
_MISTRAL_ID = re.compile(r"[a-zA-Z0-9]{9}")


class Enough(Exception):
    """The first call is complete, and no other is wanted."""


def new_call_id() -> str:
    """Return an id as OpenAI's API has them."""
    return "call_" + secrets.token_hex(12)


def new_mistral_id() -> str:
    """Return an id as Mistral's templates insist on: nine letters and digits."""
    return "".join(secrets.choice(_ALPHANUMERIC) for _ in range(9))


def is_mistral_id(text: str) -> bool:
    return _MISTRAL_ID.fullmatch(text) is not None


class Found:
    """Collects parts. Whitespace next to markup is layout, not text, and is left out.

    So is all whitespace before, between and after calls; between two texts, it stays. Whether a
    call follows is known late, hence trailing whitespace is held back, while tools are offered.
    """

    def __init__(self, tools: Sequence[Tool], *, parallel: bool, mistral_ids: bool = False) -> None:
        self.tools: Mapping[str, Tool] = {tool.name: tool for tool in tools}
        self.calls = 0
        self.any_text = False
        self.thinking = False
        self._parallel = parallel
        self._new_id = new_mistral_id if mistral_ids else new_call_id
        self._mistral_ids = mistral_ids
        self._parts: list[Part] = []
        self._spaces = ""
        self._thought_spaces = ""
        self._skips_newlines = False  # after a block of reasoning, and at the beginning of one

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
            last = self._parts[-1] if self._parts else None
            if isinstance(last, Text):
                self._parts[-1] = Text(last.text + kept)
            else:
                self._parts.append(Text(kept))

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
            last = self._parts[-1] if self._parts else None
            if isinstance(last, Reasoning):
                self._parts[-1] = Reasoning(last.text + kept)
            else:
                self._parts.append(Reasoning(kept))

    def end_reasoning(self, *, lines_follow: bool = True) -> None:
        """End a block; `lines_follow` says that line breaks after it are layout, too."""
        self.thinking = False
        self._thought_spaces = ""
        self._skips_newlines = lines_follow

    def known(self, name: str) -> Tool:
        """Return the tool of this name; raises `NotACall` if none was offered."""
        tool = self.tools.get(name)
        if tool is None:
            raise NotACall
        return tool

    def start(self, name: str, call_id: str | None = None) -> None:
        """Begin a call: from here on it cannot be taken back."""
        self.known(name)
        if self.calls and not self._parallel:
            raise Enough
        if not call_id or (self._mistral_ids and not is_mistral_id(call_id)):
            call_id = self._new_id()
        self._parts.append(ToolStart(self.calls, call_id, name))
        self.calls += 1

    def arguments(self, fragment: str) -> None:
        """Hand out a piece of the arguments of the call that began last."""
        if not fragment:
            return
        index = self.calls - 1
        last = self._parts[-1] if self._parts else None
        if isinstance(last, ToolArguments) and last.index == index:
            self._parts[-1] = ToolArguments(index, last.fragment + fragment)
        else:
            self._parts.append(ToolArguments(index, fragment))

    def whole(self, name: str, arguments: Mapping[str, Any], call_id: str | None = None) -> None:
        """Hand out a call that was read completely; raises `NotACall` for what is no JSON."""
        try:
            text = dump(dict(arguments))
        except ValueError:
            raise NotACall from None
        self.start(name, call_id)
        self.arguments(text)

    def finish(self) -> None:
        """No more comes: hand out what whitespace is text after all."""
        if self._spaces and not self.calls:
            spaces, self._spaces = self._spaces, ""
            self._parts.append(Text(spaces))
        if self._thought_spaces:
            spaces, self._thought_spaces = self._thought_spaces, ""
            self._parts.append(Reasoning(spaces))


def read_object(
    source: Source, found: Found, name: str, call_id: str | None = None
) -> Reading[bool]:
    """Read an object and hand it out, as it comes, as the arguments of a call that begins with it.

    Returns False if it breaks off or is none any more: then it was completed.
    Raises `NotACall` if no object comes next.
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
            found.arguments(scanner.completion())
            return False


def capture_value(source: Source, limit: int) -> Reading[str]:
    """Read any JSON value and return its text, mended; raises `NotACall` if there is none."""
    scanner = JsonScanner()
    start = source.position
    pieces = []
    while True:
        source.advance(scanner.scan(source.rest))
        pieces.append(scanner.take())
        if scanner.done:
            return "".join(pieces)
        if scanner.failed or source.position - start > limit:
            raise NotACall
        if not (yield from source.more()):
            scanner.end_atom()
            if not scanner.done:
                raise NotACall
