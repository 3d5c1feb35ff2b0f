"""Objects that name their properties have no others, as in llama.cpp."""

from __future__ import annotations

import json
from typing import Any

import jsonschema
import pytest

from modelpack_engine.errors import RequestError
from modelpack_engine.models.tokenizer import Tokenizer
from modelpack_server.structured_output import Constraint, GrammarVocabulary, compile_constraint
from modelpack_server.structured_output.closed_objects import check_strict, close_objects
from tests.engine.structured.walking import accepts

A, B = {"a": {"type": "integer"}}, {"b": {"type": "integer"}}
NAMED_A = {"type": "object", "properties": A}
NO_MORE = {"additionalProperties": False}

# Schema, values that it accepts, values with keys that it does not name.
SCHEMAS: list[tuple[dict[str, Any], list[Any], list[Any]]] = [
    (NAMED_A, [{}, {"a": 1}], [{"a": 1, "x": 2}, {"x": 2}]),
    ({"properties": A, "type": ["object", "null"]}, [None, {"a": 1}], [{"x": 1}]),
    ({"type": "array", "items": NAMED_A}, [[{"a": 1}]], [[{"a": 1, "x": 2}]]),
    ({"type": "object", "properties": {"o": NAMED_A}}, [{"o": {"a": 1}}], [{"o": {"x": 1}}]),
    ({"anyOf": [NAMED_A, {"type": "null"}]}, [None, {"a": 1}], [{"x": 1}]),
    ({"$defs": {"n": NAMED_A}, "$ref": "#/$defs/n"}, [{"a": 1}], [{"a": 1, "x": 2}]),
    ({"allOf": [{"$ref": "#/$defs/n"}], "$defs": {"n": NAMED_A}}, [{"a": 1}], [{"x": 2}]),
    (
        {"type": "object", "properties": {"properties": {"type": "string"}, "c": {"const": {}}}},
        [{"properties": "x"}, {"c": {}}], [{"x": 1}, {"c": {"x": 1}}],
    ),
    (
        {**NAMED_A, "anyOf": [{"required": ["a"]}, {"maxProperties": 0}]},
        [], [],
    ),
    # The schema decides, or names properties in several places.
    (NAMED_A | {"additionalProperties": True}, [{"a": 1, "x": 2}], []),
    (NAMED_A | {"additionalProperties": {"type": "null"}}, [{"a": 1, "x": None}], [{"x": 1}]),
    ({"type": "object"}, [{"x": 1}], []),
    ({"type": "object", "properties": A, "required": ["b"]}, [{"a": 1, "b": 2}], []),
    (
        {"allOf": [{"$ref": "#/$defs/n"}, {"properties": B, "required": ["b"]}],
         "$defs": {"n": NAMED_A}},
        [{"a": 1, "b": 2}], [],
    ),
]  # fmt: skip


@pytest.mark.parametrize(("schema", "right", "wrong"), SCHEMAS)
def test_objects_have_no_other_keys(
    schema: dict[str, Any],
    right: list[Any],
    wrong: list[Any],
    vocabulary: GrammarVocabulary,
    tokenizer: Tokenizer,
) -> None:
    before = json.dumps(schema)
    closed = close_objects(schema)
    assert json.dumps(schema) == before
    for value in right:
        jsonschema.validate(value, closed)
    for value in wrong:
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(value, closed)
    if right:
        grammar = compile_constraint(Constraint("json_schema", schema), vocabulary)
        assert [accepts(grammar, tokenizer, json.dumps(value)) for value in right] == [True] * len(
            right
        )
        assert not any(accepts(grammar, tokenizer, json.dumps(value)) for value in wrong)


def test_properties_beside_others_stay_open() -> None:
    combined = NAMED_A | {"anyOf": [{"properties": B}, {"required": ["a"]}]}
    assert close_objects(combined) == combined
    recursive = {"properties": {"next": {"$ref": "#"}}, "required": ["next"]}
    assert close_objects(recursive) == recursive | NO_MORE


def test_strict_schemas_allow_no_other_keys() -> None:
    check_strict({"properties": {"a": NAMED_A | NO_MORE}}, "tools")
    check_strict({"default": {"additionalProperties": True}}, "tools")
    deep: dict[str, Any] = NAMED_A
    for _ in range(5000):
        deep = {"items": deep}
    check_strict(deep, "tools")
    for wrong in ({"type": "null"}, True, {}):
        inner = {"properties": {"a": {"items": NAMED_A | {"additionalProperties": wrong}}}}
        with pytest.raises(RequestError, match="additionalProperties") as caught:
            check_strict(inner, "tools")
        assert caught.value.param == "tools"
