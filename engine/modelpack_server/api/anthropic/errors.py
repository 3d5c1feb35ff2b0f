"""Errors as Anthropic's API tells them: `{"type": "error", "error": {"type", "message"}}`."""

from __future__ import annotations

from fastapi.responses import JSONResponse
from starlette.datastructures import Headers
from starlette.responses import Response

from modelpack_server.api.errors import Problem, problem_of
from modelpack_server.api.sse import event
from modelpack_server.gateway.families import Family, error_body, family_of

#: What the OpenAPI document shows.
ERROR_SCHEMA = {
    "type": "object",
    "required": ["type", "error"],
    "properties": {
        "type": {"const": "error"},
        "error": {
            "type": "object",
            "required": ["type", "message"],
            "properties": {"type": {"type": "string"}, "message": {"type": "string"}},
        },
        "request_id": {"type": "string"},
    },
}


def is_ours(path: str) -> bool:
    """Tell whether a path belongs to the Messages API."""
    return family_of(path, Headers()) is Family.ANTHROPIC


def anthropic_shape(problem: Problem) -> Response:
    """Return the response for a problem. A full queue, or a model that loads, is an overload: 529.

    429 is for callers who ask too often.
    """
    status = problem.status
    if problem.code in ("queue_full", "model_loading"):
        status = 529
    body = error_body(
        Family.ANTHROPIC, status, problem.message, code=None, request_id=problem.request_id
    )
    return JSONResponse(body, status, dict(problem.headers))


def anthropic_error(error: Exception) -> str:
    """Return the event of a failure in the middle of a stream."""
    problem = problem_of(error)
    status = 529 if problem.code == "queue_full" else problem.status
    return event(error_body(Family.ANTHROPIC, status, problem.message, code=None), "error")
