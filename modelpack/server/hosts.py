"""HostGuard: the registry takes no requests that pages of other sites make a browser send.

A page whose host name is made to point at this server (DNS rebinding) speaks to it with its own
name in `Host`; a page that posts a form across origins sends `Origin`, and browsers tell of every
request whether it is for another site's page. No registry client does any of that.
"""

from __future__ import annotations

from collections.abc import Iterable

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from modelpack.hosts import AllowedHosts, is_cross_site
from modelpack.server.errors import ApiError, Code

_SAFE_METHODS = ("GET", "HEAD")


class HostGuard:
    """ASGI middleware that answers 403 to requests meant for another host."""

    def __init__(self, app: ASGIApp, allowed: Iterable[str] = ()) -> None:
        self._app = app
        self._hosts = AllowedHosts(allowed)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            problem = self._problem(scope, Headers(scope=scope))
            if problem:
                response = ApiError(403, Code.DENIED, problem).response()
                await response(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _problem(self, scope: Scope, headers: Headers) -> str | None:
        host = headers.get("host", "")
        if not self._hosts.allows(host, scope.get("server")):
            return f"this registry does not serve the host {host[:200]!r}: --allow-host allows it"
        if is_cross_site(headers):
            return "this registry takes no requests from web pages of other sites"
        if scope["method"] not in _SAFE_METHODS and "origin" in headers:
            return "this registry takes no writes from web pages"
        return None
