"""Errors of the HTTP APIs: from an exception to a status, a message and a code.

`gateway.families` has the shapes in which each API reports them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from modelpack.errors import (
    AuthError,
    ConflictError,
    DeniedError,
    ModelpackError,
    NotFoundError,
    UntrustedError,
    UsageError,
)
from modelpack_engine.errors import (
    RETRY_AFTER,
    BusyError,
    ContextLengthError,
    LoadingError,
    ModelLoadError,
    OutOfMemoryError,
    QueueFullError,
    RequestError,
    as_error,
)
from modelpack_server.gateway.families import Family, error_body, error_response, retry_headers
from modelpack_server.gateway.traces import CLIENT_LEFT, trace_of

_log = logging.getLogger(__name__)

# Parts of the location of a validation error that name types, not fields.
_TYPE_NAMES = {"body", "str", "int", "float", "bool", "list", "dict", "constrained-str",
               "constrained-int", "function-after"}  # fmt: skip
# Limits of a message and of a field's name, in characters: errors must not echo large requests.
_MAX_MESSAGE = 1000
_MAX_PARAM = 200
# The pool has logged why a model cannot be loaded.
_LOGGED = (ModelLoadError, OutOfMemoryError)
# What Python's `threading` says if the system has no memory for a thread's stack.
_NO_THREAD = "can't start new thread"
# OpenAI's and Anthropic's clients do not retry a response with this header.
_NO_RETRY = {"x-should-retry": "false"}


class ClientGoneError(ModelpackError):
    """The client closed its connection, so it cannot receive a response."""


# The status, the code and the headers of each kind of error; the first match counts.
_PROBLEMS: tuple[tuple[type[ModelpackError], int, str | None, Mapping[str, str]], ...] = (
    (QueueFullError, 429, "queue_full", {}),
    (LoadingError, 503, "model_loading", {}),
    (BusyError, 409, "busy", {}),
    (ContextLengthError, 400, "context_length_exceeded", {}),
    (RequestError, 400, None, {}),
    (OutOfMemoryError, 503, "out_of_memory", _NO_RETRY),
    (ModelLoadError, 500, "model_load_failed", _NO_RETRY),  # a retry would fail too
    (NotFoundError, 404, "model_not_found", {}),
    (DeniedError, 403, None, {}),
    (AuthError, 401, None, {}),  # a registry refused the credentials
    (UntrustedError, 403, "model_not_trusted", _NO_RETRY),
    (ConflictError, 409, "conflict", {}),
    (UsageError, 400, None, {}),
    (ClientGoneError, CLIENT_LEFT, None, {}),
    (ModelpackError, 500, None, {}),
)


@dataclass(frozen=True, slots=True)
class Problem:
    """An error as clients see it; `request_id` is the id of the request in the logs."""

    status: int
    message: str
    param: str | None = None
    code: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    request_id: str | None = None

    def __post_init__(self) -> None:
        """Truncate long messages and names."""
        object.__setattr__(self, "message", _cut(self.message, _MAX_MESSAGE))
        if self.param is not None:
            object.__setattr__(self, "param", _cut(self.param, _MAX_PARAM))

    def body(self, family: Family = Family.OPENAI) -> dict[str, Any]:
        """Return the JSON object of the error in the shape of `family`."""
        return error_body(
            family, self.status, self.message,
            code=self.code, param=self.param, request_id=self.request_id,
        )  # fmt: skip

    def response(self, family: Family = Family.OPENAI) -> Response:
        """Return the HTTP response in the shape of `family`."""
        return error_response(
            family, self.status, self.message, code=self.code, param=self.param,
            headers=self.headers, request_id=self.request_id,
        )  # fmt: skip


#: Returns the response to a failed request.
Shape = Callable[[Request, Problem], Response]


def _cut(text: str, limit: int) -> str:
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


def problem_of(error: Exception) -> Problem:
    """Return an error as clients see it."""
    if isinstance(error, RequestValidationError):
        return _of_validation(error)
    if isinstance(error, HTTPException):
        return Problem(error.status_code, str(error.detail), headers=dict(error.headers or {}))
    if isinstance(error, RuntimeError) and str(error) == _NO_THREAD:
        error = QueueFullError("the server has no memory for a thread", retry_after=RETRY_AFTER)
    if not isinstance(error, ModelpackError):
        return Problem(500, f"unexpected {type(error).__name__}")
    text = f"{error}. {error.hint}" if error.hint else str(error)
    _, status, code, headers = next(row for row in _PROBLEMS if isinstance(error, row[0]))
    if isinstance(error, QueueFullError | LoadingError):
        headers = retry_headers(error.retry_after)
    param = error.param if isinstance(error, RequestError) else None
    return Problem(status, text, param, code, headers)


def install(app: FastAPI, shape: Shape) -> None:
    """Make `app` respond to every error with the result of `shape`."""

    async def handle(request: Request, error: Exception) -> Response:
        return respond(request, error, shape)

    for kind in (ModelpackError, RequestValidationError, HTTPException):
        app.add_exception_handler(kind, handle)


def respond(request: Request, error: Exception, shape: Shape) -> Response:
    """Return the response to a failed request, and log it if it is a server error."""
    problem = problem_of(error)
    if isinstance(error, HTTPException) and error.detail == HTTPStatus(error.status_code).phrase:
        problem = _of_routing(request, problem)
    if (trace := trace_of(request.scope)) is not None:
        problem = replace(problem, request_id=trace.id)
    if problem.status >= 500 and not isinstance(error, _LOGGED):
        cause = None if isinstance(error, ModelpackError) else error
        _log.error("%s %s: %s", request.method, request.url.path, problem.message,
                   exc_info=cause)  # fmt: skip
    return shape(request, problem)


def _of_routing(request: Request, problem: Problem) -> Problem:
    """Return the error of the router, which says only "Not Found", with the method and the path."""
    called = f"{request.method} {request.url.path}"
    if problem.status == HTTPStatus.METHOD_NOT_ALLOWED:
        allowed = problem.headers.get("Allow", "another method")
        return replace(problem, message=f"method not allowed: {called}. use {allowed}")
    return replace(problem, message=f"no such route: {called}", code="unknown_url")


def _of_validation(error: RequestValidationError) -> Problem:
    first = error.errors()[0]
    if first["type"] == "json_invalid":
        return Problem(
            400, f"the request body is not valid JSON: {first.get('ctx', {}).get('error', '')}"
        )
    if first["loc"] in ((), ("body",)):
        text = "expected a JSON object, sent with Content-Type: application/json"
        return Problem(400, text)
    place = [str(part) for part in first["loc"] if not _names_type(str(part))]
    param = ".".join(place) or None
    message = f"{param}: {first['msg']}" if param else str(first["msg"])
    return Problem(400, message, param=param)


def _names_type(part: str) -> bool:
    return part in _TYPE_NAMES or "[" in part or (part[:1].isupper() and part.isidentifier())


class Failures:
    """ASGI middleware that turns unexpected exceptions into responses made by `respond`.

    Starlette would raise the exception again after its response: uvicorn then closes the
    connection, and the client's next request on it fails. An exception in the middle of a response
    is raised, because only a broken connection shows the client that the rest is missing.
    """

    def __init__(self, app: ASGIApp, *, respond: Callable[[Request, Exception], Response]) -> None:
        self._app = app
        self._respond = respond

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = False

        async def watched(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            await self._app(scope, receive, watched)
        except BaseException as error:
            failure = as_error(error, "the request")
            if started:
                raise
            await self._respond(Request(scope), failure)(scope, receive, send)
