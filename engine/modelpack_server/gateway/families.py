"""API families: which API a request speaks, and the one table of error shapes.

The gateway's checks and the server's routes both answer with these errors. Docker Model Runner's
plain-text errors are in `api.model_runner.answers`.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from enum import StrEnum
from typing import Any

from starlette.datastructures import Headers
from starlette.responses import JSONResponse, Response
from starlette.types import Scope


class Family(StrEnum):
    """The API that a client speaks."""

    OPENAI = "openai"
    ANTHROPIC = "anthropic"
    OLLAMA = "ollama"


# A path may hold line breaks, which clients can write as %0A.
_ANTHROPIC = re.compile(r"/anthropic(/.*)?|(/engines(/[^/]+)?)?/v1/messages(/.*)?", re.DOTALL)


def family_of(path: str, headers: Headers) -> Family:
    """Return the API family of a request, by its path and headers."""
    if path == "/api" or path.startswith("/api/"):
        return Family.OLLAMA
    if _ANTHROPIC.fullmatch(path) or "anthropic-version" in headers:
        return Family.ANTHROPIC
    return Family.OPENAI


def family_in(scope: Scope) -> Family:
    """Return the API family of the request of an ASGI scope."""
    return family_of(scope["path"], Headers(scope=scope))


# Error types by HTTP status; then the types of other client errors and server errors.
_TYPES: Mapping[Family, tuple[Mapping[int, str], str, str]] = {
    Family.OPENAI: (
        {
            401: "authentication_error", 403: "permission_error", 429: "rate_limit_error",
            503: "service_unavailable",
        },
        "invalid_request_error",
        "server_error",
    ),
    Family.ANTHROPIC: (
        {
            401: "authentication_error", 403: "permission_error", 404: "not_found_error",
            413: "request_too_large", 429: "rate_limit_error", 504: "timeout_error",
            529: "overloaded_error",
        },
        "invalid_request_error",
        "api_error",
    ),
}  # fmt: skip
# Anthropic's status for an overloaded server is 529; its 429 means a client's rate limit.
_OVERLOADED = frozenset(("queue_full", "model_loading", "bodies_in_flight", "upstream_error"))


def _object(**properties: Any) -> dict[str, Any]:
    return {"type": "object", "required": list(properties), "properties": properties}


_STRING = {"type": "string"}
_OPTIONAL = {"type": ["string", "null"]}

#: The name and the JSON Schema of each family's errors, for the OpenAPI document.
ERROR_SCHEMAS: Mapping[Family, tuple[str, Mapping[str, Any]]] = {
    Family.OPENAI: (
        "Error",
        _object(error=_object(message=_STRING, type=_STRING, param=_OPTIONAL, code=_OPTIONAL)),
    ),
    Family.ANTHROPIC: (
        "AnthropicError",
        {
            "type": "object",
            "required": ["type", "error"],
            "properties": {
                "type": {"const": "error"},
                "error": _object(type=_STRING, message=_STRING),
                "request_id": _STRING,
            },
        },
    ),
    Family.OLLAMA: ("OllamaError", _object(error=_STRING)),
}


def _status(family: Family, status: int, code: str | None) -> int:
    """Return the HTTP status by which `family` reports an error."""
    is_overload = status in (429, 503) and code in _OVERLOADED
    return 529 if family is Family.ANTHROPIC and is_overload else status


def error_body(
    family: Family,
    status: int,
    message: str,
    *,
    code: str | None = None,
    param: str | None = None,
    request_id: str | None = None,
) -> dict[str, Any]:
    """Return the JSON object of an error in the shape of `family`."""
    if family is Family.OLLAMA:
        return {"error": message}
    status = _status(family, status, code)
    types, client_error, server_error = _TYPES[family]
    kind = types.get(status, client_error if status < 500 else server_error)
    if family is Family.ANTHROPIC:
        body = {"type": "error", "error": {"type": kind, "message": message}}
        return body | {"request_id": request_id} if request_id else body
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def error_response(
    family: Family,
    status: int,
    message: str,
    *,
    code: str | None = None,
    param: str | None = None,
    headers: Mapping[str, str] | None = None,
    request_id: str | None = None,
) -> Response:
    """Return the response for an error in the shape of `family`."""
    body = error_body(family, status, message, code=code, param=param, request_id=request_id)
    return JSONResponse(body, _status(family, status, code), dict(headers or {}))


def retry_headers(seconds: float) -> dict[str, str]:
    """Return the headers that ask a client to retry after `seconds`.

    OpenAI's and Anthropic's clients read `retry-after-ms`.
    """
    return {
        "Retry-After": str(max(1, math.ceil(seconds))),
        "retry-after-ms": str(max(1, math.ceil(seconds * 1000))),
    }


def stream_error(family: Family, media_type: str, message: str) -> bytes | None:
    """Return the last event of an interrupted stream, or None if `media_type` is not a stream."""
    body = json.dumps(error_body(family, 500, message, code="upstream_error"))
    if media_type == "text/event-stream":
        event = "event: error\n" if family is Family.ANTHROPIC else ""
        return f"\n\n{event}data: {body}\n\n".encode()  # blank lines end an incomplete event
    if media_type == "application/x-ndjson":
        return f"\n{body}\n".encode()
    return None
