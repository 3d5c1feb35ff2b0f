"""The OpenAPI document: what FastAPI makes of the routes, with the errors that we really give."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI

_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}


@dataclass(frozen=True, slots=True)
class Errors:
    """What errors look like: on which paths, the schema, its name and the type of the body."""

    fits: Callable[[str], bool]
    name: str
    schema: Mapping[str, Any]
    media_type: str = "application/json"


_OPENAI = Errors(lambda path: True, "Error", _ERROR)


def describe(app: FastAPI, families: Sequence[Errors] = ()) -> None:
    """Have `app` show the document without FastAPI's own 422, which is a 400 here.

    `families` are those whose errors look different from OpenAI's.
    """
    make = app.openapi

    def openapi() -> dict[str, Any]:
        made = app.openapi_schema is not None
        document = make()
        if made:
            return document
        parts = document.setdefault("components", {}).setdefault("schemas", {})
        for name in ("HTTPValidationError", "ValidationError"):
            parts.pop(name, None)
        parts |= {errors.name: errors.schema for errors in (*families, _OPENAI)}
        for path, operations in document["paths"].items():
            errors = next(errors for errors in (*families, _OPENAI) if errors.fits(path))
            schema = {"$ref": f"#/components/schemas/{errors.name}"}
            for operation in operations.values():
                if operation["responses"].pop("422", None) is not None:
                    content = {errors.media_type: {"schema": schema}}
                    refused = {"description": "The request is wrong", "content": content}
                    operation["responses"]["400"] = refused
        return document

    app.openapi = openapi  # type: ignore[method-assign]
