"""Requests of the embedded registry, counted: for GET /metrics and for a callback.

`Metrics` writes Prometheus's text format itself: prometheus-client belongs to the extra `gateway`,
and the embedded registry works without extras.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Final

from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from modelpack.http.connection import body_size

_METHODS: Final = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE"})
_HELP: Final = {
    "modelpack_registry_requests_total": ("counter", "Finished requests."),
    "modelpack_registry_received_bytes_total": ("counter", "Bytes of request bodies."),
    "modelpack_registry_sent_bytes_total": ("counter", "Bytes of response bodies."),
    "modelpack_registry_requests_in_progress": ("gauge", "Requests in progress."),
    "modelpack_registry_upload_sessions": ("gauge", "Unfinished uploads."),
}


class Metrics:
    """Counters of one server, used only in the event loop's thread."""

    def __init__(self) -> None:
        self.requests: Counter[tuple[str, int]] = Counter()
        self.received = 0
        self.sent = 0
        self.in_progress = 0
        self.sessions: Callable[[], int] = lambda: 0

    async def get(self, _: Request) -> Response:
        """Answer with all samples."""
        totals = {
            f'modelpack_registry_requests_total{{method="{method}",code="{code}"}}': count
            for (method, code), count in sorted(self.requests.items())
        }
        totals |= {
            "modelpack_registry_received_bytes_total": self.received,
            "modelpack_registry_sent_bytes_total": self.sent,
            "modelpack_registry_requests_in_progress": self.in_progress,
            "modelpack_registry_upload_sessions": self.sessions(),
        }
        lines = []
        for name, (kind, text) in _HELP.items():
            lines += [f"# HELP {name} {text}", f"# TYPE {name} {kind}"]
            lines += [f"{k} {v}" for k, v in totals.items() if k.partition("{")[0] == name]
        return Response("\n".join(lines) + "\n", media_type="text/plain; version=0.0.4")


@dataclass(frozen=True, slots=True)
class RequestRecord:
    """One finished request; `received` and `sent` are bytes of the bodies.

    `status` is None if the connection ended before a response. Header names are lower case;
    `authorization` has its scheme only.
    """

    method: str
    path: str
    query: str
    status: int | None
    received: int
    sent: int
    headers: Mapping[str, str] = field(default_factory=dict, hash=False)


class Recorder:
    """ASGI middleware that counts into `metrics`, and calls `report` after each request."""

    def __init__(
        self, app: ASGIApp, metrics: Metrics, report: Callable[[RequestRecord], None] | None
    ) -> None:
        self._app = app
        self._metrics = metrics
        self._report = report

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        metrics, method = self._metrics, scope["method"]
        status: int | None = None
        received = sent = 0

        async def counted_receive() -> Message:
            nonlocal received
            message = await receive()
            received += body_size(message)
            metrics.received += body_size(message)
            return message

        async def counted_send(message: Message) -> None:
            nonlocal status, sent
            status = message.get("status", status)
            await send(message)
            if method != "HEAD":  # such a body is never sent
                sent += body_size(message)
                metrics.sent += body_size(message)

        metrics.in_progress += 1
        try:
            await self._app(scope, counted_receive, counted_send)
        except Exception:
            status = status or 500  # Starlette responds to a defect
            raise
        finally:
            metrics.in_progress -= 1
            counted = method if method in _METHODS else "other"
            metrics.requests[counted, status or 499] += 1  # 499: the client disconnected
            if self._report is not None:
                query, headers = scope["query_string"].decode("latin-1"), Headers(scope=scope)
                record = (method, scope["path"], query, status, received, sent, _shown(headers))
                self._report(RequestRecord(*record))


def _shown(headers: Headers) -> dict[str, str]:
    shown = dict(headers)
    if "authorization" in shown:
        shown["authorization"] = shown["authorization"].partition(" ")[0]
    return shown
