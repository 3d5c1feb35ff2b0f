"""An incremental JSON checker that can complete text wherever it breaks off."""

from __future__ import annotations

import json
import re
from typing import Any

MAX_DEPTH = 64
MAX_ATOM = 400  # characters of a number or a literal

_NUMBER = re.compile(r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][-+]?[0-9]+)?")
_ATOM_CHARACTERS = frozenset("+-.0123456789eEtrufalsn")
_PLAIN = re.compile(r'[^"\\\x00-\x1f]*')  # characters that stand for themselves in a string
_SPACE = " \t\r\n"
_LONE_SURROGATE = re.compile("[\ud800-\udfff]")


def dump(value: Any) -> str:
    """Write JSON; raises `ValueError` for what JSON has no word for (NaN, a set, bytes)."""
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (TypeError, RecursionError) as error:
        raise ValueError(str(error)) from error
    return _LONE_SURROGATE.sub("\ufffd", text)  # it cannot be sent as UTF-8


def load_object(text: str) -> dict[str, Any]:
    """Read a JSON object; raises `ValueError` for anything else, however deep or long."""
    try:
        value = json.loads(text)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    if not isinstance(value, dict):
        raise ValueError("not an object")
    return value


class JsonScanner:
    """Passes one JSON value on as it comes.

    `scan` reads a text as far as the value goes. `take` returns what became final: strings
    character by character, everything else as soon as it is complete and has a value, so that
    `completion` can always close what was handed out. Slips that models make are mended: raw
    control characters in a string, needless escapes, a comma before a closing bracket.
    """

    def __init__(self) -> None:
        self.done = False
        self.failed = False
        self._open: list[str] = []  # the brackets to be closed
        self._expects = "value"
        self._final: list[str] = []
        self._pending = ""  # comma, key and colon: held until their value begins
        self._atom = ""
        self._escape = ""
        self._high = ""  # the escape of a high surrogate, until its other half has come
        self._in_key = False
        self._in_string = False

    def scan(self, text: str) -> int:
        """Read on; return how many characters were read. Sets `done` or `failed` where it stops."""
        at = 0
        while at < len(text) and not self.done and not self.failed:
            at = self._string(text, at) if self._in_string else self._structure(text, at)
        return at

    def take(self) -> str:
        final = "".join(self._final)
        self._final.clear()
        return final

    def completion(self) -> str:
        """Return what makes valid JSON of what was taken, where the value is an object or array."""
        if self.done:
            return ""
        closing = '"' if self._in_string and not self._in_key else ""
        return closing + "".join("}" if b == "{" else "]" for b in reversed(self._open))

    def _string(self, text: str, at: int) -> int:
        if self._escape:
            return self._in_escape(text, at)
        if self._high and text[at] != "\\":
            self._write("\\ufffd")
            self._high = ""
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
        else:  # a control character that should have been escaped
            self._write(json.dumps(character)[1:-1])
        return at + 1

    def _in_escape(self, text: str, at: int) -> int:
        character = text[at]
        if self._escape == "\\" and character != "u":
            self._flush_high()
            if character in '"\\/bfnrt':
                self._write("\\" + character)
            elif character == "'":
                self._write("'")
            else:
                self._write("\\\\")  # no escape at all: a backslash, and then what comes
                self._escape = ""
                return at
            self._escape = ""
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
        """Take the escape of one UTF-16 unit: halves count in pairs only."""
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
                self._pending = ""  # a comma too many
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
        """Take a number or a literal as complete: what follows it has come, or nothing does."""
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
