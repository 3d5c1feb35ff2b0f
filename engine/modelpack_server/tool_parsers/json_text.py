"""An incremental JSON scanner that can complete a text that ends anywhere."""

from __future__ import annotations

import json
import re
from typing import Any

MAX_DEPTH = 64
MAX_ATOM = 400  # characters of a number or a literal

_NUMBER = re.compile(r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][-+]?[0-9]+)?")
_ATOM_CHARACTERS = frozenset("+-.0123456789eEtrufalsn")
_PLAIN = re.compile(r'[^"\\\x00-\x1f]*')  # string characters without escapes
_SPACE = " \t\r\n"
_LONE_SURROGATE = re.compile("[\ud800-\udfff]")


def dump(value: Any) -> str:
    """Return a value as JSON; raises `ValueError` for values that JSON lacks (NaN, set, bytes)."""
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (TypeError, RecursionError) as error:
        raise ValueError(str(error)) from error
    return _LONE_SURROGATE.sub("\ufffd", text)  # a lone surrogate has no UTF-8


def load_object(text: str) -> dict[str, Any]:
    """Parse a JSON object; raises `ValueError` for any other text, including deeply nested JSON."""
    try:
        value = json.loads(text)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    if not isinstance(value, dict):
        raise ValueError("not an object")
    return value


class JsonScanner:
    """Scans one JSON value in pieces and corrects common mistakes of models.

    `scan` reads a text up to the end of the value. `take` returns the final part of the output:
    strings character by character, other values when they are complete, so that `completion` can
    always close the output. It corrects raw control characters in strings, invalid escapes and a
    comma before a closing bracket.
    """

    def __init__(self) -> None:
        self.done = False
        self.failed = False
        self._open: list[str] = []  # the open brackets
        self._expects = "value"
        self._final: list[str] = []
        self._pending = ""  # comma, key and colon, held back until the value begins
        self._atom = ""
        self._escape = ""
        self._high = ""  # the escape of a high surrogate, held back until the low surrogate
        self._in_key = False
        self._in_string = False

    def scan(self, text: str) -> int:
        """Read more text; return the number of characters read. May set `done` or `failed`."""
        at = 0
        while at < len(text) and not self.done and not self.failed:
            at = self._string(text, at) if self._in_string else self._structure(text, at)
        return at

    def take(self) -> str:
        final = "".join(self._final)
        self._final.clear()
        return final

    def completion(self) -> str:
        """Return the text that completes the output so far to a JSON object or array."""
        if self.done:
            return ""
        closing = '"' if self._in_string and not self._in_key else ""
        return closing + "".join("}" if b == "{" else "]" for b in reversed(self._open))

    def held(self) -> str:
        """Return the text after the output so far, which was held back."""
        return self._pending + self._atom + self._high + self._escape

    def _string(self, text: str, at: int) -> int:
        if self._escape:
            return self._in_escape(text, at)
        if text[at] != "\\":
            self._flush_high()
        plain = _PLAIN.match(text, at)
        assert plain is not None
        self._write(plain[0])
        at = plain.end()
        if at == len(text):
            return at
        character = text[at]
        if character == "\\":
            self._escape = "\\"
        elif character == '"':
            self._write('"')
            self._in_string = False
            self._expects = "colon" if self._in_key else "after"
            self._in_key = False
            self._end_value_if_top()
        else:  # a control character without an escape
            self._write(json.dumps(character)[1:-1])
        return at + 1

    def _in_escape(self, text: str, at: int) -> int:
        character = text[at]
        if self._escape == "\\" and character != "u":
            self._flush_high()
            self._escape = ""
            if character in '"\\/bfnrt':
                self._write("\\" + character)
            elif character == "'":
                self._write("'")
            else:
                self._write("\\\\")  # not an escape: a backslash and the next character
                return at
            return at + 1
        if len(self._escape) > 1 and character not in "0123456789abcdefABCDEF":
            self._flush_high()
            self._write("\\" + self._escape)
            self._escape = ""
            return at
        self._escape += character
        if len(self._escape) == 6:
            self._unit(self._escape)
            self._escape = ""
        return at + 1

    def _unit(self, escape: str) -> None:
        """Read the escape of one UTF-16 unit; surrogates count only in pairs."""
        kind = escape[2:4].lower()
        if "dc" <= kind <= "df":
            self._write(self._high + escape if self._high else "\\ufffd")
            self._high = ""
            return
        self._flush_high()
        if "d8" <= kind <= "db":
            self._high = escape
        else:
            self._write(escape)

    def _flush_high(self) -> None:
        if self._high:
            self._write("\\ufffd")
            self._high = ""

    def _write(self, text: str) -> None:
        if self._in_key:
            self._pending += text
        else:
            self._final.append(text)

    def _structure(self, text: str, at: int) -> int:
        character = text[at]
        if self._atom or (self._expects.startswith("value") and character in _ATOM_CHARACTERS):
            return self._in_atom(character, at)
        if character in _SPACE:
            if self._open:
                self._pending += character
        elif character in "{[" and self._expects.startswith("value"):
            if len(self._open) == MAX_DEPTH:
                self.failed = True
                return at
            self._release(character)
            self._open.append(character)
            self._expects = "key or end" if character == "{" else "value or end"
        elif character == '"' and self._expects.startswith(("value", "key")):
            self._in_string = True
            self._in_key = self._expects.startswith("key")
            if self._in_key:
                self._pending += character
            else:
                self._release(character)
        elif character == ":" and self._expects == "colon":
            self._pending += character
            self._expects = "value"
        elif character == "," and self._expects == "after":
            self._pending += character
            self._expects = "key" if self._open[-1] == "{" else "value after comma"
        elif self._closes(character):
            if self._expects != "after":
                self._pending = ""  # a trailing comma
            self._open.pop()
            self._release(character)
            self._expects = "after"
            self._end_value_if_top()
        else:
            self.failed = True
            return at
        return at + 1

    def _closes(self, character: str) -> bool:
        if not self._open or character != ("}" if self._open[-1] == "{" else "]"):
            return False
        return self._expects in ("after", "key", "key or end", "value or end", "value after comma")

    def _in_atom(self, character: str, at: int) -> int:
        if character in _ATOM_CHARACTERS:
            self._atom += character
            self.failed = len(self._atom) > MAX_ATOM
            return at + 1
        self.end_atom()
        return at

    def end_atom(self) -> None:
        """Complete a number or a literal, since its end was reached."""
        if self._atom in ("true", "false", "null") or _NUMBER.fullmatch(self._atom):
            self._release(self._atom)
            self._expects = "after"
            self._end_value_if_top()
        elif self._atom:
            self.failed = True
        self._atom = ""

    def _release(self, text: str) -> None:
        self._final.append(self._pending + text)
        self._pending = ""

    def _end_value_if_top(self) -> None:
        self.done = not self._open
