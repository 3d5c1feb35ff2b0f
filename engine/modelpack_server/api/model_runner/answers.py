"""Plain-text errors, as `docker model` prints them, and request bodies of any Content-Type."""

from __future__ import annotations

import logging
from collections.abc import Callable, Coroutine, Mapping
from typing import Any, TypeVar

from fastapi import Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import PlainTextResponse
from pydantic import BaseModel, ValidationError

from modelpack.errors import (
    AuthError,
    ConflictError,
    InvalidReferenceError,
    ModelpackError,
    NotFoundError,
    StorageFullError,
    UnsupportedError,
)
from modelpack_server.api.bodies import BodyRoute, read_json
from modelpack_server.api.errors import Problem, problem_of

_log = logging.getLogger(__name__)

M = TypeVar("M", bound=BaseModel)

# The beginning of each error message is Docker Model Runner's text; the details follow it.
_KNOWN: tuple[tuple[type[ModelpackError], int, str], ...] = (
    (InvalidReferenceError, 400, "Invalid model reference"),
    (AuthError, 401, "Unauthorized"),
    (NotFoundError, 404, "Model not found"),
    (ConflictError, 409, ""),
    (UnsupportedError, 422, ""),
    (StorageFullError, 507, ""),
)


def text_response(problem: Problem) -> Response:
    return PlainTextResponse(problem.message + "\n", problem.status, dict(problem.headers))


def described(error: Exception) -> Problem:
    """Return an error with the status and text that Docker Model Runner would send."""
    for kind, status, words in _KNOWN:
        if isinstance(error, kind):
            hint = f". {error.hint}" if error.hint else ""
            return Problem(status, f"{words}: {error}{hint}" if words else f"{error}{hint}")
    return problem_of(error)


class TextRoute(BodyRoute):
    """A route whose errors are plain text."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Return a handler that also turns exceptions into responses."""
        answer = super().get_route_handler()

        async def handle(request: Request) -> Response:
            try:
                return await answer(request)
            except (ModelpackError, RequestValidationError) as error:
                problem = described(error)
                if problem.status >= 500:
                    _log.error("%s %s: %s", request.method, request.url.path, problem.message)
                return text_response(problem)

        return handle


async def read_body(request: Request, kind: type[M]) -> M:
    """Return the parsed body, ignoring Content-Type; an empty body counts as an empty object.

    Raises `RequestValidationError`.
    """
    try:
        return kind.model_validate(await read_json(request) if await request.body() else {})
    except ValidationError as error:
        raise RequestValidationError(error.errors()) from error


def documented(kind: type[BaseModel], *, required: bool = True) -> dict[str, Any]:
    """Return the OpenAPI description of a body that `read_body` reads."""
    schema = kind.model_json_schema()
    schema = _inlined(schema, schema.pop("$defs", {}))
    content = {"application/json": {"schema": schema}}
    return {"requestBody": {"required": required, "content": content}}


def _inlined(value: Any, definitions: Mapping[str, Any]) -> Any:
    """Return a JSON Schema with each `$ref` replaced by its definition."""
    if isinstance(value, list):
        return [_inlined(item, definitions) for item in value]
    if not isinstance(value, dict):
        return value
    if "$ref" in value:
        return _inlined(definitions[value["$ref"].rpartition("/")[2]], definitions)
    return {key: _inlined(item, definitions) for key, item in value.items()}
