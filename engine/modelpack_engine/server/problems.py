"""Errors as the OpenAI API shows them: `{"error": {"message", "type", "param", "code"}}`."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from modelpack.errors import ModelpackError, NotFoundError
from modelpack_engine.errors import ContextLengthError, QueueFullError, RequestError

_TYPES = {404: "invalid_request_error", 503: "service_unavailable", 429: "rate_limit_error"}


def problem(
    status: int,
    message: str,
    *,
    kind: str | None = None,
    param: str | None = None,
    code: str | None = None,
    headers: dict[str, str] | None = None,
) -> JSONResponse:
    """Return an error response."""
    kind = kind or _TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    return JSONResponse(error_body(message, kind, param, code), status, headers)


def error_body(
    message: str, kind: str = "server_error", param: str | None = None, code: str | None = None
) -> dict[str, Any]:
    """Return the JSON object of an error."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def as_response(error: ModelpackError) -> JSONResponse:
    """Return what a client is told about one of our errors."""
    text = f"{error}. {error.hint}" if error.hint else str(error)
    if isinstance(error, QueueFullError):
        retry = {"Retry-After": str(max(1, round(error.retry_after)))}
        return problem(429, text, code="queue_full", headers=retry)
    if isinstance(error, ContextLengthError):
        return problem(400, text, param=error.param, code="context_length_exceeded")
    if isinstance(error, RequestError):
        return problem(400, text, param=error.param)
    if isinstance(error, NotFoundError):
        return problem(404, text, code="model_not_found")
    return problem(500, text)


def install(app: FastAPI) -> None:
    """Make `app` answer every failure with an error object."""

    @app.exception_handler(ModelpackError)
    async def ours(_: Request, error: ModelpackError) -> JSONResponse:
        return as_response(error)

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        place = [str(part) for part in first["loc"] if part != "body"]
        param = ".".join(place) or None
        message = f"{param}: {first['msg']}" if param else str(first["msg"])
        return problem(400, message, param=param)

    @app.exception_handler(HTTPException)
    async def plain(_: Request, error: HTTPException) -> JSONResponse:
        return problem(error.status_code, str(error.detail))

    @app.exception_handler(Exception)
    async def unexpected(_: Request, error: Exception) -> JSONResponse:
        return problem(500, f"unexpected {type(error).__name__}")
