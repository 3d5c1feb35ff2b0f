"""Filters and methods of text in chat templates, whose results are limited before they run.

An operation that can make a large text of small ones computes the length of its result first.
Methods that are not listed here cannot be called.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from string import Formatter
from typing import Any

import jinja2
import markupsafe
from jinja2.filters import FILTERS, make_attrgetter
from jinja2.utils import pass_environment

from modelpack_engine.templates.budget import (
    MAX_ITEMS,
    MAX_PRINTED,
    MAX_TEXT,
    Budget,
    TemplateLimitError,
    check_integer,
    check_text,
    too_large,
)

# Methods whose result is at most three times as long as the text (`upper` of "ΐ").
_PLAIN_METHODS = frozenset({
    "upper", "lower", "strip", "lstrip", "rstrip", "capitalize", "casefold", "swapcase",
    "startswith", "endswith", "find", "rfind", "index", "rindex", "count", "isdigit", "isalpha",
    "isalnum", "isspace", "isupper", "islower", "isnumeric", "isdecimal", "istitle", "isidentifier",
    "isascii", "isprintable", "removeprefix", "removesuffix", "partition", "rpartition",
})  # fmt: skip
# Methods of other values.
_METHODS: Mapping[type, frozenset[str]] = {
    dict: frozenset({"get", "items", "keys", "values", "copy"}),
    list: frozenset({"index", "count", "copy"}),
    tuple: frozenset({"index", "count"}),
    float: frozenset({"is_integer"}),
    int: frozenset({"is_integer"}),
}
_BREAKS = "\n\r\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029"
_WIDE = re.compile(r"\d{5,}")
_STAR = re.compile(r"%(?:\([^)]*\))?[-#0 +]*[\d.]*\*")
_ESCAPED_SIZE = 12  # the most characters that JSON or `repr` write for one character
_MAX_INDENT = 16
_MAX_STRIPPED = 1000  # the most characters to strip: each is compared with the text's
#: Up to this size `tojson` runs without counting its output piece by piece.
_SMALL_JSON = 1024 * 1024


def call_method(
    budget: Budget, called: Any, method: Any, args: Any, kwargs: Mapping[str, Any]
) -> Any:
    """Call `called`, which is `method` or wraps it: a method of a built-in type.

    Raises `TemplateLimitError` for one that is not allowed.
    """
    owner, name = method.__self__, method.__name__
    if isinstance(owner, str):
        if name in _PLAIN_METHODS:
            if name.endswith("strip") and any(isinstance(a, str) for a in args):
                check_text(sum(map(len, args)) * (MAX_TEXT // _MAX_STRIPPED))
            return called(*args, **kwargs)
        if name == "format":
            check_format(budget, owner, args, kwargs)
            return called(*args, **kwargs)
        if (bounded := _TEXT_METHODS.get(name)) is not None:
            return bounded(budget, owner, *args, **kwargs)
    elif name in _METHODS.get(type(owner), ()):
        return called(*args, **kwargs)
    raise TemplateLimitError(f"{type(owner).__name__}.{name}() is not available in templates")


def text_of(budget: Budget, value: Any) -> str:
    """Return a value as `{{ value }}` writes it."""
    if isinstance(value, str):
        return value
    if isinstance(value, int):
        check_integer(value)
    elif budget.size_of(value) > MAX_PRINTED:
        raise too_large()
    text = str(value)
    if isinstance(value, (list, tuple, dict)):
        budget.made(text)
    return text


def joined(budget: Budget, values: Iterable[Any], separator: Any = "") -> str:
    """Return the texts of `values` with `separator` between them."""
    between = text_of(budget, separator)
    parts = []
    length = 0
    for value in budget.each(values):
        part = text_of(budget, value)
        length += len(part) + len(between)
        check_text(length - len(between))
        parts.append(part)
    return between.join(parts)


def replaced(budget: Budget, text: Any, old: Any, new: Any, count: int | None = None) -> str:
    """Return `text` with `new` for `old`, `count` times at most."""
    text, old, new = (text_of(budget, value) for value in (text, old, new))
    found = text.count(old)
    check_text(len(text) + found * max(0, len(new) - len(old)))
    return str(text.replace(old, new, -1 if count is None else count))


def indented(
    budget: Budget, text: Any, width: int | str = 4, first: bool = False, blank: bool = False
) -> str:
    """Return `text` with its lines indented, as Jinja's filter."""
    text = text_of(budget, text)
    check_text(width if isinstance(width, int) else len(width))
    space = " " * width if isinstance(width, int) else width
    lines = _lines(budget, text + "\n")
    check_text(len(text) + len(space) * (len(lines) + 1))
    begun = space if first else ""
    if blank:
        return begun + f"\n{space}".join(lines)
    rest = (f"\n{space}{line}" if line else "\n" for line in lines[1:])
    return begun + "".join([*lines[:1], *rest])


