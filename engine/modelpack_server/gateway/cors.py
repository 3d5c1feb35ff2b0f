"""Which web pages may talk to the server: none, but its own and those listed.

A browser lets any page send some requests without asking (POST of plain text), so leaving out the
CORS headers is not enough: a request that names a foreign `Origin` is refused. (Fetch standard,
"HTTP extensions"; Private Network Access.) A GET without CORS has no `Origin`: Fetch metadata tell
that another site's page sent it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from modelpack.errors import UsageError
from modelpack.hosts import is_cross_site
from modelpack_server.gateway.families import error_response
from modelpack_server.gateway.observing import family_in
from modelpack_server.gateway.traces import trace_of

_METHODS = "GET, HEAD, POST, PUT, PATCH, DELETE"
_EXPOSED = "x-request-id, request-id, retry-after, retry-after-ms"
_PAGES = frozenset(("/", "/docs"))
_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://[^\s/*@?#]+?(:\*|:[0-9]{1,5})?")


class Cors:
    """ASGI middleware that answers preflights and refuses foreign origins.

    `origins`: `https://app.example`, `http://localhost:*` (any port), or `*` for every page; then
    browsers are not told to send cookies along.
    """

    def __init__(self, app: ASGIApp, origins: Iterable[str] = ()) -> None:
        self._app = app
        self._listed = frozenset(check_origins(origins))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        origin = headers.get("origin")
        if origin is None:
            if is_cross_site(headers) and "*" not in self._listed and not _is_visit(scope, headers):
                await self._refuse(scope, receive, send, "pages of other origins")
                return
            await self._app(scope, receive, self._varying(send) if self._listed else send)
            return
        if not self.allows(origin):
            if _same_origin(origin, headers.get("host", "")):
                await self._app(scope, receive, send)
                return
            await self._refuse(scope, receive, send, f"pages of {origin[:200]!r}")
            return
        if scope["method"] == "OPTIONS" and "access-control-request-method" in headers:
            response = Response(status_code=204, headers=self._preflight(origin, headers))
            await response(scope, receive, send)
            return

        async def with_cors(message: Message) -> None:
            if message["type"] == "http.response.start":
                sent = MutableHeaders(scope=message)
                for name, value in self._granted(origin).items():
                    sent[name] = value
                sent["Access-Control-Expose-Headers"] = _EXPOSED
                sent.add_vary_header("Origin")
            await send(message)

        await self._app(scope, receive, with_cors)

    async def _refuse(self, scope: Scope, receive: Receive, send: Send, who: str) -> None:
        if trace := trace_of(scope):
            trace.refused = "origin"
        refusal = error_response(
            family_in(scope), 403, f"{who} may not use this server", code="origin_not_allowed"
        )
        await refusal(scope, receive, send)

    def allows(self, origin: str) -> bool:
        """Return whether pages of `origin` are listed."""
        origin = origin.lower()
        if "*" in self._listed or origin in self._listed:
            return True
        scheme, _, rest = origin.partition("://")
        host, colon, port = rest.rpartition(":")
        host = host if colon and port.isdigit() else rest
        return f"{scheme}://{host}:*" in self._listed

    def _granted(self, origin: str) -> dict[str, str]:
        if "*" in self._listed:
            return {"Access-Control-Allow-Origin": "*"}
        return {
            "Access-Control-Allow-Origin": origin,
            "Access-Control-Allow-Credentials": "true",
        }

    def _preflight(self, origin: str, headers: Headers) -> dict[str, str]:
        told = self._granted(origin) | {
            "Access-Control-Allow-Methods": _METHODS,
            "Access-Control-Max-Age": "600",
            "Vary": "Origin, Access-Control-Request-Headers",
        }
        if asked := headers.get("access-control-request-headers"):
            told["Access-Control-Allow-Headers"] = asked
        if headers.get("access-control-request-private-network") == "true":
            told["Access-Control-Allow-Private-Network"] = "true"
        return told

    def _varying(self, send: Send) -> Send:
        async def varying(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).add_vary_header("Origin")
            await send(message)

        return varying


def check_origins(origins: Iterable[str]) -> tuple[str, ...]:
    """Return `origins` in lower case; raises `UsageError` for what no browser would send."""
    found = []
    for origin in origins:
        lower = origin.lower().removesuffix("/")
        if lower not in ("*", "null") and not _ORIGIN.fullmatch(lower):
            raise UsageError(
                f"{origin!r} is no origin", hint="like https://app.example or http://localhost:*"
            )
        found.append(lower)
    return tuple(found)


def _is_visit(scope: Scope, headers: Headers) -> bool:
    """Return whether a user follows a link to one of the pages, which do nothing by themselves."""
    return (
        scope["method"] in ("GET", "HEAD")
        and scope["path"] in _PAGES
        and headers.get("sec-fetch-mode") == "navigate"
        and headers.get("sec-fetch-dest") == "document"
    )


def _same_origin(origin: str, host: str) -> bool:
    """Return whether a page that this server sent asks. (The host was checked before.)"""
    return bool(host) and urlsplit(origin.lower()).netloc == host.lower()
