"""Call a running model server: one JSON request, errors translated by status."""

from __future__ import annotations

import os
from typing import Any

from modelpack.deploy.local_server import PORT
from modelpack.errors import (
    AuthError,
    ConflictError,
    ModelpackError,
    NotFoundError,
    RemoteUnavailableError,
    UsageError,
)

DEFAULT_HOST = f"http://127.0.0.1:{PORT}"
_TIMEOUT = (5, 600)  # connecting; unloading waits for requests


def call_server(
    host: str, method: str, path: str, body: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Ask the server; raise what its answer means."""
    import requests

    url = host if "://" in host else f"http://{host}"
    key = os.environ.get("MODELPACK_API_KEY")
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    try:
        response = requests.request(
            method, url.rstrip("/") + path, json=body, headers=headers, timeout=_TIMEOUT
        )
        answer = response.json()
    except requests.JSONDecodeError:
        raise ModelpackError(f"{url} answered {response.status_code}, and no JSON") from None
    except requests.RequestException as error:
        raise RemoteUnavailableError(
            f"no server answers at {url}",
            hint="start one with `modelpack serve`, or say where it is: --host URL",
        ) from error
    if response.ok and isinstance(answer, dict):
        return answer
    raise problem_of(response.status_code, answer)


def problem_of(status: int, answer: Any) -> ModelpackError:
    """Return the error that a server's answer means."""
    detail = answer.get("error") if isinstance(answer, dict) else None
    text = detail.get("message") if isinstance(detail, dict) else f"HTTP {status}"
    kinds: dict[int, type[ModelpackError]] = {
        400: UsageError, 401: AuthError, 403: AuthError, 404: NotFoundError, 409: ConflictError,
    }  # fmt: skip
    return kinds.get(status, ModelpackError)(str(text))
