"""Which API a path belongs to, and how that API shows an error."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from enum import StrEnum
from typing import Any

from starlette.datastructures import Headers
from starlette.responses import Response


class Family(StrEnum):
    """The API that a client speaks."""

    OPENAI = "openai"
    ANTHROPIC = "anthropic"
    OLLAMA = "ollama"


_ANTHROPIC = re.compile(r"/anthropic(/.*)?|(/engines(/[^/]+)?)?/v1/messages(/.*)?")
_OPENAI_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error",
                 503: "service_unavailable"}  # fmt: skip
_ANTHROPIC_TYPES = {
    401: "authentication_error", 403: "permission_error", 404: "not_found_error",
    413: "request_too_large", 429: "rate_limit_error", 504: "timeout_error",
    529: "overloaded_error",
}  # fmt: skip


def family_of(path: str, headers: Headers) -> Family:
    """Return whose errors a client expects that asks for `path`."""
    if path == "/api" or path.startswith("/api/"):
        return Family.OLLAMA
    if _ANTHROPIC.fullmatch(path) or "anthropic-version" in headers:
        return Family.ANTHROPIC
    return Family.OPENAI


def error_body(
    family: Family, status: int, message: str, *, code: str | None, request_id: str | None = None
) -> dict[str, Any]:
    """Return the JSON object by which the API `family` tells of an error."""
    if family is Family.OLLAMA:
        return {"error": message}
    if family is Family.ANTHROPIC:
        kind = _ANTHROPIC_TYPES.get(
            status, "invalid_request_error" if status < 500 else "api_error"
        )
        body = {"type": "error", "error": {"type": kind, "message": message}}
        return body | {"request_id": request_id} if request_id else body
    kind = _OPENAI_TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {"error": {"message": message, "type": kind, "param": None, "code": code}}


def error_response(
    family: Family,
    status: int,
    message: str,
    *,
    code: str | None = None,
    retry_after: float | None = None,
    headers: Mapping[str, str] | None = None,
    request_id: str | None = None,
) -> Response:
    """Return an error; `retry_after` is in seconds. Anthropic's word for 503 is 529."""
    if family is Family.ANTHROPIC and status == 503:
        status = 529
    told = dict(headers or {})
    if retry_after is not None:
        told["Retry-After"] = str(max(1, math.ceil(retry_after)))
        told["retry-after-ms"] = str(max(1, math.ceil(retry_after * 1000)))
    if status == 401:
        told["WWW-Authenticate"] = "Bearer"
    body = error_body(family, status, message, code=code, request_id=request_id)
    return Response(json.dumps(body), status, told, media_type="application/json")


def stream_error(family: Family, media_type: str, message: str) -> bytes | None:
    """Return what ends a stream that broke; None where `media_type` is no stream of events."""
    body = json.dumps(error_body(family, 500, message, code="upstream_error"))
    if media_type == "text/event-stream":
        event = "event: error\n" if family is Family.ANTHROPIC else ""
        return f"\n\n{event}data: {body}\n\n".encode()  # what was cut off becomes an event
    if media_type == "application/x-ndjson":
        return f"\n{body}\n".encode()
    return None
