"""Batch: the attributes of a batch, as clients see them and as they are stored."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from modelpack_server.api.openai.batch_input import ENDPOINTS
from modelpack_server.api.openai.stored_files import read_document

_log = logging.getLogger(__name__)

#: The final states of a batch.
FINAL = ("completed", "failed", "expired", "cancelled")
Ending = Literal["completed", "failed", "expired", "cancelled"]

# The places of token counts in the usage of a reply, of the Responses API and of the others.
_TOKENS: Mapping[str, tuple[tuple[str, ...], ...]] = {
    "input": (("input_tokens",), ("prompt_tokens",)),
    "cached": (
        ("input_tokens_details", "cached_tokens"),
        ("prompt_tokens_details", "cached_tokens"),
    ),
    "output": (("output_tokens",), ("completion_tokens",)),
    "reasoning": (
        ("output_tokens_details", "reasoning_tokens"),
        ("completion_tokens_details", "reasoning_tokens"),
    ),
}


@dataclass(slots=True)
class Batch:
    """A batch; times are in seconds since 1970.

    `key`, `headers` and `client` are those of the request that created it: the name of its API key,
    the headers in which a gateway names its caller, and the address. `ending` is the final status,
    once it is known.
    """

    id: str
    owner: str | None
    key: str | None
    headers: list[list[str]]
    client: str
    endpoint: str
    input_file_id: str
    input_bytes: int
    metadata: dict[str, str] | None
    output_seconds: float
    created: float
    expires: float
    status: str = "validating"
    ending: Ending | None = None
    model: str | None = None
    total: int = 0
    completed: int = 0
    failed: int = 0
    usage: dict[str, int] = field(default_factory=dict)  # tokens of the replies, by `_TOKENS`
    errors: list[dict[str, Any]] = field(default_factory=list)
    times: dict[str, int] = field(default_factory=dict)
    output_file_id: str | None = None
    error_file_id: str | None = None

    @property
    def is_final(self) -> bool:
        return self.status in FINAL

    def json(self) -> dict[str, Any]:
        """Return the OpenAI batch object."""
        names = ("in_progress", "finalizing", "completed", "failed", "expired", "cancelling",
                 "cancelled")  # fmt: skip
        ended = self.is_final
        return {
            "id": self.id,
            "object": "batch",
            "endpoint": self.endpoint,
            "model": self.model,
            "errors": {"object": "list", "data": self.errors} if self.errors else None,
            "input_file_id": self.input_file_id,
            "completion_window": "24h",
            "status": self.status,
            "output_file_id": self.output_file_id if ended else None,
            "error_file_id": self.error_file_id if ended else None,
            "created_at": int(self.created),
            "expires_at": int(self.expires),
            **{f"{name}_at": self.times.get(name) for name in names},
            "request_counts": {
                "total": self.total, "completed": self.completed, "failed": self.failed
            },
            "metadata": self.metadata,
            "usage": {
                "input_tokens": self.usage.get("input", 0),
                "input_tokens_details": {"cached_tokens": self.usage.get("cached", 0)},
                "output_tokens": self.usage.get("output", 0),
                "output_tokens_details": {"reasoning_tokens": self.usage.get("reasoning", 0)},
                "total_tokens": self.usage.get("input", 0) + self.usage.get("output", 0),
            },
        }  # fmt: skip

    def count(self, body: Any) -> None:
        """Add the usage in the reply to a request."""
        for name, paths in _TOKENS.items():
            for path in paths:
                value = body
                for key in ("usage", *path):
                    value = value.get(key) if isinstance(value, dict) else None
                if isinstance(value, int):
                    self.usage[name] = self.usage.get(name, 0) + value
                    break


@dataclass(frozen=True, slots=True)
class Sender:
    """Who created a batch; see `Batch`."""

    owner: str | None
    key: str | None
    headers: list[list[str]]
    client: str


#: The files of a batch beside its attributes.
PARTS = (".in", ".out", ".err")


def delete_parts(base: Path, suffixes: Iterable[str]) -> None:
    """Delete files of the batch at `base`, a path without a suffix."""
    for suffix in suffixes:
        base.with_suffix(suffix).unlink(missing_ok=True)


def read_batches(folder: Path) -> list[Batch]:
    """Return the stored batches, the oldest first; delete what is incomplete."""
    found: dict[str, Batch] = {}
    for path in folder.glob("*.json"):
        try:
            batch = Batch(**read_document(path))
            if batch.id != path.stem or batch.endpoint not in ENDPOINTS:
                raise ValueError("its id or its endpoint is not valid")
            found[batch.id] = batch
        except (OSError, ValueError, TypeError) as error:
            _log.warning("dropping the batch %s: %s", path.stem, error)
            path.unlink(missing_ok=True)
    for path in folder.iterdir():
        if path.stem not in found:
            _log.warning("deleting the incomplete file %s", path)
            path.unlink(missing_ok=True)
    return sorted(found.values(), key=lambda batch: batch.created)


def error_object(
    code: str, message: str, line: int | None = None, param: str | None = None
) -> dict[str, Any]:
    """Return the OpenAI object of an error in a batch or in one of its lines."""
    return {"code": code, "message": message, "line": line, "param": param}
