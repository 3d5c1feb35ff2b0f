"""The trace of a request, for the log and the metrics, without prompts, outputs and secrets."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from starlette.types import Scope

from modelpack_server.gateway.families import Family

#: nginx's status for a client that disconnected before the response.
CLIENT_LEFT = 499

_SCOPE_KEY = "modelpack.trace"
_LOGGED = ("status", "refused", "key", "caller", "stack", "user", "model", "upstream", "attempts",
           "prompt_tokens", "cached_tokens", "completion_tokens")  # fmt: skip


@dataclass(slots=True)
class Trace:
    """One request. Times are seconds of `clock`; token counts are None if unknown.

    An application behind `protect` may set values that it knows more exactly than its replies show:
    `model`, `queue_s`, `first_token_at`, `last_token_at`, `finish` and the token counts. With
    `counts_known` it promises to set counts and times: then only finish reasons are read from a
    stream, whose pieces must be whole lines of compact JSON (reading all takes 20 us an event).
    """

    id: str
    method: str
    path: str
    family: Family
    started: float
    clock: Callable[[], float] = field(default=time.monotonic, repr=False)
    key: str | None = None
    caller: str | None = None
    stack: str | None = None
    user: str | None = None
    model: str | None = None
    status: int | None = None
    refused: str | None = None
    upstream: str | None = None
    attempts: int | None = None
    prompt_tokens: int | None = None
    cached_tokens: int | None = None
    completion_tokens: int | None = None
    counted_tokens: int = 0
    counts_known: bool = False
    queue_s: float | None = None
    first_token_at: float | None = None
    last_token_at: float | None = None
    finish: str | None = None
    ended: float | None = None

    @property
    def ttft(self) -> float | None:
        """Seconds from the request's arrival to the first token."""
        return None if self.first_token_at is None else self.first_token_at - self.started

    @property
    def tpot(self) -> float | None:
        """Mean seconds per token after the first."""
        tokens = self.completion_tokens or self.counted_tokens
        if self.first_token_at is None or self.last_token_at is None or tokens < 2:
            return None
        return (self.last_token_at - self.first_token_at) / (tokens - 1)

    @property
    def client_left(self) -> bool:
        """Whether the client disconnected before the response."""
        return self.status in (None, CLIENT_LEFT)

    def spent(self, prompt_estimate: int, answer_estimate: int = 0) -> int | None:
        """Return the tokens to charge; None if there is no basis for an estimate.

        A missing or invalid count of the reply is estimated. A refused request costs the tokens
        that were read. A request that a limit refused (429), or that failed on the server's side,
        costs nothing.
        """
        if self.client_left and self.completion_tokens is None:
            return None  # the caller charges the reservation
        if not self.client_left and self.status is not None and self.status >= 400:
            return prompt_estimate if self.status < 500 and self.status != 429 else 0
        prompt, completion = self.prompt_tokens, self.completion_tokens
        if prompt is None and completion is None and not self.counted_tokens:
            return None
        if not completion:
            completion = self.counted_tokens or (answer_estimate if completion is None else 0)
        return (prompt_estimate if prompt is None else prompt) + completion

    def to_json(self) -> dict[str, Any]:
        """Return the log record without unknown values."""
        duration = None if self.ended is None else self.ended - self.started
        record = {
            "id": self.id,
            "method": self.method,
            "path": self.path[:256],
            "family": str(self.family),
            **{name: getattr(self, name) for name in _LOGGED},
            # The pieces of a stream without usage, about one for each token.
            "counted_tokens": None if self.completion_tokens is not None
            else self.counted_tokens or None,
            "queue_s": _rounded(self.queue_s),
            "ttft_s": _rounded(self.ttft),
            "tpot_s": _rounded(self.tpot),
            "duration_s": _rounded(duration),
            "finish": self.finish,
        }  # fmt: skip
        return {name: value for name, value in record.items() if value is not None}

    def line(self) -> str:
        """Return the record as one line of ASCII JSON."""
        return json.dumps(self.to_json(), separators=(",", ":"))


def put_trace(scope: Scope, trace: Trace) -> None:
    """Set the trace of the request with this `scope`."""
    scope[_SCOPE_KEY] = trace


def trace_of(scope: Scope) -> Trace | None:
    """Return the trace of a request; None without `protect`."""
    trace = scope.get(_SCOPE_KEY)
    return trace if isinstance(trace, Trace) else None


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 6)
