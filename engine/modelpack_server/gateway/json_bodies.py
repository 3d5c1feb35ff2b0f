"""Parse JSON request bodies within limits, without blocking other threads for long.

`json.loads` is one call into C: while it parses a large body, no other thread runs, including the
event loop. So it parses small bodies only, and those of few values, such as a picture in base64.
`_Reader` parses large ones in a worker thread, in steps of a few milliseconds, and stops at the
first exceeded limit.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any, NoReturn, TypeVar

from starlette.types import Scope

T = TypeVar("T")

#: The nesting depth of arrays and objects.
MAX_DEPTH = 128
#: The number of arrays and objects in a body. Validation makes objects of many of them in one call,
#: during which no other thread runs: 40 ms for this many.
MAX_CONTAINERS = 16_384
#: The number of items in an array that are not numbers. Arrays of token ids may be longer.
MAX_ITEMS = 4096
#: The number of members of all objects in a body.
MAX_MEMBERS = 131_072
#: The number of values in a body, including containers: enough for a million token ids.
MAX_VALUES = 2 * 1024 * 1024
#: The upper limit of the mean memory of a parsed value, in bytes.
VALUE_BYTES = 64
CONTAINER_BYTES = 256

#: The size up to which any body is parsed on the event loop, in bytes.
INLINE = 32 * 1024

_SCOPE_KEY = "modelpack.json"
_QUICK = 1024 * 1024  # bytes that json.loads parses in less than 5 ms
_QUICK_VALUES = MAX_ITEMS  # values that it parses in less than 5 ms
_FEW_VALUES = 256  # values that it parses in less than 2 ms, in as many bytes
_FEW_PIECES = 16  # of a body, whose values are counted in less than 2 ms
_DIGITS = 4300  # Python's own limit for integers

_SPACE = rb"[ \t\n\r]*+"
_SPACES = re.compile(rb"[ \t\n\r]{0,65536}+")
# Groups are not repeated possessively: up to Python 3.11.4, what a failed repeat matched is kept.
_NUMBER = rb"-?(?:0|[1-9][0-9]{0,%d}+)(?>(?:\.[0-9]{1,%d}+)?)(?>(?:[eE][-+]?[0-9]{1,9}+)?)" % (
    _DIGITS - 1, _DIGITS,
)  # fmt: skip
_SCALAR = re.compile(_NUMBER + rb"(?![0-9.])|true|false|null")
_ITEM = (
    rb'(?:"[^"\\\x00-\x1f]{0,128}+"|true|false|null'
    rb"|-?(?:0|[1-9][0-9]{0,18}+)(?>(?:\.[0-9]{1,32}+)?)(?>(?:[eE][-+]?[0-9]{1,9}+)?))"
)
#: Items of an array, each with its comma.
_RUN = re.compile(rb"(?>(?:" + _SPACE + _ITEM + _SPACE + rb",){1,1024})")
_KEY = re.compile(rb'"([^"\\\x00-\x1f]{0,256}+)"' + _SPACE + rb":")
#: Part of a string. It never splits a surrogate pair.
_PIECE = re.compile(
    rb'(?>(?:[^"\\\x00-\x1f]{1,4096}+'
    rb"|\\u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}"
    rb'|\\(?:["\\/bfnrt]|u[0-9a-fA-F]{4})){1,256})'
)


class BodyError(ValueError):
    """A body is not JSON."""


class ComplexityError(BodyError):
    """The JSON of a body exceeds a limit."""


@dataclass(frozen=True, slots=True)
class Parsed:
    """A parsed body: its value, all keys of its outermost object including duplicates, and the
    estimated memory of the value in bytes.
    """

    value: Any
    keys: tuple[str, ...] = ()
    memory: int = 0


#: One thread: several threads would only wait for the interpreter.
_WORKER = ThreadPoolExecutor(1, "modelpack-json")


async def in_worker(pieces: Sequence[bytes], work: Callable[[], T]) -> T:
    """Return `work()`, called in the worker thread if the body in `pieces` takes long."""
    if is_light(pieces):
        return work()
    return await asyncio.get_running_loop().run_in_executor(_WORKER, work)


def is_light(pieces: Sequence[bytes]) -> bool:
    """Return whether a body is small, or has so few values that parsing it takes 2 ms at most.

    A thread would hold the interpreter's lock for as long, and wait for it twice.
    """
    size = sum(map(len, pieces))
    if size <= INLINE or size > _QUICK:
        return size <= INLINE
    if len(pieces) > _FEW_PIECES or any(b"\\" in piece for piece in pieces):
        return False
    left = _FEW_VALUES
    for piece in pieces:
        left -= sum(_count(piece, left))
        if left < 0:
            return False
    return True


def put_document(scope: Scope, value: Any) -> None:
    """Keep the parsed body of a request, so that applications need not parse it again."""
    scope[_SCOPE_KEY] = value


def drop_document(scope: Scope) -> None:
    """Free the parsed body of a finished request: its connection keeps `scope`."""
    scope.pop(_SCOPE_KEY, None)


def document_in(scope: Scope, default: Any = None) -> Any:
    """Return the parsed body of a request, or `default` if it was not parsed."""
    return scope.get(_SCOPE_KEY, default)


def parse(raw: bytes) -> Parsed:
    """Parse `raw`. Raises `BodyError`, and `ComplexityError` if it exceeds a limit."""
    if len(raw) <= _QUICK and not _has_surrogates(raw):
        containers, commas = _count(raw, _QUICK_VALUES)
        if containers + commas <= _QUICK_VALUES:
            value, keys = _quick(raw)
            return Parsed(value, keys, _memory(raw, commas, containers))
    reader = _Reader(raw)
    value, keys = reader.document(), tuple(reader.keys)
    return Parsed(value, keys, _memory(raw, reader.values, reader.containers))


def _memory(raw: bytes, values: int, containers: int) -> int:
    return len(raw) + VALUE_BYTES * values + CONTAINER_BYTES * containers


def _has_surrogates(raw: bytes) -> bool:
    """Return whether surrogates may be escaped in `raw`, which json.loads accepts alone."""
    # The search for one byte takes a hundredth of the time of the others.
    return b"\\" in raw and (b"\\ud" in raw or b"\\uD" in raw)


def _count(raw: bytes, most: int) -> tuple[int, int]:
    """Return upper bounds of the containers, and of the commas between values, in `raw`.

    One of them is above `most` if there are more.
    """
    arrays, objects = _occurrences(raw, b"[", most), _occurrences(raw, b"{", most)
    return arrays + objects, _occurrences(raw, b",", most)


def _occurrences(raw: bytes, byte: bytes, most: int) -> int:
    """Return how often a byte occurs, at most `most` + 1."""
    # In a picture in base64, `find` takes a thirtieth of the time of `count`.
    found, at = 0, raw.find(byte)
    while at >= 0 and found <= most:
        found, at = found + 1, raw.find(byte, at + 1)
    return found


def _quick(raw: bytes) -> tuple[Any, tuple[str, ...]]:
    last: list[tuple[str, Any]] = []

    def notice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        nonlocal last
        last = pairs  # the outermost object ends last
        return dict(pairs)

    try:
        value = json.loads(raw.decode(), object_pairs_hook=notice, parse_constant=_refuse)
    except UnicodeDecodeError as error:
        raise BodyError(f"not UTF-8 at byte {error.start}") from None
    except RecursionError:
        raise _too_deep() from None
    except ValueError as error:
        raise BodyError(str(error)[:200]) from None
    level, depth = [value], 0
    while level := [item for item in level if isinstance(item, dict | list)]:
        depth += 1
        if depth > MAX_DEPTH:
            raise _too_deep()
        level = [
            child for item in level for child in (item.values() if isinstance(item, dict) else item)
        ]
    return value, tuple(key for key, _ in last) if isinstance(value, dict) else ()


def _refuse(constant: str) -> NoReturn:
    raise BodyError(f"{constant} is not JSON")


def _too_deep() -> ComplexityError:
    return ComplexityError(f"arrays and objects are nested deeper than {MAX_DEPTH}")


class _Reader:
    """Parses one document step by step, without recursion."""

    def __init__(self, raw: bytes) -> None:
        self._raw = raw
        self._at = 0
        self._names: dict[bytes, str] = {}
        self.values = 0
        self.containers = 0
        self.members = 0
        self.keys: list[str] = []  # of the outermost object

    def document(self) -> Any:
        """Return the value of the whole text."""
        raw = self._raw
        around: list[tuple[Any, str]] = []  # the containers around `inner`, each with a key
        inner: Any = None
        key = ""
        expects = _Expects.VALUE
        while True:
            self._skip()
            first = raw[self._at : self._at + 1]
            if first and first in b"]}" and expects in (_Expects.FIRST, _Expects.COMMA):
                _check_items(inner, 0)
                if (first == b"]") is not isinstance(inner, list):
                    raise self._error("expected ','")
                self._at += 1
                if not around:
                    break
                inner, key = around.pop()
                expects = _Expects.COMMA
            elif expects is _Expects.COMMA:
                if first != b",":
                    raise self._error("expected ','")
                self._at += 1
                expects = _Expects.VALUE if isinstance(inner, list) else _Expects.KEY
            elif isinstance(inner, dict) and expects is not _Expects.VALUE:
                key = self._key()
                self.members += 1
                if self.members > MAX_MEMBERS:
                    raise ComplexityError(f"more than {MAX_MEMBERS} members of objects")
                if not around:
                    self.keys.append(key)
                expects = _Expects.VALUE
            elif isinstance(inner, list) and (items := self._run()):
                inner += items
                _check_items(inner, -1)
                expects = _Expects.VALUE
            else:
                value = self._begun(first)
                if isinstance(inner, list):
                    inner.append(value)
                    _check_items(inner, -1)
                elif inner is not None:
                    inner[key] = value
                if isinstance(value, list | dict):
                    if inner is not None:
                        around.append((inner, key))
                    if len(around) >= MAX_DEPTH:
                        raise _too_deep()
                    inner, expects = value, _Expects.FIRST
                elif inner is None:
                    inner = value
                    break
                else:
                    expects = _Expects.COMMA
        self._skip()
        if self._at < len(raw):
            raise self._error("extra data")
        return inner

    def _begun(self, first: bytes) -> Any:
        """Return the next value; an array or an object is returned empty."""
        self._add(1)
        if first == b'"':
            return self._string()
        if first and first in b"[{":
            self.containers += 1
            if self.containers > MAX_CONTAINERS:
                raise ComplexityError(f"more than {MAX_CONTAINERS} arrays and objects")
            self._at += 1
            return [] if first == b"[" else {}
        found = _SCALAR.match(self._raw, self._at)
        if found is None:
            raise self._error("expected a value")
        self._at = found.end()
        return self._decoded(found[0])

    def _run(self) -> list[Any]:
        """Return the next short items of an array, each followed by a comma."""
        found = _RUN.match(self._raw, self._at)
        if found is None:
            return []
        items: list[Any] = self._decoded(b"[" + found[0][:-1] + b"]")
        self._add(len(items))
        self._at = found.end()
        return items

    def _key(self) -> str:
        found = _KEY.match(self._raw, self._at)
        if found is not None:
            self._at = found.end()
            if (known := self._names.get(found[1])) is None:
                known = self._names[found[1]] = self._text(found[1])
            return known
        if self._raw[self._at : self._at + 1] != b'"':
            raise self._error("expected a key in double quotes")
        key = self._string()
        self._skip()
        if self._raw[self._at : self._at + 1] != b":":
            raise self._error("expected ':'")
        self._at += 1
        return key

    def _string(self) -> str:
        raw = self._raw
        self._at += 1
        pieces = []
        while raw[self._at : self._at + 1] != b'"':
            found = _PIECE.match(raw, self._at)
            if found is None:
                raise self._error("expected the end of a string")
            end = found.end()
            # The pattern may stop within a UTF-8 character; end the piece before it.
            while end > self._at + 1 and end < len(raw) and raw[end] & 0xC0 == 0x80:
                end -= 1
            text = self._text(raw[self._at : end])
            pieces.append(_unescaped(text) if "\\" in text else text)
            self._at = end
        self._at += 1
        return "".join(pieces)

    def _skip(self) -> None:
        while (found := _SPACES.match(self._raw, self._at)) is not None and found[0]:
            self._at = found.end()

    def _add(self, count: int) -> None:
        self.values += count
        if self.values > MAX_VALUES:
            raise ComplexityError(f"more than {MAX_VALUES} values")

    def _text(self, raw: bytes) -> str:
        try:
            return raw.decode()
        except UnicodeDecodeError:
            raise self._error("not UTF-8") from None

    def _decoded(self, raw: bytes) -> Any:
        text = self._text(raw)
        try:
            return json.loads(text)
        except ValueError as error:  # an integer with too many digits
            raise self._error(str(error)) from None

    def _error(self, message: str) -> BodyError:
        return BodyError(f"{message} at byte {self._at}")


def _unescaped(text: str) -> str:
    """Return the text of a string, with ? for a lone surrogate, which has no UTF-8."""
    found: str = json.loads(f'"{text}"')
    return found.encode(errors="replace").decode() if "\\u" in text else found


def _check_items(inner: Any, first: int) -> None:
    """Raise `ComplexityError` for a long array with items from `first` on that are not numbers."""
    if isinstance(inner, list) and len(inner) > MAX_ITEMS:
        for item in inner[first:]:
            if type(item) is not int and type(item) is not float:
                raise ComplexityError(f"an array has more than {MAX_ITEMS} items")


class _Expects(Enum):
    """The next element that is valid."""

    VALUE = auto()
    KEY = auto()
    COMMA = auto()  # or the end of the container
    FIRST = auto()  # the first item or key of a container, or its end
