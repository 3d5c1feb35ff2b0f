"""Which requests are for us: the guard against pages that a browser shows.

A page whose host name is made to point at a loopback address (DNS rebinding) speaks to this server
with its own name in `Host`; a page that posts a form across origins sends `Origin`. No registry
client does either.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from modelpack.server.errors import ApiError, Code

_SAFE_METHODS = ("GET", "HEAD")


class HostGuard:
    """ASGI middleware that answers 403 to requests meant for another host."""

    def __init__(self, app: ASGIApp, allowed: Iterable[str] = ()) -> None:
        self._app = app
        self._names = {host_of(name) for name in allowed}
        # Bound to all addresses, each of them is ours; rebinding needs a name, not an address.
        self._any_address = any(_is_unspecified(name) for name in self._names)

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
        name = host_of(host)
        if name == "localhost" or name in self._names:
            return True
        try:
            address = ipaddress.ip_address(name)
        except ValueError:
            return False
        return self._any_address or address.is_loopback

    def _problem(self, method: str, headers: Headers) -> str | None:
        host = headers.get("host", "")
        if not self.allows(host):
            return f"this registry does not serve the host {host[:200]!r}"
        if method not in _SAFE_METHODS and "origin" in headers:
            return "this registry takes no writes from web pages"
        return None


def host_of(text: str) -> str:
    """Return the host in `host[:port]`, lower case and without the brackets of IPv6."""
    text = text.strip().lower()
    if text.startswith("["):
        return text[1:].partition("]")[0]
    host, colon, _ = text.rpartition(":")
    return host if colon and ":" not in host else text


def _is_unspecified(name: str) -> bool:
    try:
        return ipaddress.ip_address(name).is_unspecified
    except ValueError:
        return False
