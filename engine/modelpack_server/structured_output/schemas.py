"""JSON schemas for the grammar compiler: size checks and the whitespace policy.

A formatted JSON text has a line break and an indentation where whitespace may be, or a space. More
is never needed, and a model that may always add whitespace can go on for ever.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from modelpack_engine.errors import RequestError

#: Characters of one schema. The compiler recurses along references: see `compiling`.
MAX_SCHEMA = 128 << 10
#: Characters of all patterns of a schema together: their cost grows with the square.
MAX_PATTERNS = 8 << 10
#: Optional properties of one object. At its start the parser has four items for each, and up to
#: 2000 items: `LLParserLimits.max_items_in_row`. Their cost grows with the square.
MAX_OPTIONAL = 480
WHITESPACE = r"\x20|\n[\x20\t]{0,32}"

# Formats that the compiler knows. Others are annotations (JSON Schema 2020-12, validation, 7.2.1).
_FORMATS = frozenset(
    {"date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri"}
)
# Words that the compiler does not know, with values that say nothing: zod writes the first of them.
_IDLE: Mapping[str, tuple[Any, ...]] = {
    "propertyNames": ({"type": "string"}, {}, True),
    "uniqueItems": (False,),
    "unevaluatedProperties": ({}, True),
    "unevaluatedItems": ({}, True),
}
_DATA = frozenset({"const", "enum", "default", "examples", "x-guidance"})  # hold no schemas
_BY_NAME = frozenset(
    {"properties", "patternProperties", "$defs", "definitions", "dependentSchemas"}
)


def prepared(schema: object) -> dict[str, Any]:
    """Return a schema as it is compiled; `schema` is an object, or the text of one.

    Raises `RequestError` if it is no schema, or too large.
    """
    if isinstance(schema, str):
        if len(schema) > MAX_SCHEMA:
            raise _refusal(f"it has {len(schema)} characters, expected up to {MAX_SCHEMA}")
        try:
            schema = json.loads(schema)
        except (ValueError, RecursionError) as error:
            raise _refusal(f"it is not JSON: {error}") from error
    if not isinstance(schema, Mapping):
        raise _refusal(f"it is a {type(schema).__name__}, expected an object")
    try:
        size = len(json.dumps(schema, allow_nan=False))
        patterns = sum(map(len, _patterns(schema)))
        result = _without_idle_words(schema)
        optional = max(_optional(schema), default=0)
    except (TypeError, ValueError, RecursionError) as error:
        raise _refusal(f"it is not JSON: {error}") from error
    if size > MAX_SCHEMA:
        raise _refusal(f"it has {size} characters, expected up to {MAX_SCHEMA}")
    if patterns > MAX_PATTERNS:
        raise _refusal(f"its patterns have {patterns} characters, expected up to {MAX_PATTERNS}")
    if optional > MAX_OPTIONAL:
        raise _refusal(
            f"an object has {optional} optional properties, expected up to {MAX_OPTIONAL}",
            hint="list properties in `required`, or nest them in several objects",
        )
    options = {"whitespace_pattern": WHITESPACE, "item_separator": ",", "key_separator": ":"}
    result["x-guidance"] = options
    return result


def _refusal(reason: str, hint: str | None = None) -> RequestError:
    return RequestError(
        f"the JSON schema cannot be compiled: {reason}", param="response_format", hint=hint
    )


def _patterns(value: object) -> Iterator[str]:
    if isinstance(value, Mapping):
        pattern = value.get("pattern")
        if isinstance(pattern, str):
            yield pattern
        named = value.get("patternProperties")
        if isinstance(named, Mapping):
            yield from named
        for part in value.values():
            yield from _patterns(part)
    elif isinstance(value, list):
        for part in value:
            yield from _patterns(part)


def _optional(value: object) -> Iterator[int]:
    """Yield the number of optional properties of each object in a schema."""
    if isinstance(value, Mapping):
        named, required = value.get("properties"), value.get("required")
        if isinstance(named, Mapping):
            patterns = value.get("patternProperties")
            more = len(patterns) if isinstance(patterns, Mapping) else 0
            needed = set(map(str, required)) if isinstance(required, list) else set()
            yield len(named.keys() - needed) + more
        for part in value.values():
            yield from _optional(part)
    elif isinstance(value, list):
        for part in value:
            yield from _optional(part)


def _without_idle_words(schema: Mapping[str, Any]) -> dict[str, Any]:
    """Return a schema without what constrains nothing, which the compiler would refuse."""

    def walk(value: Any) -> Any:
        if isinstance(value, Mapping):
            return _without_idle_words(value)
        return [walk(part) for part in value] if isinstance(value, list) else value

    result: dict[str, Any] = {}
    for key, value in schema.items():
        if key == "format" and isinstance(value, str) and value not in _FORMATS:
            continue
        if key in _IDLE and value in _IDLE[key]:
            continue
        if key in _BY_NAME and isinstance(value, Mapping):
            result[key] = {name: walk(part) for name, part in value.items()}
        else:
            result[key] = value if key in _DATA else walk(value)
    return result
