"""Requests of the embedded registry: counted for GET /metrics, recorded for the access log.

`Metrics` writes Prometheus's text format itself: prometheus-client belongs to the extra `gateway`,
and the embedded registry works without extras.
"""

from __future__ import annotations

import json
import logging
import re
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Final
from urllib.parse import quote

from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from modelpack.http.connection import body_size

#: The logger of requests, also of the gateway.
REQUEST_LOG: Final = logging.getLogger("modelpack.requests")
#: Paths by which others check that the server runs.
PROBES: Final = ("/v2/", "/v2")
#: The status of a request whose client disconnected before the response.
CLIENT_LEFT: Final = 499
_SESSION = re.compile(r"(/blobs/uploads/.{8}).+", re.DOTALL)
_MAX_SHOWN: Final = 512
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
    `authorization` has its scheme only. `seconds` is the time from the head to the last byte.
    """

    method: str
    path: str
    query: str
    status: int | None
    received: int
    sent: int
    headers: Mapping[str, str] = field(default_factory=dict, hash=False)
    seconds: float = 0.0

    @property
    def shown_path(self) -> str:
        """The path as a URL has it, without the query and most of an upload session's id.

        Who knows the id can continue the upload.
        """
        path = _SESSION.sub(r"\1...", self.path)
        return quote(path[:_MAX_SHOWN], safe="/:@+,;=")


def access_log(*, as_json: bool) -> Callable[[RequestRecord], None]:
    """Return a callback that writes each request, except successful probes, to `REQUEST_LOG`."""

    def log(record: RequestRecord) -> None:
        status = record.status or CLIENT_LEFT
        if status == 200 and record.path in PROBES:
            return
        now, milliseconds = datetime.now(UTC), round(record.seconds * 1000, 1)
        if as_json:
            value = {
                "time": now.isoformat(timespec="milliseconds"),
                "method": record.method,
                "path": record.shown_path,
                "status": status,
                "received_bytes": record.received,
                "sent_bytes": record.sent,
                "duration_ms": milliseconds,
            }
            line = json.dumps(value, separators=(",", ":"))
        else:
            when = f"{now.astimezone():%Y-%m-%d %H:%M:%S}"
            sizes = f"received {record.received} B, sent {record.sent} B"
            line = (
                f"{when} {record.method} {record.shown_path} {status}, {sizes}, {milliseconds} ms"
            )
        REQUEST_LOG.info("%s", line)

    return log


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
        started = time.perf_counter()

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
            metrics.requests[counted, status or CLIENT_LEFT] += 1
            if self._report is not None:
                self._report(
                    RequestRecord(
                        method,
                        scope["path"],
                        scope["query_string"].decode("latin-1"),
                        status,
                        received,
                        sent,
                        _shown(Headers(scope=scope)),
                        time.perf_counter() - started,
                    )
                )


def _shown(headers: Headers) -> dict[str, str]:
    shown = dict(headers)
    if "authorization" in shown:
        shown["authorization"] = shown["authorization"].partition(" ")[0]
    return shown
