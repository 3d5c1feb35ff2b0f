"""Problems: what clients are told when something goes wrong, in the words of the API they speak.

A family of routes that has error bodies of its own gives `install` a Shape; all others get
OpenAI's: `{"error": {"message", "type", "param", "code"}}`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
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
    BusyError,
    ContextLengthError,
    EngineError,
    LoadingError,
    ModelLoadError,
    OutOfMemoryError,
    QueueFullError,
    RequestError,
    as_error,
)
from modelpack_server.gateway.traces import CLIENT_LEFT, trace_of

_log = logging.getLogger(__name__)

_TYPES = {404: "invalid_request_error", 503: "service_unavailable", 429: "rate_limit_error",
          401: "authentication_error", 507: "server_error"}  # fmt: skip
# Parts of the places of validation errors that name types, not fields.
_TYPE_NAMES = {"body", "str", "int", "float", "bool", "list", "dict", "constrained-str",
               "constrained-int", "function-after"}  # fmt: skip
# Characters of a message, and of a field's name, in an error: what was sent is not sent back.
_MESSAGE = 1000
_PARAM = 200
# What has OpenAI's and Anthropic's clients not ask again.
_IN_VAIN = {"x-should-retry": "false"}


class ClientGoneError(ModelpackError):
    """The client has left; nobody reads the answer."""


@dataclass(frozen=True, slots=True)
class Problem:
    """What went wrong: an HTTP status, and words for it; `request_id` is the one in the logs."""

    status: int
    message: str
    kind: str = ""
    param: str | None = None
    code: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    request_id: str | None = None

    def __post_init__(self) -> None:
        """Cut what echoes a large request."""
        object.__setattr__(self, "message", _cut(self.message, _MESSAGE))
        if self.param is not None:
            object.__setattr__(self, "param", _cut(self.param, _PARAM))

    @property
    def type(self) -> str:
        """OpenAI's type of error."""
        if self.kind:
            return self.kind
        return _TYPES.get(
            self.status, "invalid_request_error" if self.status < 500 else "server_error"
        )


def _cut(text: str, limit: int) -> str:
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


#: Makes the response for a problem.
Shape = Callable[[Problem], Response]


def error_body(
    message: str, kind: str = "server_error", param: str | None = None, code: str | None = None
) -> dict[str, Any]:
    """Return the JSON object of an error, as OpenAI has it."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def openai_shape(problem: Problem) -> Response:
    """Return the response for a problem, as OpenAI has it."""
    body = error_body(problem.message, problem.type, problem.param, problem.code)
    return JSONResponse(body, problem.status, dict(problem.headers))


def problem_of(error: Exception) -> Problem:
    """Return what a client is told about an error."""
    if isinstance(error, RequestValidationError):
        return _of_validation(error)
    if isinstance(error, HTTPException):
        code = "request_too_large" if error.status_code == 413 else None
        headers = dict(error.headers or {})
        return Problem(error.status_code, str(error.detail), code=code, headers=headers)
    if not isinstance(error, ModelpackError):
        return Problem(500, f"unexpected {type(error).__name__}")
    text = f"{error}. {error.hint}" if error.hint else str(error)
    match error:
        case QueueFullError():
            return Problem(429, text, code="queue_full", headers=_retry(error.retry_after))
        case LoadingError():
            return Problem(503, text, code="model_loading", headers=_retry(error.retry_after))
        case BusyError():
            return Problem(409, text, code="busy")
        case ContextLengthError():
            return Problem(400, text, param=error.param, code="context_length_exceeded")
        case RequestError():
            return Problem(400, text, param=error.param)
        case OutOfMemoryError():
            return Problem(503, text, code="out_of_memory", headers=_IN_VAIN)
        case ModelLoadError():  # and will not load the next time
            return Problem(500, text, code="model_load_failed", headers=_IN_VAIN)
        case NotFoundError():
            return Problem(404, text, code="model_not_found")
        case AuthError():  # a registry's
            return Problem(403 if isinstance(error, DeniedError) else 401, text)
        case UntrustedError():
            return Problem(403, text, code="model_not_trusted", headers=_IN_VAIN)
        case ConflictError():
            return Problem(409, text, code="conflict")
        case UsageError():
            return Problem(400, text)
        case ClientGoneError():
            return Problem(CLIENT_LEFT, text)
        case EngineError():
            return Problem(500, text)
    return Problem(500, text)


def install(app: FastAPI, shapes: Sequence[tuple[Callable[[str], bool], Shape]] = ()) -> None:
    """Make `app` answer every failure in the words of the API that was called.

    `shapes` are (whether a path is that family's, its shape); the first that fits counts.
    """

    async def handle(request: Request, error: Exception) -> Response:
        return respond(request, error, shapes)

    for kind in (ModelpackError, RequestValidationError, HTTPException):
        app.add_exception_handler(kind, handle)


def respond(
    request: Request,
    error: Exception,
    shapes: Sequence[tuple[Callable[[str], bool], Shape]] = (),
) -> Response:
    """Return the response to a request that failed, and log what is our own fault."""
    problem = problem_of(error)
    if (trace := trace_of(request.scope)) is not None:
        problem = replace(problem, request_id=trace.id)
    if problem.status >= 500:
        cause = None if isinstance(error, ModelpackError) else error
        _log.error("%s %s: %s", request.method, request.url.path, problem.message,
                   exc_info=cause)  # fmt: skip
    return shape_of(request.url.path, shapes)(problem)


def shape_of(path: str, shapes: Sequence[tuple[Callable[[str], bool], Shape]]) -> Shape:
    """Return the shape of errors of a path."""
    return next((shape for fits, shape in shapes if fits(path)), openai_shape)


def _retry(seconds: float) -> dict[str, str]:
    return {
        "Retry-After": str(max(1, round(seconds))),
        "retry-after-ms": str(max(1, round(seconds * 1000))),
    }


def _of_validation(error: RequestValidationError) -> Problem:
    first = error.errors()[0]
    if first["type"] == "json_invalid":
        return Problem(400, f"the body is no JSON: {first.get('ctx', {}).get('error', '')}")
    if first["loc"] in ((), ("body",)):
        text = "the body has to be a JSON object, sent with Content-Type: application/json"
        return Problem(400, text)
    place = [str(part) for part in first["loc"] if not _names_type(str(part))]
    param = ".".join(place) or None
    message = f"{param}: {first['msg']}" if param else str(first["msg"])
    return Problem(400, message, param=param)


def _names_type(part: str) -> bool:
    return part in _TYPE_NAMES or "[" in part or (part[:1].isupper() and part.isidentifier())


class Failures:
    """ASGI middleware: an exception that nobody expected is an answer, and the connection lives on.

    Starlette raises it again once it is answered, whereupon uvicorn closes the connection, and the
    client's next request on it fails. One in the middle of a reply is raised: nothing else would
    tell the client that the rest is missing. `respond` makes the answer.
    """

    def __init__(self, app: ASGIApp, *, respond: Callable[[Request, Exception], Response]) -> None:
        self._app = app
        self._respond = respond

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = False

        async def noticing(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            await self._app(scope, receive, noticing)
        except BaseException as error:
            failure = as_error(error, "the request")
            if started:
                raise
            await self._respond(Request(scope), failure)(scope, receive, send)
