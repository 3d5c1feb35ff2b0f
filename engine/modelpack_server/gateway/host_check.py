"""HostCheck: a server answers only to its own addresses and names (DNS rebinding)."""

from __future__ import annotations

from collections.abc import Iterable

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from modelpack.hosts import AllowedHosts
from modelpack_server.gateway.families import error_response
from modelpack_server.gateway.observing import family_in
from modelpack_server.gateway.traces import trace_of

# Names that no foreign page can have: they are not of the public DNS. (RFC 6761 section 6.3; the
# names by which Docker's containers reach their host, see docs.docker.com on networking.)
_OURS = (".localhost", ".docker.internal")


class HostCheck:
    """ASGI middleware that answers 403 to requests meant for another host."""

    def __init__(self, app: ASGIApp, allowed: Iterable[str] = ()) -> None:
        """`allowed`: names and addresses besides loopback ones and that of the socket."""
        self._app = app
        self._hosts = AllowedHosts((*_OURS, *allowed))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            host = Headers(scope=scope).get("host", "")
            if not self._hosts.allows(host, scope.get("server")):
                if trace := trace_of(scope):
                    trace.refused = "host"
                refusal = error_response(
                    family_in(scope), 403,
                    f"this server does not serve the host {host[:200]!r}: --allow-host allows it",
                    code="host_not_allowed",
                )  # fmt: skip
                await refusal(scope, receive, send)
                return
        await self._app(scope, receive, send)
