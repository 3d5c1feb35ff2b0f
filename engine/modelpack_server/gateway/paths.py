"""Paths: one spelling of each request path, before anything decides or routes by it."""

from __future__ import annotations

import re
from urllib.parse import quote, unquote

from starlette.types import ASGIApp, Receive, Scope, Send

_SLASHES = re.compile("/{2,}")
# What Docker's command line puts before paths that go through Docker's socket. Source: Docker Model
# Runner, pkg/inference/api.go (ExperimentalEndpointsPrefix).
_DESKTOP = re.compile(r"(?:/exp/vDD\d+\.\d+)+(?=/)")
_PLAIN = ":@!$&'()*+,;=-._~"  # RFC 3986 section 3.3, `pchar`


class CanonicalPath:
    """ASGI middleware: `path` and `raw_path` say the same, each in one spelling.

    Repeated slashes count as one, Docker Desktop's prefix is removed, and only what has to be is
    encoded. A slash within a segment stays encoded (`/v1/models/ai%2Fsmollm2`), if that is all.
    Doing it twice changes nothing.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            path = canonical(scope["path"])
            raw = _encoded(path, scope.get("raw_path"))
            if path != scope["path"] or raw != scope.get("raw_path"):
                scope = {**scope, "path": path, "raw_path": raw}
        await self._app(scope, receive, send)


def canonical(path: str) -> str:
    """Return the spelling of a decoded path by which it is routed."""
    path = _SLASHES.sub("/", path)
    return _DESKTOP.sub("", path, count=1) if path.startswith("/exp/") else path


def _encoded(path: str, raw: bytes | None) -> bytes:
    """Return what to send for a canonical path; `raw` is how the client encoded it."""
    whole = (raw or b"").decode("latin-1")
    if "#" in whole:
        return raw or b""  # no path at all: whoever makes a URL of it refuses
    segments = [quote(unquote(segment), safe=_PLAIN) for segment in whole.split("/")]
    again = "/".join(segments)
    return (again if unquote(again) == path else quote(path, safe="/" + _PLAIN)).encode()
