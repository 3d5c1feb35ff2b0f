"""Which requests are for us: the guard against pages that a browser shows.

A page whose host name is made to point at a loopback address (DNS rebinding) speaks to this server
with its own name in `Host`; a page that posts a form across origins sends `Origin`. No registry
client does either.
"""

from __future__ import annotations

from collections.abc import Iterable

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from modelpack.hosts import AllowedHosts
from modelpack.server.errors import ApiError, Code

_SAFE_METHODS = ("GET", "HEAD")


class HostGuard:
    """ASGI middleware that answers 403 to requests meant for another host."""

    def __init__(self, app: ASGIApp, allowed: Iterable[str] = ()) -> None:
        self._app = app
        self._hosts = AllowedHosts(allowed)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            problem = self._problem(scope["method"], Headers(scope=scope))
            if problem:
                response = ApiError(403, Code.DENIED, problem).response()
                await response(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def allows(self, host: str) -> bool:
        """Return whether a request with this `Host` header is for us."""
        return host in self._hosts

    def _problem(self, method: str, headers: Headers) -> str | None:
        host = headers.get("host", "")
        if not self.allows(host):
            return f"this registry does not serve the host {host[:200]!r}"
        if method not in _SAFE_METHODS and "origin" in headers:
            return "this registry takes no writes from web pages"
        return None
