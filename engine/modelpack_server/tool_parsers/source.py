"""Input text that arrives in pieces, for readers that are generators.

A reader is written as if the whole text were available. When it needs more text, it yields until
the next piece arrives. The result therefore does not depend on the division into pieces.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Generator, Iterable
from typing import TypeVar

T = TypeVar("T")
Reading = Generator[None, None, T]

MAX_NAME = 256  # characters of a tool's or a parameter's name
MAX_HELD = 1 << 18  # characters of a block that is held back until its end


class NotACall(Exception):
    """The text is not a call; the part that was read is plain text."""


class Broken(Exception):
    """A call that has begun is invalid or incomplete."""


@functools.cache
def stops(*strings: str) -> Stops:
    """Return the `Stops` for these strings, cached because they are the same for each reply."""
    return Stops(strings)


class Stops:
    """A set of strings to search for."""

    def __init__(self, strings: Iterable[str]) -> None:
        self.strings = tuple(sorted(set(strings), key=lambda s: (-len(s), s)))
        self._pattern = re.compile("|".join(map(re.escape, self.strings))) if self.strings else None
        self._prefixes = {s[:n] for s in self.strings for n in range(1, len(s))}
        self._longest = max(map(len, self._prefixes), default=0)

    def find(self, text: str, start: int, *, ended: bool) -> tuple[int, str | None]:
        """Return the index up to which `text` contains no stop, and the first stop.

        The stop is None if there is none yet; the text after the index may begin one.
        """
        found = self._pattern.search(text, start) if self._pattern else None
        if ended:
            return (found.start(), found[0]) if found else (len(text), None)
        last = len(text) if found is None else found.start() + 1
        for at in range(max(start, len(text) - self._longest), last):
            if text[at:] in self._prefixes:  # a longer or an earlier stop may begin here
                return at, None
        return (found.start(), found[0]) if found else (len(text), None)


class Source:
    """The text so far, with the position up to which it was read."""

    def __init__(self) -> None:
        self._text = ""
        self._at = 0
        self._forgotten = 0  # characters dropped from the front
        self.ended = False

    def push(self, text: str) -> None:
        self._text += text

    @property
    def position(self) -> int:
        """The current position, for `since` and `back_to`; valid until `forget`."""
        return self._forgotten + self._at

    def since(self, position: int) -> str:
        return self._text[position - self._forgotten : self._at]

    @property
    def read(self) -> str:
        """The text read since `forget`."""
        return self._text[: self._at]

    def forget(self) -> None:
        """Drop the text that was read."""
        self._forgotten += self._at
        self._text = self._text[self._at :]
        self._at = 0

    @property
    def rest(self) -> str:
        """The text that has arrived and was not read."""
        return self._text[self._at :]

    def advance(self, count: int) -> None:
        self._at += count

    def back_to(self, position: int) -> None:
        """Go back to an earlier position."""
        self._at = position - self._forgotten

    def more(self) -> Reading[bool]:
        """Wait for more text; return False at the end."""
        before = len(self._text)
        while not self.ended:
            yield
            if len(self._text) > before:
                return True
        return False

    def hand_out(
        self, ends: Stops, emit: Callable[[str], None] = lambda text: None
    ) -> Reading[str | None]:
        """Pass text up to a stop to `emit`; return the stop, which is not read, None at the end."""
        while True:
            at, stop = ends.find(self.rest, 0, ended=self.ended)
            emit(self.rest[:at])
            self.advance(at)
            self.forget()
            if stop is not None or self.ended:
                return stop
            yield from self.more()

    def peek(self) -> Reading[str]:
        """Return the next character, "" at the end."""
        while self._at >= len(self._text):
            if not (yield from self.more()):
                return ""
        return self._text[self._at]

    def accept(self, literal: str) -> Reading[bool]:
        """Read `literal` if it is next, and return whether it was."""
        while not self._text.startswith(literal, self._at):
            have = len(self._text) - self._at
            if have >= len(literal) or self._text[self._at :] != literal[:have]:
                return False
            if not (yield from self.more()):
                return False
        self._at += len(literal)
        return True

    def close(self, literal: str) -> Reading[bool]:
        """Read the marker that ends a call, or its beginning if the text ends within it."""
        if (yield from self.accept(literal)):
            return True
        if not self.ended or not self.rest or not literal.startswith(self.rest):
            return False
        self._at = len(self._text)
        return True

    def expect(self, literal: str) -> Reading[None]:
        """Read `literal`; raises `NotACall` if it is not next."""
        if not (yield from self.accept(literal)):
            raise NotACall

    def spaces(self) -> Reading[str]:
        """Read whitespace."""
        start = self.position
        while (character := (yield from self.peek())) and character.isspace():
            self._at += 1
        return self.since(start)

    def word(self, pattern: re.Pattern[str], limit: int = MAX_NAME) -> Reading[str]:
        """Read one or more characters that match `pattern`; raises `NotACall` for none, or for
        more than `limit`."""
        start = self.position
        while (character := (yield from self.peek())) and pattern.match(character):
            self._at += 1
            if self.position - start > limit:
                raise NotACall
        if self.position == start:
            raise NotACall
        return self.since(start)

    def until(self, ends: Stops, limit: int = MAX_HELD) -> Reading[tuple[str, str]]:
        """Read through the first stop; return the text before it, and the stop.

        Raises `NotACall` if there is none within `limit` characters.
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
