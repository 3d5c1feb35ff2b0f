"""Error responses of distribution-spec 1.1 ("Error Codes")."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from modelpack.errors import (
    DigestMismatchError,
    FormatError,
    InvalidDigestError,
    InvalidReferenceError,
    LockedError,
    ModelpackError,
    NotFoundError,
    StorageFullError,
)


class Code(StrEnum):
    """The codes of an error body."""

    BLOB_UNKNOWN = "BLOB_UNKNOWN"
    BLOB_UPLOAD_INVALID = "BLOB_UPLOAD_INVALID"
    BLOB_UPLOAD_UNKNOWN = "BLOB_UPLOAD_UNKNOWN"
    DIGEST_INVALID = "DIGEST_INVALID"
    MANIFEST_BLOB_UNKNOWN = "MANIFEST_BLOB_UNKNOWN"
    MANIFEST_INVALID = "MANIFEST_INVALID"
    MANIFEST_UNKNOWN = "MANIFEST_UNKNOWN"
    NAME_INVALID = "NAME_INVALID"
    NAME_UNKNOWN = "NAME_UNKNOWN"
    SIZE_INVALID = "SIZE_INVALID"
    UNAUTHORIZED = "UNAUTHORIZED"
    DENIED = "DENIED"
    UNSUPPORTED = "UNSUPPORTED"
    TOOMANYREQUESTS = "TOOMANYREQUESTS"
    UNKNOWN = "UNKNOWN"  # not in the specification's table: errors without a code there


@dataclass(frozen=True, slots=True)
class Problem:
    """One entry of an error body."""

    code: Code
    message: str
    detail: Any = None

    def to_json(self) -> dict[str, Any]:
        """Return the JSON object."""
        detail = {} if self.detail is None else {"detail": self.detail}
        return {"code": self.code.value, "message": self.message, **detail}


class ApiError(Exception):
    """A request that is answered with an error; raised by the endpoints."""

    def __init__(
        self,
        status: int,
        code: Code,
        message: str,
        *,
        detail: Any = None,
        more: Sequence[Problem] = (),
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.problems = (Problem(code, message, detail), *more)
        self.headers = headers

    def response(self) -> Response:
        """Return the response."""
        body = {"errors": [problem.to_json() for problem in self.problems]}
        return JSONResponse(body, self.status, self.headers)


def _translated(error: Exception) -> ApiError:
    """Return the response to an error of the store, by the first class that matches."""
    table: tuple[tuple[type[ModelpackError], int, Code], ...] = (
        (InvalidReferenceError, 400, Code.NAME_INVALID),
        (InvalidDigestError, 400, Code.DIGEST_INVALID),
        (DigestMismatchError, 400, Code.DIGEST_INVALID),
        (FormatError, 400, Code.MANIFEST_INVALID),
        (NotFoundError, 404, Code.BLOB_UNKNOWN),
        (StorageFullError, 507, Code.UNKNOWN),
        (LockedError, 503, Code.UNKNOWN),
        (ModelpackError, 500, Code.UNKNOWN),
    )
    status, code = next((s, c) for kind, s, c in table if isinstance(error, kind))
    return ApiError(status, code, str(error))


async def on_error(_: Request, error: Exception) -> Response:
    """Answer an `ApiError`, or an error of the store."""
    return (error if isinstance(error, ApiError) else _translated(error)).response()


async def on_http_error(request: Request, error: Exception) -> Response:
    """Answer requests for unknown paths and methods, which the router refuses."""
    assert isinstance(error, HTTPException)
    message = f"no such endpoint: {request.url.path}"
    if error.status_code == 405:
        message = f"{request.method} is not allowed here"
    status, headers = error.status_code, error.headers
    return ApiError(status, Code.UNSUPPORTED, message, headers=headers).response()


async def on_disconnect(_: Request, error: Exception) -> Response:
    """Answer a client that disconnected, for the log only."""
    return Response(status_code=400)


async def on_defect(_: Request, error: Exception) -> Response:
    """Answer an unexpected exception, which the server logs."""
    return ApiError(500, Code.UNKNOWN, f"internal error: {type(error).__name__}").response()
