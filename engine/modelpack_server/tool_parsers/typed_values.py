"""Conversion of arguments from plain text to the types of the tool's JSON schema."""

from __future__ import annotations

import ast
import json
import math
import warnings
from collections.abc import Mapping
from typing import Any

from modelpack_server.tool_parsers.parts import Tool

_TYPES_OF_VALUES: dict[type, str] = {
    str: "string",
    bool: "boolean",
    int: "integer",
    float: "number",
    dict: "object",
    list: "array",
    type(None): "null",
}
# Characters of a Python literal, since Python's parser needs memory for each token.
_MAX_LITERAL = 1 << 16
_MAX_NESTING = 64


def parameter_schema(tool: Tool, parameter: str) -> Mapping[str, Any]:
    properties = tool.parameters.get("properties")
    schema = properties.get(parameter) if isinstance(properties, Mapping) else None
    if not isinstance(schema, Mapping):
        return {}
    reference = schema.get("$ref")
    if isinstance(reference, str) and reference.startswith("#/"):
        target: Any = tool.parameters
        for step in reference[2:].split("/"):
            target = target.get(step) if isinstance(target, Mapping) else None
        return target if isinstance(target, Mapping) else {}
    return schema


def allowed_types(schema: Mapping[str, Any], depth: int = 8) -> frozenset[str]:
    """Return the JSON types that a schema allows; empty if it does not restrict them."""
    named = schema.get("type")
    types = {named} if isinstance(named, str) else set()
    if isinstance(named, list):
        types |= {name for name in named if isinstance(name, str)}
    if not types:
        values = [schema["const"]] if "const" in schema else schema.get("enum")
        if isinstance(values, list):
            types |= {_TYPES_OF_VALUES[type(v)] for v in values if type(v) in _TYPES_OF_VALUES}
    for key in ("anyOf", "oneOf", "allOf"):
        branches = schema.get(key)
        if isinstance(branches, list) and depth:
            for branch in branches:
                if isinstance(branch, Mapping):
                    types |= allowed_types(branch, depth - 1)
    return frozenset(types)


def is_string(schema: Mapping[str, Any]) -> bool:
    """Return whether a schema allows only strings."""
    return allowed_types(schema) == {"string"}


def typed(text: str, schema: Mapping[str, Any]) -> Any:
    """Return the value of `text`: a string if the schema says string, otherwise JSON.

    If a schema allows strings and other types, only null, an object or an array counts as the other
    type. A text that is not valid for its type remains a string, which the tool can reject.
    """
    types = allowed_types(schema)
    if types == {"string"}:
        return text
    try:
        value = literal(text) if types else _json_or_constant(text.strip())
    except ValueError:
        return text
    if "string" in types:
        kind = _TYPES_OF_VALUES.get(type(value))
        return value if kind in types & {"null", "object", "array"} else text
    if isinstance(value, str):
        return text
    if types == {"integer"} and isinstance(value, float) and value.is_integer():
        return int(value)
    return value


def json_or_text(text: str) -> Any:
    """Return the JSON value of `text`, or the text if it is not JSON."""
    try:
        return _json_or_constant(text.strip())
    except ValueError:
        return text


def literal(text: str) -> Any:
    """Parse a text as JSON or as a Python literal; raises `ValueError` if it is neither.

    It evaluates nothing: names and calls are not literals.
    """
    text = text.strip()
    try:
        return _json_or_constant(text)
    except ValueError:
        return python_literal(parse_python(text))


def _json_or_constant(text: str) -> Any:
    constants = {"true": True, "false": False, "null": None, "none": None}
    if text.lower() in constants:
        return constants[text.lower()]
    try:
        return _finite(json.loads(text))
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def parse_python(text: str) -> ast.expr:
    """Parse a Python expression; raises `ValueError` if it is invalid, too long or too deep."""
    if len(text) > _MAX_LITERAL:
        raise ValueError("too long")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # unknown escapes in the model's strings
            return ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, MemoryError, RecursionError) as error:
        raise ValueError("not a Python expression") from error


def python_literal(node: ast.expr) -> Any:
    """Return the value of a literal, including JSON's true, false and null; raises `ValueError`."""
    try:
        value = ast.literal_eval(_Lowercase().visit(node))
    except (TypeError, SyntaxError, MemoryError, RecursionError) as error:
        raise ValueError("no literal") from error
    return _plain(value)


class _Lowercase(ast.NodeTransformer):
    """Replaces JSON's constants with Python's: templates show nested values as JSON."""

    def visit_Name(self, node: ast.Name) -> ast.expr:
        constants = {"true": True, "false": False, "null": None}
        if node.id not in constants:
            return node
        return ast.copy_location(ast.Constant(constants[node.id]), node)


def _plain(value: Any, depth: int = 0) -> Any:
    """Turn tuples and sets into lists; raise `ValueError` for values that JSON does not have."""
    if depth > _MAX_NESTING:
        raise ValueError("nested too deeply")
    if isinstance(value, dict):
        return {_key(k): _plain(v, depth + 1) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item, depth + 1) for item in value]
    if isinstance(value, (set, frozenset)):
        return [_plain(item, depth + 1) for item in sorted(value, key=repr)]
    if type(value) not in _TYPES_OF_VALUES:
        raise ValueError(f"JSON has no {type(value).__name__}")
    return _finite(value)


def _key(key: Any) -> str:
    return key if isinstance(key, str) else json.dumps(_plain(key))


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError("not a JSON value")
    return value
