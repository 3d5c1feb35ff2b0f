"""Translation of failed responses and of network exceptions to the errors of Modelpack.

It covers every exception of requests, urllib3, ssl and sockets. Text of a server is shown shortened
and without control characters.
"""

from __future__ import annotations

import json
import re
import socket
import ssl
from collections.abc import Iterator
from typing import Any, Final, NamedTuple

import requests
from urllib3.exceptions import (
    ConnectTimeoutError,
    HTTPError,
    NewConnectionError,
    ProxyError,
    ReadTimeoutError,
)

from modelpack.errors import (
    AuthError,
    DeniedError,
    NotFoundError,
    RegistryError,
    RemoteTimeoutError,
    RemoteUnavailableError,
)
from modelpack.http.hosts import is_loopback
from modelpack.registry.limits import RETRYABLE_STATUSES, FailedTry, parse_retry_after
from modelpack.registry.sockets import TooMuchError

#: Exceptions of a failed request, for the `except` clauses of this package.
NETWORK_ERRORS: Final = (requests.RequestException, HTTPError, OSError)

MAX_ERROR_BODY = 64 * 1024
# Alerts of a server to a client without a certificate (TLS 1.3), or with one that it rejects.
_CLIENT_ALERT = re.compile(r"ALERT_(CERTIFICATE|BAD_CERTIFICATE|UNSUPPORTED_CERT|UNKNOWN_CA)")
_NO_TLS = ("WRONG_VERSION_NUMBER", "HTTP_REQUEST", "UNKNOWN_PROTOCOL", "RECORD_LAYER_FAILURE")
_UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]+")


class ErrorBody(NamedTuple):
    """The first error of a distribution-spec error body."""

    code: str | None = None
    message: str = ""

    @classmethod
    def parse(cls, body: bytes) -> ErrorBody:
        """Return the first error in `body`, an empty one if there is none."""
        try:
            first = json.loads(body)["errors"][0]
            code, message = first.get("code"), first.get("message")
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            return cls()
        return cls(
            shown(code, 60) if isinstance(code, str) else None,
            shown(message, 300) if isinstance(message, str) else "",
        )


def response_error(
    what: str, host: str, status: int, body: bytes, *, from_registry: bool = True
) -> RegistryError:
    """Return the error for the response `status` with `body` of `host` to a request for `what`.

    `from_registry` is false for storage that the registry redirected to.
    """
    code, message = ErrorBody.parse(body)
    said = " ".join(filter(None, (str(status), f"{code}:" if code and message else code, message)))
    kind, hint = _kind_of(status, code, from_registry)
    return kind(
        f"{what}: {host} answered {said}", host=host, status_code=status, code=code, hint=hint
    )


def _kind_of(
    status: int, code: str | None, from_registry: bool
) -> tuple[type[RegistryError], str | None]:
    if status in (401, 403) and not from_registry:
        return RemoteUnavailableError, None
    if status == 401:
        return AuthError, "log in with `modelpack login`; a missing repository may look the same"
    if status == 403:
        return DeniedError, "ask the operator of the registry for this permission"
    if status == 404:
        return NotFoundError, None
    if code == "MANIFEST_BLOB_UNKNOWN":  # with 400, in docker-registry 2.8.2
        return NotFoundError, "push all blobs of a manifest before it"
    if status == 429:
        return RemoteUnavailableError, "log in or wait: the registry limits requests"
    if status in RETRYABLE_STATUSES:
        return RemoteUnavailableError, None
    if status == 405 or code == "UNSUPPORTED":
        return RegistryError, "check whether the registry supports this and has it enabled"
    return RegistryError, None


def failed_response(
    what: str, response: requests.Response, host: str, body: bytes, now: float, *, own: bool
) -> RegistryError | FailedTry:
    """Return the error for a failed response: a `FailedTry` if another try may succeed.

    `own` is false for storage behind a redirect, which may refuse an expired signature, also with
    400 or 410; another request to the registry gets a new signature.
    """
    status = response.status_code
    error = response_error(what, host, status, body, from_registry=own)
    expired = (400, 401, 403, 410) if response.request.method == "GET" else (401, 403)
    if status in RETRYABLE_STATUSES or (status in expired and not own):
        return FailedTry(error, parse_retry_after(response.headers, now))
    return error


def network_error(what: str, host: str, error: Exception) -> RegistryError | FailedTry:
    """Return the error for an exception of the network, in most cases a `FailedTry`."""
    causes = list(_causes(error))
    for cause in causes:
        if explained := _explained(cause, host):
            problem, hint = explained
            return RemoteUnavailableError(f"{what}: {problem}", host=host, hint=hint)
    if any(isinstance(cause, TooMuchError) for cause in causes):
        return RegistryError(
            f"{what}: {host} sends too many headers, interim responses or trailers", host=host
        )
    if any(_is_timeout(cause) for cause in causes):
        return FailedTry(RemoteTimeoutError(f"{what}: {host} did not answer in time", host=host))
    proxy = "the proxy before " if any(isinstance(c, ProxyError) for c in causes) else ""
    reason = next((c.strerror for c in causes if isinstance(c, OSError) and c.strerror), None)
    advice = None
    if not proxy and any(isinstance(cause, ConnectionRefusedError) for cause in causes):
        advice = f"check that a server runs at {host}"
        if is_loopback(host.rpartition(":")[0] or host):
            advice += "; `modelpack registry serve` starts a registry"
    return FailedTry(
        RemoteUnavailableError(
            f"{what}: the connection to {proxy}{host} failed: "
            + shown(reason or "it was closed too early", 200),
            host=host,
            hint=advice,
        )
    )


def _explained(cause: BaseException, host: str) -> tuple[str, str] | None:
    """Return the problem and a hint if another try would fail in the same way."""
    if isinstance(cause, ssl.SSLCertVerificationError):
        problem = f"the certificate of {host} is not trusted: {cause.verify_message}"
        return problem, "name the file of its authority with --ca-file or in SSL_CERT_FILE"
    if isinstance(cause, ssl.SSLError) and _CLIENT_ALERT.search(cause.reason or ""):
        problem = f"{host} requires a client certificate that it trusts"
        return problem, f"use --client-cert, or store it as certs.d/{host}/client.cert"
    if isinstance(cause, ssl.SSLError) and cause.reason in _NO_TLS:
        return f"{host} does not speak TLS", "if it is meant to speak plain http, use --plain-http"
    if isinstance(cause, socket.gaierror) and cause.errno == socket.EAI_NONAME:
        return (
            f"no such host: {host}",
            "check the name and the network; a bare host name may need its domain",
        )
    return None


def _is_timeout(cause: BaseException) -> bool:
    if isinstance(cause, NewConnectionError):  # urllib3 derives it from a timeout
        return False
    return isinstance(
        cause, TimeoutError | requests.Timeout | ReadTimeoutError | ConnectTimeoutError
    )


def _causes(error: BaseException) -> Iterator[BaseException]:
    """Yield `error` and all exceptions that it wraps as argument, reason, cause or context."""
    todo: list[Any] = [error]
    seen: set[int] = set()
    while todo:
        cause = todo.pop(0)
        if isinstance(cause, BaseException) and id(cause) not in seen:
            seen.add(id(cause))
            yield cause
            todo += [*cause.args, getattr(cause, "reason", None)]
            todo += [cause.__cause__, cause.__context__]


def shown(text: str, length: int) -> str:
    """Return text of a server, shortened and without control characters."""
    clean = _UNPRINTABLE.sub(" ", text).strip()
    return clean if len(clean) <= length else clean[:length] + "…"
