"""`response_format` of the OpenAI API: what the answer's text has to be."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from modelpack_engine.errors import RequestError
from modelpack_server.structured_output import Constraint

_PARAM = "response_format"


def constraint_of(value: Mapping[str, Any] | None) -> Constraint | None:
    """Return the constraint; None for plain text. Raises `RequestError` for what is no format.

    Besides OpenAI's three there are `regex` and `grammar` (as vLLM has them), each with a field of
    its own name.
    """
    if value is None:
        return None
    kind = value.get("type")
    if kind == "text":
        return None
    if kind == "json_object":
        schema = value.get("schema")  # llama.cpp's way
        if isinstance(schema, dict):
            return Constraint("json_schema", schema)
        return Constraint("json_object", "")
    if kind == "json_schema":
        inner = value.get("json_schema")
        if not isinstance(inner, dict):
            raise RequestError("json_schema is missing", param=f"{_PARAM}.json_schema")
        schema = inner.get("schema", {})
        if not isinstance(schema, dict):
            raise RequestError("the schema is no object", param=f"{_PARAM}.json_schema.schema")
        return Constraint("json_schema", schema)
    if kind in ("regex", "grammar"):
        text = value.get(kind)
        if not isinstance(text, str):
            raise RequestError(f"{kind} is missing", param=f"{_PARAM}.{kind}")
        return Constraint(kind, text)
    raise RequestError(
        f"the type {kind!r} is none of text, json_object, json_schema, regex, grammar",
        param=f"{_PARAM}.type",
    )
