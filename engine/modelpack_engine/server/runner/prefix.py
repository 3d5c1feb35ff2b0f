"""/exp/vDD4.40: what Docker's command line puts before paths that go through Docker's socket.

Source: Docker Model Runner, pkg/inference/api.go (ExperimentalEndpointsPrefix).
"""

from __future__ import annotations

import re

from starlette.types import ASGIApp, Receive, Scope, Send

_PREFIX = re.compile(r"/exp/vDD\d+\.\d+(?=/)")


class DesktopPrefix:
    """ASGI middleware: the prefix is taken off, whatever its version."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and (found := _PREFIX.match(scope["path"])):
            path = scope["path"][found.end() :]
            raw = scope.get("raw_path") or b""
            scope = {**scope, "path": path, "raw_path": raw[found.end() :] or path.encode()}
        await self._app(scope, receive, send)
