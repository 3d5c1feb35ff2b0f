"""Budget: limits on what one rendering of a template computes, holds and writes.

One rule bounds every operation: no value may exist whose size, written out in full, exceeds
`MAX_SIZE`. A list that holds another one twice counts it twice, as any code that writes, compares,
hashes or copies it does. Each new value is measured when it is made (`made`), and charged.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, MappingView
from itertools import chain
from sys import getsizeof
from typing import Any

import jinja2

#: Loop turns, calls, filters and operators of one rendering.
MAX_STEPS = 300_000
#: Characters of one text, and of the output, macros and blocks included.
MAX_TEXT = 8 * 1024 * 1024
#: Bytes of one value written out in full.
MAX_SIZE = 64 * 1024 * 1024
#: Items that one operation may produce.
MAX_ITEMS = 250_000
#: Levels of nested lists and objects.
MAX_DEPTH = 100
#: Bytes of all values that one rendering makes, whether it keeps them or not.
MAX_VOLUME = 256 * 1024 * 1024
#: Bytes of a list or an object that is turned into text other than by `tojson`.
MAX_PRINTED = 4 * 1024 * 1024
#: Bits of one integer.
MAX_BITS = 4096
#: Seconds of one rendering, compiling included.
MAX_SECONDS = 5.0

# Bytes of a list slot with a small object, and of the record of a measured container.
_ITEM = 40
_RECORD = 240


class TemplateLimitError(jinja2.TemplateRuntimeError):
    """A template exceeds its budget."""


class Budget:
    """The budget of one rendering."""

    def __init__(self) -> None:
        self._steps = MAX_STEPS
        self._output = MAX_TEXT
        self._volume = MAX_VOLUME
        self._deadline = time.monotonic() + MAX_SECONDS
        # By id: the container, its full size and its depth. Holding it keeps the id its own.
        self._measured: dict[int, tuple[Any, int, int]] = {}

    def step(self) -> None:
        """Charge one step."""
        self._steps -= 1
        if self._steps < 0:
            raise TemplateLimitError(f"it takes more than {MAX_STEPS} steps")
        self.check_time()

    def check_time(self) -> None:
        """Raise `TemplateLimitError` after the deadline."""
        if time.monotonic() > self._deadline:
            raise TemplateLimitError(f"it took longer than {MAX_SECONDS:g} s")

    def write(self, characters: int) -> None:
        """Charge characters of output."""
        self._output -= characters
        if self._output < 0:
            raise TemplateLimitError(f"it writes more than {MAX_TEXT} characters")

    def spend(self, size: int) -> None:
        """Charge bytes of memory."""
        self._volume -= size
        if self._volume < 0:
            raise TemplateLimitError("it takes too much memory")

    def made(self, value: Any) -> Any:
        """Charge a new value, and return it; an iterator is read into a list."""
        if isinstance(value, str):
            check_text(len(value))
            self.spend(getsizeof(value))
            return value
        if isinstance(value, int):
            check_integer(value)
        elif isinstance(value, (Iterator, MappingView)):
            items: Any = value
            value = list(self.each(items))
        if isinstance(value, (list, tuple, dict)):
            self.size_of(value)
        return value

    def each(self, values: Iterable[Any]) -> Iterator[Any]:
        """Yield the items of `values`, each of which is charged."""
        for count, value in enumerate(values):
            if count >= MAX_ITEMS:
                raise too_large()
            self.check_time()
            self.spend(_ITEM)
            yield value

    def check_arguments(self, values: Iterable[Any]) -> int:
        """Return the full size of all values; raise `TemplateLimitError` if that is too large."""
        size = sum(self.size_of(value) for value in values)
        if size > MAX_SIZE:
            raise too_large()
        return size

    def size_of(self, value: Any) -> int:
        """Return the bytes of a value written out in full."""
        if isinstance(value, str):
            return getsizeof(value)
        if isinstance(value, (list, tuple, dict)):
            return self._measure(value, 0)[0]
        return _ITEM

    def _measure(self, value: Any, level: int) -> tuple[int, int]:
        """Return the full size and the depth of a container; charge it if it is new."""
        known = self._measured.get(id(value))
        if known is not None:
            return known[1:]
        if level > MAX_DEPTH:
            raise TemplateLimitError(f"a value is nested more than {MAX_DEPTH} levels deep")
        own = getsizeof(value) + _RECORD
        nested = depth = 0
        for item in chain(value, value.values()) if isinstance(value, dict) else value:
            if isinstance(item, (list, tuple, dict)):
                size, below = self._measure(item, level + 1)
                nested += size
                depth = max(depth, below)
            else:
                own += getsizeof(item) if isinstance(item, str) else _ITEM
            if own + nested > MAX_SIZE:
                raise too_large()
        if depth >= MAX_DEPTH:
            raise TemplateLimitError(f"a value is nested more than {MAX_DEPTH} levels deep")
        self.check_time()
        self.spend(own)
        self._measured[id(value)] = (value, own + nested, depth + 1)
        return own + nested, depth + 1


def check_text(characters: int) -> None:
    """Raise `TemplateLimitError` if a text of that length is too long."""
    if characters > MAX_TEXT:
        raise too_large()


def check_integer(value: int) -> None:
    """Raise `TemplateLimitError` for an integer that has too many bits."""
    if value.bit_length() > MAX_BITS:
        raise TemplateLimitError(f"a number has more than {MAX_BITS} bits")


def too_large() -> TemplateLimitError:
    """Return the error for a value that is too large."""
    return TemplateLimitError(f"a value is larger than {MAX_TEXT} characters or {MAX_ITEMS} items")
