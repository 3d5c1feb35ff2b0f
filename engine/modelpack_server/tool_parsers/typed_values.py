"""Arguments written as bare text, converted to the types of the tool's JSON schema."""

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
_MAX_LITERAL = 1 << 16  # characters of a Python literal; the compiler takes memory by the token
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
    """Return the names of the JSON types that a schema admits; empty where it does not say."""
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
    """Tell whether a schema admits strings, and nothing else."""
    return allowed_types(schema) == {"string"}


def typed(text: str, schema: Mapping[str, Any]) -> Any:
    """Return the value that `text` spells: a string where the schema says string, else JSON.

    Where a schema admits strings and other things, a text is the other thing only if it can hardly
    be meant as a string: null, an object, an array. What cannot be read as what it should be stays
    a string, for the tool to complain about.
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
    """Return the JSON value that `text` is, or the text where it is none."""
    try:
        return _json_or_constant(text.strip())
    except ValueError:
        return text


def literal(text: str) -> Any:
    """Read a value as JSON, else as a Python literal; raises `ValueError` for anything else.

    Never evaluates: a name or a call in the text is no literal.
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
    """Parse one Python expression; raises `ValueError` for what is none, too long or too deep."""
    if len(text) > _MAX_LITERAL:
        raise ValueError("too long")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # an unknown escape in the model's strings
            return ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, MemoryError, RecursionError) as error:
        raise ValueError("no Python expression") from error


def python_literal(node: ast.expr) -> Any:
    """Return the value of a literal, true, false and null included; raises `ValueError`."""
    try:
        value = ast.literal_eval(_Lowercase().visit(node))
    except (TypeError, SyntaxError, MemoryError, RecursionError) as error:
        raise ValueError("no literal") from error
    return _plain(value)


class _Lowercase(ast.NodeTransformer):
    """JSON's spelling of constants: templates show nested values as JSON."""

    def visit_Name(self, node: ast.Name) -> ast.expr:
        constants = {"true": True, "false": False, "null": None}
        if node.id not in constants:
            return node
        return ast.copy_location(ast.Constant(constants[node.id]), node)


def _plain(value: Any, depth: int = 0) -> Any:
    """Turn tuples and sets into lists and refuse what JSON has no word for."""
    if depth > _MAX_NESTING:
        raise ValueError("nested too deeply")
    if isinstance(value, dict):
        return {_key(k): _plain(v, depth + 1) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item, depth + 1) for item in value]
    if isinstance(value, (set, frozenset)):
        return [_plain(item, depth + 1) for item in sorted(value, key=repr)]
    if type(value) not in _TYPES_OF_VALUES:
        raise ValueError(f"no JSON for {type(value).__name__}")
    return _finite(value)


def _key(key: Any) -> str:
    return key if isinstance(key, str) else json.dumps(_plain(key))


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError("JSON has no word for it")
    return value
