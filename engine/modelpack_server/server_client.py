"""Call a running model server: JSON requests and texts, errors translated by status."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from modelpack.deploy.local_server import PORT
from modelpack.errors import (
    AuthError,
    ConflictError,
    ModelpackError,
    NotFoundError,
    RemoteUnavailableError,
    UsageError,
)

if TYPE_CHECKING:
    import requests

DEFAULT_HOST = f"http://127.0.0.1:{PORT}"
_TIMEOUT = (5, 600)  # connecting; unloading waits for requests


def call_server(
    host: str, method: str, path: str, body: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Ask the server; raise what its answer means."""
    with _response(host, method, path, json=body, timeout=_TIMEOUT) as response:
        answer = _json_of(response)
    if response.ok and isinstance(answer, dict):
        return answer
    raise problem_of(response.status_code, answer)


def call_for_text(host: str, method: str, path: str, body: dict[str, Any]) -> str:
    """Return the text that the server answers; raise what an error means."""
    with _response(host, method, path, json=body, timeout=_TIMEOUT) as response:
        if response.ok:
            return response.text
        raise problem_of(response.status_code, _json_of(response))


def read_lines(host: str, path: str) -> Iterator[str]:
    """Yield the lines of a text as the server sends them; raise what its answer means."""
    import requests

    timeout = (_TIMEOUT[0], None)  # a log that is followed has no end
    with _response(host, "GET", path, stream=True, timeout=timeout) as response:
        if not response.ok:
            raise problem_of(response.status_code, _json_of(response))
        try:
            for line in response.iter_lines(chunk_size=None):
                yield line.decode(errors="replace")
        except requests.RequestException as error:
            raise RemoteUnavailableError(f"the server at {host} stopped") from error


def _response(
    host: str, method: str, path: str, *, timeout: tuple[float, float | None], **options: Any
) -> requests.Response:
    import requests

    url = host if "://" in host else f"http://{host}"
    key = os.environ.get("MODELPACK_API_KEY")
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    try:
        return requests.request(
            method, url.rstrip("/") + path, headers=headers, timeout=timeout, **options
        )
    except requests.RequestException as error:
        raise RemoteUnavailableError(
            f"no server answers at {url}",
            hint="start one with `modelpack serve`, or say where it is: --url URL",
        ) from error


def _json_of(response: requests.Response) -> Any:
    import requests

    try:
        return response.json()
    except requests.JSONDecodeError:
        where = urlsplit(response.url)
        said = f"{where.scheme}://{where.netloc} answered {response.status_code}, and no JSON"
        raise ModelpackError(said) from None


def problem_of(status: int, answer: Any) -> ModelpackError:
    """Return the error that a server's answer means."""
    detail = answer.get("error") if isinstance(answer, dict) else None
    text = detail.get("message") if isinstance(detail, dict) else f"HTTP {status}"
    kinds: dict[int, type[ModelpackError]] = {
        400: UsageError, 401: AuthError, 403: AuthError, 404: NotFoundError, 409: ConflictError,
    }  # fmt: skip
    return kinds.get(status, ModelpackError)(str(text))
