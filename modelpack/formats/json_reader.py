"""Read a large JSON object inside a weight file entry by entry, in small windows.

The headers of safetensors files and the indexes of sharded models are one large, flat object.
Parsing them whole would take twenty times their size in memory before the first check;
`JSONText` checks every entry on its own.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NoReturn

from modelpack.errors import WeightFormatError
from modelpack.formats.reader import WeightFile

#: The longest key, and the longest value returned as text; longer values are a `LongString`.
MAX_STRING_BYTES = 64 * 1024
MAX_LONG_STRING_BYTES = 32 * 1024 * 1024
#: The longest array or object that `JSONText.value` returns.
MAX_VALUE_BYTES = 64 * 1024
#: Levels of arrays and objects inside each other.
MAX_DEPTH = 16

_WINDOW = 64 * 1024
_SPACE = re.compile(rb"[ \t\n\r]*+")
_STRING = rb'"[^"\\\x00-\x1f]*+(?:\\.[^"\\\x00-\x1f]*+)*+"'
_TEXT = re.compile(_STRING)
_KEY = re.compile(rb"(" + _STRING + rb")[ \t\n\r]*+:")
_SCALAR = re.compile(rb"[-+.0-9A-Za-z]++")
#: An object that contains no other object.
_FLAT_OBJECT = re.compile(rb'\{[^{}"]*+(?:' + _STRING + rb'[^{}"]*+)*+\}')
#: The rest of a string, up to its end, an incomplete escape or an invalid byte.
_STRING_REST = re.compile(rb'[^"\\\x00-\x1f]*+(?:\\.[^"\\\x00-\x1f]*+)*+')
_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True, slots=True)
class LongString:
    """An unread string: `length` bytes at the byte `offset`, quotes and escapes included."""

    offset: int
    length: int


class JSONText:
    """The JSON text in the bytes `start` to `end` of `file`; every error has its byte."""

    def __init__(self, file: WeightFile, start: int, end: int) -> None:
        self._file = file
        self._end = end
        self._base = start
        self._window = b""
        self._at = 0

    @property
    def position(self) -> int:
        """The offset in the file of the next byte."""
        return self._base + self._at

    def error(self, message: str, offset: int | None = None) -> WeightFormatError:
        """Return an error with `message`, at `offset` or at the current position."""
        return self._file.error(message, self.position if offset is None else offset)

    def keys(self) -> Iterator[str]:
        """Yield the keys of the object at the position; the caller must read each value."""
        if self.peek() != b"{":
            raise self.error(f"expected an object, got {self.peek()!r}")
        self._at += 1
        if self.peek() == b"}":
            self._at += 1
            return
        while True:
            self.peek()
            start = self._base + self._at
            key = self._match(_KEY, MAX_STRING_BYTES, "a key and a colon")[1]
            yield self._decoded_string(key, start)
            follows = self.peek()
            if follows not in (b",", b"}"):
                raise self.error(f"expected ',' or '}}', got {follows!r}")
            self._at += 1
            if follows == b"}":
                return

    def flat_object(self, limit: int) -> tuple[dict[str, Any], int]:
        """Return the object at the position, and the position; it must not contain an object."""
        if self.peek() != b"{":
            raise self.error(f"expected an object, got {self.peek()!r}")
        start = self.position
        raw = self._match(_FLAT_OBJECT, limit, "an object that contains no object")[0]
        value: dict[str, Any] = self._decoded(raw, start)
        return value, start

    def value(self) -> Any:
        """Return the value at the position; a long string is returned as a `LongString`."""
        first = self.peek()
        start = self.position
        if first == b'"':
            found = self._try(_TEXT, MAX_STRING_BYTES)
            return self._decoded_string(found[0], start) if found else self._long_string()
        if first in (b"{", b"["):
            value = self._nested()
        else:
            value = self._decoded(self._match(_SCALAR, 400, "a value")[0], start)
        _check(value, self, start, MAX_DEPTH)
        return value

    def text_of(self, string: LongString) -> str:
        """Return the text of `string` without changing the position."""
        raw = self._file.read(string.offset, string.length)
        return self._decoded_string(raw, string.offset)

    def finish(self) -> None:
        """Raise `WeightFormatError` unless only white space follows."""
        self._skip_space()
        if self.position < self._end:
            raise self.error("more text follows the JSON object")

    def peek(self) -> bytes:
        """Skip white space and return the next byte without skipping it."""
        byte = self._window[self._at : self._at + 1]
        if byte in b" \t\n\r":  # also true if the window is empty
            self._skip_space()
            byte = self._window[self._at : self._at + 1]
            if not byte:
                raise self.error("the JSON text ends too early")
        return byte

    def _skip_space(self) -> None:
        while True:
            found = _SPACE.match(self._window, self._at)
            assert found  # the pattern matches empty text
            self._at = found.end()
            if self._at < len(self._window) or not self._fill(1):
                return

    def _match(self, pattern: re.Pattern[bytes], limit: int, what: str) -> re.Match[bytes]:
        found = self._try(pattern, limit)
        if found is None:
            raise self.error(f"expected {what} of at most {limit} bytes")
        return found

    def _try(self, pattern: re.Pattern[bytes], limit: int) -> re.Match[bytes] | None:
        """Skip and return the match of `pattern` within `limit` bytes, or return None."""
        while True:
            found = pattern.match(self._window, self._at)
            if found and (found.end() < len(self._window) or self._all_read()):
                if found.end() - self._at > limit:
                    return None
                self._at = found.end()
                return found
            had = len(self._window) - self._at
            if had > limit or not self._fill(max(2 * had, 1024)):
                return None

    def _nested(self) -> Any:
        """Return the array or object at the position."""
        start = self.position
        for size in (256, 4096, MAX_VALUE_BYTES):
            self._fill(size)
            raw = self._window[self._at : self._at + size]
            text = raw.decode("utf-8", "surrogateescape")  # the end may be cut inside a character
            try:
                value, length = _DECODER.raw_decode(text)
            except (ValueError, RecursionError) as error:
                fault = error
            else:
                self._at += len(text[:length].encode("utf-8", "surrogateescape"))
                return value
        raise self.error(
            f"expected a JSON value of at most {MAX_VALUE_BYTES} bytes: {fault}", start
        )

    def _long_string(self) -> LongString:
        start = self.position
        self._at += 1
        while True:
            found = _STRING_REST.match(self._window, self._at)
            assert found  # the pattern matches empty text
            self._at = found.end()
            if self.position - start > MAX_LONG_STRING_BYTES:
                raise self.error(f"a string is longer than {MAX_LONG_STRING_BYTES} bytes", start)
            if self._window[self._at : self._at + 1] == b'"':
                self._at += 1
                return LongString(start, self.position - start)
            # The window may end inside an escape; fill it and continue.
            if len(self._window) - self._at > 1 or not self._fill(_WINDOW):
                raise self.error("expected the end of a string")

    def _all_read(self) -> bool:
        return self._base + len(self._window) >= self._end

    def _fill(self, wanted: int) -> bool:
        """Fill the window up to `wanted` bytes; return whether any byte was added."""
        start, had = self.position, len(self._window) - self._at
        size = min(max(wanted - had, _WINDOW), self._end - start - had)
        if had >= wanted or size <= 0:
            return False
        self._window = self._window[self._at :] + self._file.read(start + had, size)
        self._base, self._at = start, 0
        return True

    def _decoded_string(self, raw: bytes, start: int) -> str:
        if b"\\" not in raw:
            return self._utf8(raw, start)[1:-1]
        text: str = self._decoded(raw, start)
        if _SURROGATE.search(text):
            raise self.error("a string contains half of a surrogate pair", start)
        return text

    def _decoded(self, raw: bytes, start: int) -> Any:
        text = self._utf8(raw, start)
        try:
            value, length = _DECODER.raw_decode(text)
        except (ValueError, RecursionError) as error:
            raise self.error(f"not JSON: {error}", start) from None
        if length != len(text):
            raise self.error("not JSON: the value ends too early", start)
        return value

    def _utf8(self, raw: bytes, start: int) -> str:
        try:
            return raw.decode()
        except UnicodeDecodeError as error:
            raise self.error("the text is not UTF-8", start + error.start) from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        raise ValueError("a key occurs twice in one object")
    return value


def reject_constant(constant: str) -> NoReturn:
    """Raise `ValueError`: the argument `parse_constant` of strict parsers."""
    raise ValueError(f"{constant} is not JSON")


_DECODER = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=reject_constant)


def _check(value: Any, text: JSONText, start: int, depth: int) -> None:
    """Raise `WeightFormatError` for values that other JSON readers could not represent."""
    if depth == 0:
        raise text.error(f"a value is nested deeper than {MAX_DEPTH}", start)
    if isinstance(value, str) and _SURROGATE.search(value):
        raise text.error("a string is not UTF-8 or contains half of a surrogate pair", start)
    if isinstance(value, int | float) and not -1.7e308 < value < 1.7e308:
        raise text.error("a number is out of range", start)
    children = value if isinstance(value, list) else []
    if isinstance(value, dict):
        children = [*value.keys(), *value.values()]
    for child in children:
        _check(child, text, start, depth - 1)
