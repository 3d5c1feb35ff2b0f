"""RunnerClient: what Compose needs of a running model server, over its HTTP API.

The routes are those of Docker Model Runner (cmd/cli/desktop/desktop.go there) and our own /pool.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

from modelpack.errors import (
    AuthError,
    ConflictError,
    ModelpackError,
    NotFoundError,
    RemoteUnavailableError,
    UsageError,
)
from modelpack.reference import Reference

_TIMEOUT = (5, 600)  # seconds: to connect; between two pieces of an answer
_PROBE = (1, 5)
_KINDS: dict[int, type[ModelpackError]] = {
    400: UsageError, 401: AuthError, 403: AuthError, 404: NotFoundError, 409: ConflictError,
}  # fmt: skip


class RunnerClient:
    """A model server at `url`; `key` is sent where it asks for API keys."""

    def __init__(self, url: str, key: str | None = None) -> None:
        self.url = (url if "://" in url else f"http://{url}").rstrip("/")
        self._headers = {"Accept": "application/json"}
        if key:
            self._headers["Authorization"] = f"Bearer {key}"

    def answers(self) -> bool:
        """Return whether a model server is there, whether or not it has loaded its models."""
        import requests

        try:
            answer = requests.get(
                f"{self.url}/engines/status", headers=self._headers, timeout=_PROBE
            )
        except requests.RequestException:
            return False
        # One that wants another key is there too, and says so when it is asked for more.
        return answer.status_code in (401, 403) or "Running" in answer.text

    def backends(self) -> dict[str, str]:
        """Return what the server says of each of its backends."""
        found: dict[str, str] = self._json("GET", "/engines/status")
        return found

    def models(self) -> list[dict[str, Any]]:
        """Return the models of the server's store, with every spelling of their names as tags.

        Compose looks for a name exactly as the file has it, and pulls what it does not find.
        """
        models: list[dict[str, Any]] = self._json("GET", "/models")
        for model in models:
            model["tags"] = list(
                dict.fromkeys(text for tag in model.get("tags") or () for text in _spellings(tag))
            )
        return models

    def pull(self, name: str, tell: Callable[[str], None]) -> None:
        """Have the server pull a model; `tell` is called with each piece of progress."""
        body = {"from": name}
        with self._request("POST", "/models/create", json=body, stream=True) as response:
            for line in response.iter_lines():
                if not line:
                    continue
                message = json.loads(line)
                if message.get("type") == "error":
                    raise ModelpackError(f"pulling {name}: {message.get('message')}")
                tell(str(message.get("message", "")))

    def configure(
        self, name: str, *, context_size: int | None = None, runtime_flags: Sequence[str] = ()
    ) -> None:
        """Say how the server runs a model from its next use on; `context_size` in tokens."""
        body: dict[str, Any] = {"model": name, "runtime_flags": list(runtime_flags)}
        if context_size is not None:
            body["context_size"] = context_size
        self._json("POST", "/pool/configure", json=body)

    def _json(self, method: str, path: str, **arguments: Any) -> Any:
        with self._request(method, path, **arguments) as response:
            return response.json()

    def _request(self, method: str, path: str, **arguments: Any) -> Any:
        import requests

        try:
            response = requests.request(
                method, self.url + path, headers=self._headers, timeout=_TIMEOUT, **arguments
            )
        except requests.RequestException as error:
            raise RemoteUnavailableError(
                f"no model server answers at {self.url}",
                hint="start one with `modelpack serve`, or say where it is: MODELPACK_HOST",
            ) from error
        if response.ok:
            return response
        raise _KINDS.get(response.status_code, ModelpackError)(
            f"{self.url}{path}: {_message(response.text) or response.status_code}"
        )


def _message(text: str) -> str:
    """Return what an error says, be it JSON of the OpenAI API or Docker's plain text."""
    try:
        return str(json.loads(text)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return text.strip()


def _spellings(tag: str) -> tuple[str, ...]:
    try:
        reference = Reference.parse(tag)
    except ModelpackError:
        return (tag,)
    short = reference.familiar
    full = f"{short}:{reference.tag}" if reference.tag and ":" not in short else short
    return tag, str(reference), short, full
