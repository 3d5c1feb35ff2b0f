"""Text that arrives in pieces, for readers written as generators.

A reader is written as if all text were there; wherever it cannot decide, it yields, and goes on
when the next piece has come. How a text was cut into pieces therefore makes no difference to what
is read.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Generator, Iterable
from typing import TypeVar

T = TypeVar("T")
Reading = Generator[None, None, T]

MAX_NAME = 256  # characters of a tool's or a parameter's name
MAX_HELD = 1 << 18  # characters of a block that is held back until it is closed


class NotACall(Exception):
    """What looked like a call is none; what was read of it is plain text."""


class Broken(Exception):
    """A call that has begun cannot be read to its end."""


@functools.cache
def stops(*strings: str) -> Stops:
    """Return the `Stops` of these strings; made once, for they are the same for every answer."""
    return Stops(strings)


class Stops:
    """Strings to look for together."""

    def __init__(self, strings: Iterable[str]) -> None:
        self.strings = tuple(sorted(set(strings), key=lambda s: (-len(s), s)))
        self._pattern = re.compile("|".join(map(re.escape, self.strings))) if self.strings else None
        self._prefixes = {s[:n] for s in self.strings for n in range(1, len(s))}
        self._longest = max(map(len, self._prefixes), default=0)

    def find(self, text: str, start: int, *, ended: bool) -> tuple[int, str | None]:
        """Return how much of `text` surely lies before the first stop, and that stop.

        None where there is no stop yet: the rest may be the beginning of one.
        """
        found = self._pattern.search(text, start) if self._pattern else None
        if ended:
            return (found.start(), found[0]) if found else (len(text), None)
        last = len(text) if found is None else found.start() + 1
        for at in range(max(start, len(text) - self._longest), last):
            if text[at:] in self._prefixes:  # a longer or an earlier stop may be under way
                return at, None
        return (found.start(), found[0]) if found else (len(text), None)


class Source:
    """The text, and how far it was read."""

    def __init__(self) -> None:
        self._text = ""
        self._at = 0
        self._forgotten = 0  # characters dropped from the front
        self.ended = False

    def push(self, text: str) -> None:
        self._text += text

    @property
    def position(self) -> int:
        """A place to come back to with `since`, until `forget` is called."""
        return self._forgotten + self._at

    def since(self, position: int) -> str:
        return self._text[position - self._forgotten : self._at]

    @property
    def read(self) -> str:
        """What was read since `forget`."""
        return self._text[: self._at]

    def forget(self) -> None:
        """Drop what was read: nobody will ask for it."""
        self._forgotten += self._at
        self._text = self._text[self._at :]
        self._at = 0

    @property
    def rest(self) -> str:
        """What has come and was not read."""
        return self._text[self._at :]

    def advance(self, count: int) -> None:
        self._at += count

    def back_to(self, position: int) -> None:
        """Read again from a position that was not forgotten."""
        self._at = position - self._forgotten

    def more(self) -> Reading[bool]:
        """Wait for text; False if none comes any more."""
        before = len(self._text)
        while not self.ended:
            yield
            if len(self._text) > before:
                return True
        return False

    def peek(self) -> Reading[str]:
        """Return the next character, "" at the end."""
        while self._at >= len(self._text):
            if not (yield from self.more()):
                return ""
        return self._text[self._at]

    def accept(self, literal: str) -> Reading[bool]:
        """Read `literal` if it comes next; read nothing if it does not."""
        while not self._text.startswith(literal, self._at):
            have = len(self._text) - self._at
            if have >= len(literal) or self._text[self._at :] != literal[:have]:
                return False
            if not (yield from self.more()):
                return False
        self._at += len(literal)
        return True

    def close(self, literal: str) -> Reading[bool]:
        """Read the marker that ends a call, or what there is of it where the answer breaks off."""
        if (yield from self.accept(literal)):
            return True
        if not self.ended or not self.rest or not literal.startswith(self.rest):
            return False
        self._at = len(self._text)
        return True

    def expect(self, literal: str) -> Reading[None]:
        """Read `literal`; raises `NotACall` if it does not come next."""
        if not (yield from self.accept(literal)):
            raise NotACall

    def spaces(self) -> Reading[str]:
        """Read whitespace."""
        start = self.position
        while (character := (yield from self.peek())) and character.isspace():
            self._at += 1
        return self.since(start)

    def word(self, pattern: re.Pattern[str], limit: int = MAX_NAME) -> Reading[str]:
        """Read characters that match `pattern` (of one character); raises `NotACall` beyond
        `limit`, or if there is none."""
        start = self.position
        while (character := (yield from self.peek())) and pattern.match(character):
            self._at += 1
            if self.position - start > limit:
                raise NotACall
        if self.position == start:
            raise NotACall
        return self.since(start)

    def until(self, ends: Stops, limit: int = MAX_HELD) -> Reading[tuple[str, str]]:
        """Read up to and over the first stop; return what lies before it, and the stop.

        Raises `NotACall` if none comes within `limit` characters.
        """
        start = self.position
        searched = self._at
        while True:
            at, stop = ends.find(self._text, searched, ended=self.ended)
            if stop is not None:
                self._at = at + len(stop)
                text = self.since(start)
                return text[: len(text) - len(stop)], stop
            searched = at
            if at - self._at > limit or self.ended:
                self._at = at
                raise NotACall
            yield from self.more()
