"""The filters of chat templates: those of Jinja that can be bounded, and our own for the others.

A filter that is not in these tables does not exist.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import markupsafe
from jinja2.filters import FILTERS, make_attrgetter
from jinja2.utils import pass_environment

from modelpack_engine.templates import operations
from modelpack_engine.templates.budget import MAX_ITEMS, Budget, TemplateLimitError, check_text

# They read their first argument item by item; the result is made of these items.
_OF_ITEMS = frozenset(
    {
        "batch",
        "slice",
        "list",
        "map",
        "select",
        "reject",
        "selectattr",
        "rejectattr",
        "groupby",
        "sort",
        "unique",
        "min",
        "max",
        "first",
        "last",
        "dictsort",
        "items",
    }
)
_PLAIN = frozenset(
    {
        "abs",
        "attr",
        "capitalize",
        "count",
        "d",
        "default",
        "filesizeformat",
        "float",
        "int",
        "length",
        "lower",
        "reverse",
        "round",
        "title",
        "truncate",
        "upper",
    }
)
# The largest numbers that these take beside their value.
_LARGEST = {"batch": 10_000, "slice": 10_000, "round": 100}
# The longest texts that these read.
_LONGEST = {"int": 5_000, "title": MAX_ITEMS}
_CHARACTER = 80  # bytes of a text of one character

Bounded = Callable[..., Any]


def bounded_filters(budget: Callable[[], Budget]) -> dict[str, Bounded]:
    """Return all filters by name, each charged to what `budget` returns."""
    own: Mapping[str, Bounded] = {
        "join": _join,
        "replace": operations.replaced,
        "indent": operations.indented,
        "format": operations.formatted,
        "string": operations.text_of,
        "safe": operations.text_of,
        "tojson": operations.as_json,
        "trim": operations.trimmed,
        "sum": _sum,
        **dict.fromkeys(("e", "escape", "forceescape"), _escape),
    }
    filters = {name: bounded(budget, FILTERS[name], name) for name in _OF_ITEMS | _PLAIN}
    return filters | {name: _with_budget(budget, filter_) for name, filter_ in own.items()}


def bounded(budget: Callable[[], Budget], function: Bounded, name: str) -> Bounded:
    """Return a filter or a test of Jinja with a charge for each use."""

    def charged(*args: Any, **kwargs: Any) -> Any:
        now = budget()
        now.step()
        values = (*args, *kwargs.values())
        now.check_arguments(values)
        _check(now, name, values)
        return now.made(function(*args, **kwargs))

    # Jinja reads from its attributes whether a filter wants the context.
    charged.__dict__.update(getattr(function, "__dict__", {}))
    return charged


def _check(budget: Budget, name: str, values: tuple[Any, ...]) -> None:
    for value in values:
        if isinstance(value, str):
            if len(value) > _LONGEST.get(name, len(value)):
                raise TemplateLimitError(f"the filter {name} got a text that is too long")
            if name in _OF_ITEMS:
                if len(value) > MAX_ITEMS:
                    raise TemplateLimitError(f"the filter {name} got a text that is too long")
                budget.spend(_CHARACTER * len(value))
        elif isinstance(value, int) and abs(value) > _LARGEST.get(name, abs(value)):
            raise TemplateLimitError(f"the filter {name} got a number that is too large")


def _with_budget(budget: Callable[[], Budget], function: Bounded) -> Bounded:
    wants_environment = getattr(function, "jinja_pass_arg", None) is not None

    def charged(*args: Any, **kwargs: Any) -> Any:
        now = budget()
        now.step()
        now.check_arguments((*args, *kwargs.values()))
        if wants_environment:
            return now.made(function(args[0], now, *args[1:], **kwargs))
        return now.made(function(now, *args, **kwargs))

    charged.__dict__.update(getattr(function, "__dict__", {}))
    return charged


@pass_environment
def _join(environment: Any, budget: Budget, values: Any, d: Any = "", attribute: Any = None) -> str:
    if attribute is not None:
        values = map(make_attrgetter(environment, attribute), values)
    return operations.joined(budget, values, d)


@pass_environment
def _sum(
    environment: Any, budget: Budget, values: Any, attribute: Any = None, start: Any = 0
) -> Any:
    if attribute is not None:
        values = map(make_attrgetter(environment, attribute), values)
    total = start
    for value in budget.each(values):
        if not isinstance(total, (int, float)) or not isinstance(value, (int, float)):
            raise TypeError("sum takes numbers")
        total += value
    return total


def _escape(budget: Budget, value: Any) -> str:
    text = operations.text_of(budget, value)
    check_text(5 * len(text))
    return str(markupsafe.escape(text))
