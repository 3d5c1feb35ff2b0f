"""The trace of a request: what the log and the metrics record. Never a prompt, output or secret."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from starlette.types import Scope

from modelpack_server.gateway.families import Family

#: The status, of nginx, by which an application notes that nobody reads its answer.
CLIENT_LEFT = 499

_SCOPE_KEY = "modelpack.trace"


@dataclass(slots=True)
class Trace:
    """One request. Times are of `clock`, in seconds; token counts are None where nobody told.

    An application behind `protect` may set what it knows better than its replies show: `model`,
    `queue_s`, `first_token_at`, `last_token_at`, `finish` and the token counts.
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
        """Whether the client went away before the answer."""
        return self.status in (None, CLIENT_LEFT)

    def spent(self, prompt_estimate: int, answer_estimate: int = 0) -> int | None:
        """Return the tokens to charge; None where nothing shows how many it took.

        A count that the reply did not report, or not as a number of tokens, is estimated. A refused
        request costs what was read of it. One that a limit refused (429), or that failed for no
        fault of the client's, costs nothing.
        """
        if self.client_left and self.completion_tokens is None:
            return None  # it is charged all the same
        if not self.client_left and self.status is not None and self.status >= 400:
            return prompt_estimate if self.status < 500 and self.status != 429 else 0
        prompt, completion = self.prompt_tokens, self.completion_tokens
        if prompt is None and completion is None and not self.counted_tokens:
            return None
        if not completion:
            completion = self.counted_tokens or (answer_estimate if completion is None else 0)
        return (prompt_estimate if prompt is None else prompt) + completion

    def to_json(self) -> dict[str, Any]:
        """Return the log record; what is not known is left out."""
        duration = None if self.ended is None else self.ended - self.started
        record = {
            "id": self.id,
            "method": self.method,
            "path": self.path[:256],
            "family": str(self.family),
            "status": self.status,
            "refused": self.refused,
            "key": self.key,
            "caller": self.caller,
            "stack": self.stack,
            "user": self.user,
            "model": self.model,
            "upstream": self.upstream,
            "attempts": self.attempts,
            "prompt_tokens": self.prompt_tokens,
            "cached_tokens": self.cached_tokens,
            "completion_tokens": self.completion_tokens,
            # Pieces of a stream that told no usage: about as many tokens.
            "counted_tokens": (self.counted_tokens or None)
            if self.completion_tokens is None
            else None,
            "queue_s": _rounded(self.queue_s),
            "ttft_s": _rounded(self.ttft),
            "tpot_s": _rounded(self.tpot),
            "duration_s": _rounded(duration),
            "finish": self.finish,
        }
        return {name: value for name, value in record.items() if value is not None}

    def line(self) -> str:
        """Return the record as one line of ASCII JSON."""
        return json.dumps(self.to_json(), separators=(",", ":"))


def put_trace(scope: Scope, trace: Trace) -> None:
    """Make `trace` the one of the request that `scope` is about."""
    scope[_SCOPE_KEY] = trace


def trace_of(scope: Scope) -> Trace | None:
    """Return the trace of a request; None where `protect` is not before the application."""
    trace = scope.get(_SCOPE_KEY)
    return trace if isinstance(trace, Trace) else None


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 6)
