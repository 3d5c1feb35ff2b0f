"""Plain text converted to the types of a schema."""

from __future__ import annotations

from typing import Any

import pytest

from modelpack_server.tool_parsers.parts import Tool
from modelpack_server.tool_parsers.typed_values import (
    json_or_text,
    literal,
    parameter_schema,
    typed,
)

STRING = {"type": "string"}
OR_NULL = {"anyOf": [STRING, {"type": "null"}]}


@pytest.mark.parametrize(
    ("text", "schema", "value"),
    [
        ("42", STRING, "42"),
        (" null ", STRING, " null "),
        ("42", {"type": "integer"}, 42),
        ("42.0", {"type": "integer"}, 42),
        ("4.5", {"type": "number"}, 4.5),
        ("many", {"type": "integer"}, "many"),
        ("TRUE", {"type": "boolean"}, True),
        ("None", {"type": "null"}, None),
        ("null", OR_NULL, None),
        ("42", OR_NULL, "42"),
        ("42", {"type": ["integer", "null"]}, 42),
        ("[1]", {"type": ["string", "array"]}, [1]),
        ("[1", {"type": "array"}, "[1"),
        ("{'a': (1, True)}", {"type": "object"}, {"a": [1, True]}),
        ("{1: 2}", {"type": "object"}, {"1": 2}),
        ("{'b'}", {"type": "array"}, ["b"]),
        ("5", {"enum": ["5", "6"]}, "5"),
        ("5", {"enum": [5, 6]}, 5),
        ("5", {"const": 5}, 5),
        ("5", {}, 5),
        ("1_000", {}, "1_000"),
        ("Paris", {}, "Paris"),
        ('"Paris"', {}, '"Paris"'),
        ("1e999", {}, "1e999"),
        ("__import__('os')", {"type": "object"}, "__import__('os')"),
        ("[x for x in y]", {"type": "array"}, "[x for x in y]"),
        ("b'x'", {"type": "array"}, "b'x'"),
        ("5", {"type": 7, "anyOf": 3, "oneOf": [None], "enum": "x"}, 5),
    ],
)
def test_typed(text: str, schema: dict[str, Any], value: Any) -> None:
    result = typed(text, schema)
    assert result == value
    assert type(result) is type(value)


@pytest.mark.parametrize(
    "text",
    ["[" * 50_000, "-" * 50_000, "a." * 30_000, "1+" * 30_000 + "1", "(" * 500, "{'a':" * 5_000,
     "not " * 10_000 + "1", "9" * 5_000, "'" * 3, "\x00", "[" * 60_000 + "]" * 60_000],
)  # fmt: skip
def test_what_is_long_or_deep_is_text(text: str) -> None:
    assert typed(text, {"type": "array"}) == text
    with pytest.raises(ValueError, match=r".*"):
        literal(text)
    assert json_or_text(text) == text


def test_schemas_of_parameters() -> None:
    schema = {
        "$defs": {"City": {"type": "string"}},
        "properties": {"a": {"$ref": "#/$defs/City"}, "b": {"$ref": "#/$defs/Nope"}, "c": True},
    }
    tool = Tool("f", parameters=schema)
    assert parameter_schema(tool, "a") == {"type": "string"}
    for other in ("b", "c", "d"):
        assert parameter_schema(tool, other) == {}
    assert parameter_schema(Tool("f", parameters={"properties": None}), "a") == {}
    recursive: dict[str, Any] = {"anyOf": [{"type": "string"}]}
    recursive["anyOf"].append(recursive)
    assert typed("42", recursive) == "42"
