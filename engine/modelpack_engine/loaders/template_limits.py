"""Which single steps of a template would make something huge: refused before they are taken."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import jinja2

#: Characters of one value, those of its items included.
MAX_VALUE = 8 * 1024 * 1024
#: Items of one value, those of its items included.
MAX_ITEMS = 250_000
#: Bits of one whole number.
MAX_BITS = 4096

_TEXT = (str, bytes)
_WIDTH = re.compile(r"\d{5,}")


class TemplateLimitError(jinja2.TemplateRuntimeError):
    """A template uses more than it may."""


def check_value(value: Any) -> int:
    """Return the size of a value; raise `TemplateLimitError` beyond the limits."""
    if isinstance(value, int):
        if value.bit_length() > MAX_BITS:
            raise TemplateLimitError(f"a number has more than {MAX_BITS} bits")
        return 1
    return size_of(value)


def size_of(value: Any) -> int:
    """Return how many characters and items `value` has, all the way down.

    A list that holds one list twice counts it twice: so does whatever writes or compares it.
    """
    characters = items = 0
    waiting = [value]
    while waiting:
        item = waiting.pop()
        if isinstance(item, _TEXT):
            characters += len(item)
        elif isinstance(item, Mapping):
            items += 2 * len(item)
            if items <= MAX_ITEMS:
                waiting += item.keys()
                waiting += item.values()
        elif isinstance(item, (list, tuple)):
            items += len(item)
            if items <= MAX_ITEMS:
                waiting += item
        if characters > MAX_VALUE or items > MAX_ITEMS:
            raise _too_large()
    return characters + items


def check_call(function: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Raise `TemplateLimitError` for arguments with which a call makes something huge.

    `function` is a filter, which gets the text as its first argument, or a method of the text.
    """
    values = [*args, *kwargs.values()]
    # Jinja wraps str.format, to keep it from attributes.
    owner = getattr(getattr(function, "__wrapped__", function), "__self__", None)
    if isinstance(owner, _TEXT):
        values.insert(0, owner)
    numbers = [value for value in values if isinstance(value, int)]
    if any(abs(number) > MAX_VALUE for number in numbers):  # widths of ljust, indent, …
        raise TemplateLimitError(f"a number passed to a call is larger than {MAX_VALUE}")
    texts = [value for value in values if isinstance(value, _TEXT)]
    name = getattr(function, "__name__", "")
    if name == "translate":
        raise TemplateLimitError("translate is not available")
    if name in ("replace", "do_replace") and len(texts) > 2:
        whole, old, new = texts[:3]
        _check_product(whole.count(old) if old else len(whole) + 1, len(new))  # type: ignore[arg-type]
    elif name in ("join", "do_join"):
        counts = [len(value) for value in values if isinstance(value, (list, tuple, range))]
        separator = texts[0] if isinstance(owner, _TEXT) else texts[-1] if texts else ""
        _check_product(max(counts, default=MAX_ITEMS), len(separator))
    elif name in ("do_indent", "expandtabs"):
        _check_product(_breaks(texts[0]) if texts else 0, max([8, *numbers, *map(len, texts[1:])]))
    elif name in ("format", "format_map", "do_format") and texts:
        _check_format(texts[0], [*numbers, *(size_of(value) for value in values[1:])])


def check_operands(operator: str, left: Any, right: Any) -> None:
    """Raise `TemplateLimitError` for operands whose result would be huge."""
    if operator == "*":
        for text, count in ((left, right), (right, left)):
            if isinstance(text, (*_TEXT, list, tuple)) and isinstance(count, int):
                _check_product(len(text), count)
    elif operator == "**":
        if isinstance(left, int) and isinstance(right, int) and right > 0:
            check_value(1 << min(left.bit_length() * right, MAX_BITS + 1))
    elif operator == "%" and isinstance(left, _TEXT):
        _check_format(left, [size_of(right), right if isinstance(right, int) else 0])


def _breaks(text: str | bytes) -> int:
    """Return how many lines and tabs a text has."""
    if isinstance(text, bytes):
        return text.count(b"\n") + text.count(b"\t") + 1
    return text.count("\n") + text.count("\t") + 1


def _check_format(text: str | bytes, sizes: list[int]) -> None:
    """Every field of a format may write the largest argument, or be as wide as a number says."""
    pattern = text.decode(errors="replace") if isinstance(text, bytes) else text
    if _WIDTH.search(pattern):
        raise TemplateLimitError("a format asks for a very wide field")
    fields = pattern.count("%") + pattern.count("{")
    _check_product(fields, max([10_000 if fields else 0, *sizes]))


def _check_product(count: int, size: int) -> None:
    if count * size > MAX_VALUE:
        raise _too_large()


def _too_large() -> TemplateLimitError:
    return TemplateLimitError(f"a value is larger than {MAX_VALUE} characters")
