"""The input file of a batch: its lines, their validation, and the errors that clients see.

The codes of errors are those of OpenAI's API, as Azure documents them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modelpack_server.gateway.json_bodies import BodyError, parse

#: The routes whose requests a batch may have.
ENDPOINTS = ("/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses")
#: The limits of lines in a file, of bytes in a line, and of characters in a custom_id.
MAX_LINES = 50_000
MAX_LINE_BYTES = 4 * 1024 * 1024
MAX_CUSTOM_ID = 512
#: Validation ends after this many errors.
MAX_ERRORS = 100


@dataclass(frozen=True, slots=True)
class Line:
    """A valid line: its number, counted from 1, its id and the JSON body of its request."""

    number: int
    custom_id: str
    model: str
    body: bytes

    @property
    def key(self) -> bytes:
        """A short hash of the id, for sets of ids."""
        return key_of(self.custom_id)


@dataclass(frozen=True, slots=True)
class LineError:
    """An error in a line, or in the whole file if `line` is None."""

    code: str
    message: str
    line: int | None = None
    param: str | None = None


@dataclass(frozen=True, slots=True)
class Validated:
    """The number of lines, the model if all lines name the same, and the errors found."""

    total: int
    model: str | None
    errors: tuple[LineError, ...]


def key_of(custom_id: str) -> bytes:
    """Return a short hash of a custom_id."""
    return hashlib.blake2b(custom_id.encode(errors="surrogatepass"), digest_size=16).digest()


def validate(
    path: Path,
    endpoint: str,
    *,
    max_lines: int = MAX_LINES,
    stopped: Callable[[], bool] = lambda: False,
) -> Validated:
    """Check all lines of a file, or those before `stopped` returns True; raises `OSError`."""
    errors: list[LineError] = []
    seen: set[bytes] = set()
    models: set[str] = set()
    total = 0
    for found in read_lines(path, endpoint):
        if stopped():
            break
        total += 1
        if total > max_lines:
            text = f"The file has too many requests: the limit is {max_lines}."
            errors = [LineError("too_many_tasks", text)]
            break
        if isinstance(found, LineError):
            errors.append(found)
        elif found.key in seen:
            text = f"The custom_id is a duplicate of another request's: {found.custom_id[:100]!r}."
            errors.append(LineError("duplicate_custom_id", text, found.number, "custom_id"))
        else:
            seen.add(found.key)
            if len(models) < 2:
                models.add(found.model)
        if len(errors) == MAX_ERRORS:
            break
    if not total:
        errors = [LineError("empty_batch", "The file has no requests.")]
    return Validated(total, models.pop() if len(models) == 1 else None, tuple(errors))


def read_lines(path: Path, endpoint: str) -> Iterator[Line | LineError]:
    """Yield the lines of a file, or their errors, without blank ones; raises `OSError`."""
    with path.open("rb") as stream:
        number = 0
        while raw := stream.readline(MAX_LINE_BYTES + 2):
            number += 1
            if len(raw.rstrip(b"\r\n")) > MAX_LINE_BYTES:
                text = f"The line exceeds {MAX_LINE_BYTES} bytes."
                yield LineError("invalid_request", text, number)
                while raw and not raw.endswith(b"\n"):
                    raw = stream.readline(MAX_LINE_BYTES)
                continue
            if raw.strip():
                yield _line(raw, number, endpoint)


def _line(raw: bytes, number: int, endpoint: str) -> Line | LineError:
    def error(code: str, message: str, param: str | None = None) -> LineError:
        return LineError(code, message, number, param)

    try:
        value: Any = parse(raw).value
    except BodyError as problem:
        text = f"The line is not valid JSON: {str(problem)[:200]}."
        return error("invalid_json_line", text)
    if not isinstance(value, dict):
        return error("invalid_json_line", "The line is not a JSON object.")
    custom_id = value.get("custom_id")
    if not isinstance(custom_id, str) or not 0 < len(custom_id) <= MAX_CUSTOM_ID:
        text = f"custom_id is required, a string of at most {MAX_CUSTOM_ID} characters."
        return error("invalid_request", text, "custom_id")
    if value.get("method") != "POST":
        return error("invalid_request", "The method is not POST.", "method")
    if value.get("url") != endpoint:
        text = f"The url is not the endpoint of the batch, {endpoint}."
        return error("url_mismatch", text, "url")
    body = value.get("body")
    if not isinstance(body, dict):
        return error("invalid_request", "The body is not a JSON object.", "body")
    model = body.get("model")
    if not isinstance(model, str) or not model:
        return error("invalid_request", "model is required.", "body.model")
    for name in ("stream", "background"):
        if body.get(name):
            return error("invalid_request", f"{name} is not supported in a batch.", f"body.{name}")
    return Line(number, custom_id, model, json.dumps(body).encode())