def formatted(budget: Budget, text: Any, *args: Any, **kwargs: Any) -> str:
    """Return `text % args`, as Jinja's filter."""
    if args and kwargs:
        raise jinja2.TemplateRuntimeError("format takes arguments by position or by name, not both")
    text = text_of(budget, text)
    values = kwargs or args
    check_percent(budget, text, values)
    return str(text % values)


def as_json(
    budget: Budget,
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Return JSON as transformers writes it: without Jinja's HTML escapes."""
    size = budget.size_of(value)
    if isinstance(indent, int):
        check_text(indent * (MAX_TEXT // _MAX_INDENT))
    for text in (indent, *(separators or ())):
        if isinstance(text, str) and len(text) > _MAX_INDENT:
            raise TemplateLimitError(f"tojson writes at most {_MAX_INDENT} characters per level")
    encoder = json.JSONEncoder(
        ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )
    if size <= _SMALL_JSON:
        return encoder.encode(value)
    parts = []
    length = 0
    for part in encoder.iterencode(value):
        length += len(part)
        check_text(length)
        parts.append(part)
    return "".join(parts)


def check_format(
    budget: Budget, pattern: str, args: Iterable[Any], kwargs: Mapping[str, Any]
) -> None:
    """Raise `TemplateLimitError` for a `str.format` whose result may be too long."""
    specs = [spec for _, name, spec, _ in Formatter().parse(pattern) if name is not None]
    if any(spec and ("{" in spec or _WIDE.search(spec)) for spec in specs):
        raise TemplateLimitError("a format asks for a wide or computed field")
    _check_fields(budget, len(specs), [*args, *kwargs.values()])


def check_percent(budget: Budget, pattern: str, values: Any) -> None:
    """Raise `TemplateLimitError` for `pattern % values` whose result may be too long."""
    if _WIDE.search(pattern) or _STAR.search(pattern):
        raise TemplateLimitError("a format asks for a wide or computed field")
    if isinstance(values, dict):
        values = tuple(values.values())
    _check_fields(budget, pattern.count("%"), values if isinstance(values, tuple) else (values,))


def _check_fields(budget: Budget, fields: int, values: Iterable[Any]) -> None:
    sizes = [
        len(value) if isinstance(value, str) else _ESCAPED_SIZE * budget.size_of(value)
        for value in values
    ]
    check_text(fields * max([10_000 if fields > 800 else 0, *sizes]))


def _lines(budget: Budget, text: str, keepends: bool = False) -> list[str]:
    _check_pieces(sum(map(text.count, _BREAKS)))
    return text.splitlines(keepends)


def _splitter(name: str) -> Callable[..., list[str]]:
    def split(budget: Budget, text: str, sep: Any = None, maxsplit: int = -1) -> Any:
        if not 0 <= maxsplit <= MAX_ITEMS:
            if sep is not None:
                _check_pieces(text.count(sep))
            elif len(text) >= 2 * MAX_ITEMS:
                _check_pieces(sum(map(text.count, " \t\u3000\xa0" + _BREAKS)))
        return getattr(text, name)(sep, maxsplit)

    return split


def _check_pieces(pieces: int) -> None:
    if pieces > MAX_ITEMS:
        raise too_large()


def trimmed(budget: Budget, value: Any, chars: str | None = None) -> str:
    """Return the text without white space, or `chars`, around it."""
    check_text(len(chars or "") * (MAX_TEXT // _MAX_STRIPPED))
    return text_of(budget, value).strip(chars)


def _padded(name: str) -> Callable[..., str]:
    def padded(budget: Budget, text: str, width: int, *fill: Any) -> str:
        check_text(width)
        return str(getattr(text, name)(width, *fill))

    return padded


def _expanded(budget: Budget, text: str, tabsize: int = 8) -> str:
    check_text(len(text) + text.count("\t") * max(0, tabsize))
    return text.expandtabs(tabsize)


def _joined_by(budget: Budget, separator: str, values: Any) -> str:
    if not all(isinstance(value, str) for value in budget.each(values)):
        raise TypeError("join expects texts")
    return joined(budget, values, separator)


_TEXT_METHODS: Mapping[str, Callable[..., Any]] = {
    "splitlines": _lines,
    "title": lambda budget, text: text.title(),
    "join": _joined_by,
    "replace": replaced,
    "expandtabs": _expanded,
    **{name: _splitter(name) for name in ("split", "rsplit")},
    **{name: _padded(name) for name in ("ljust", "rjust", "center", "zfill")},
}


# Filters that read their first argument item by item, and return some of these items.
_OF_ITEMS = frozenset({
    "batch", "slice", "list", "map", "select", "reject", "selectattr", "rejectattr", "groupby",
    "sort", "unique", "min", "max", "first", "last", "dictsort", "items",
})  # fmt: skip
_PLAIN = frozenset({
    "abs", "attr", "capitalize", "count", "d", "default", "filesizeformat", "float", "int",
    "length", "lower", "reverse", "round", "title", "truncate", "upper",
})  # fmt: skip
# The largest number among the arguments of a filter.
_LARGEST = {"batch": 10_000, "slice": 10_000, "round": 100}
# The longest text among the arguments of a filter.
_LONGEST = {"int": 5_000, "title": MAX_ITEMS}
_CHARACTER = 80  # bytes of a text of one character

Bounded = Callable[..., Any]


def bounded_filters(budget: Callable[[], Budget]) -> dict[str, Bounded]:
    """Return all filters by name, each charged to what `budget` returns."""
    own: Mapping[str, Bounded] = {
        "join": _join,
        "replace": replaced,
        "indent": indented,
        "format": formatted,
        "string": text_of,
        "safe": text_of,
        "tojson": as_json,
        "trim": trimmed,
        "sum": _sum,
        **dict.fromkeys(("e", "escape", "forceescape"), _escape),
    }
    filters = {name: bounded(budget, FILTERS[name], name) for name in _OF_ITEMS | _PLAIN}
    for name, filter_ in own.items():
        wants_environment = hasattr(filter_, "jinja_pass_arg")
        run = _with_environment(filter_) if wants_environment else filter_
        filters[name] = _charged(budget, filter_, run)
    return filters


def bounded(budget: Callable[[], Budget], function: Bounded, name: str) -> Bounded:
    """Return a filter or a test of Jinja with a charge for each use."""

    def run(now: Budget, *args: Any, **kwargs: Any) -> Any:
        _check(now, name, (*args, *kwargs.values()))
        return function(*args, **kwargs)

    return _charged(budget, function, run)


def _check(budget: Budget, name: str, values: tuple[Any, ...]) -> None:
    for value in values:
        if isinstance(value, str):
            longest = MAX_ITEMS if name in _OF_ITEMS else _LONGEST.get(name, len(value))
            if len(value) > longest:
                raise TemplateLimitError(f"the filter {name} got a text that is too long")
            if name in _OF_ITEMS:
                budget.spend(_CHARACTER * len(value))
        elif isinstance(value, int) and abs(value) > _LARGEST.get(name, abs(value)):
            raise TemplateLimitError(f"the filter {name} got a number that is too large")


def _with_environment(function: Bounded) -> Bounded:
    return lambda now, environment, *args, **kwargs: function(environment, now, *args, **kwargs)


def _charged(budget: Callable[[], Budget], function: Bounded, run: Bounded) -> Bounded:
    def charged(*args: Any, **kwargs: Any) -> Any:
        now = budget()
        now.step()
        now.check_arguments((*args, *kwargs.values()))
        return now.made(run(now, *args, **kwargs))

    # Jinja reads from its attributes whether a filter wants the context.
    charged.__dict__.update(getattr(function, "__dict__", {}))
    return charged


@pass_environment
def _join(environment: Any, budget: Budget, values: Any, d: Any = "", attribute: Any = None) -> str:
    if attribute is not None:
        values = map(make_attrgetter(environment, attribute), values)
    return joined(budget, values, d)


@pass_environment
def _sum(
    environment: Any, budget: Budget, values: Any, attribute: Any = None, start: Any = 0
) -> Any:
    if attribute is not None:
        values = map(make_attrgetter(environment, attribute), values)
    total = start
    for value in budget.each(values):
        if not isinstance(total, (int, float)) or not isinstance(value, (int, float)):
            raise TypeError("sum expects numbers")
        total += value
    return total


def _escape(budget: Budget, value: Any) -> str:
    text = text_of(budget, value)
    check_text(5 * len(text))
    return str(markupsafe.escape(text))
