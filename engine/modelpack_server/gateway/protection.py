"""Protection of an ASGI application: canonical paths, allowed hosts, CORS, then `Checks`."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from urllib.parse import quote, unquote, urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from modelpack.errors import UsageError
from modelpack.http.hosts import AllowedHosts, is_cross_site, is_loopback
from modelpack_server.gateway.checks import MAX_BODY, Checks
from modelpack_server.gateway.families import error_response, family_in
from modelpack_server.gateway.keys import KeyFile
from modelpack_server.gateway.limits import Limiter
from modelpack_server.gateway.trace_spans import Traced, default_report
from modelpack_server.gateway.traces import Trace, trace_of

_SLASHES = re.compile("/{2,}")
# The prefix that Docker's command line adds to paths through Docker's socket. Source: Docker Model
# Runner, pkg/inference/api.go (ExperimentalEndpointsPrefix).
_DESKTOP = re.compile(r"(?:/exp/vDD\d+\.\d+)+(?=/)")
_PLAIN = ":@!$&'()*+,;=-._~"  # RFC 3986 section 3.3, `pchar`


class CanonicalPath:
    """ASGI middleware that makes `path` and `raw_path` equivalent, each in a canonical spelling.

    It merges repeated slashes, removes Docker Desktop's prefix and encodes only the characters that
    need it. A slash within a segment stays encoded (`/v1/models/ai%2Fsmollm2`) if the path has no
    other change. Applying it twice changes nothing.
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
    """Return the canonical spelling of a decoded path, used for routing."""
    path = _SLASHES.sub("/", path)
    return _DESKTOP.sub("", path, count=1) if path.startswith("/exp/") else path


def _encoded(path: str, raw: bytes | None) -> bytes:
    """Return the encoded form of a canonical path; `raw` is the client's encoding."""
    whole = (raw or b"").decode("latin-1")
    if "#" in whole:
        return raw or b""  # not a path: building a URL from it will fail
    segments = [quote(unquote(segment), safe=_PLAIN) for segment in whole.split("/")]
    again = "/".join(segments)
    return (again if unquote(again) == path else quote(path, safe="/" + _PLAIN)).encode()


# Names outside the public DNS, which no foreign page can have (RFC 6761 section 6.3; the names by
# which Docker's containers reach their host, see docs.docker.com on networking).
_OURS = (".localhost", ".docker.internal")


class HostCheck:
    """ASGI middleware that responds with 403 to requests for another host."""

    def __init__(self, app: ASGIApp, allowed: Iterable[str] = ()) -> None:
        """`allowed` has names and addresses in addition to loopback and the socket's address."""
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
                    f"host not allowed: {host[:200]!r}; use --allow-host to allow it",
                    code="host_not_allowed",
                )  # fmt: skip
                await refusal(scope, receive, send)
                return
        await self._app(scope, receive, send)


_METHODS = "GET, HEAD, POST, PUT, PATCH, DELETE"
_EXPOSED = "x-request-id, request-id, retry-after, retry-after-ms"
_PAGES = frozenset(("/", "/docs", "/redoc"))
_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://[^\s/*@?#]+?(:\*|:[0-9]{1,5})?")


class Cors:
    """ASGI middleware that answers preflight requests and refuses foreign origins.

    `origins` are like `https://app.example`, `http://localhost:*` (any port), or `*` for all pages,
    which then may not send cookies.
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
        """Return whether pages of `origin` may use the server."""
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
    """Return `origins` in lower case; raises `UsageError` for an invalid origin."""
    found = []
    for origin in origins:
        lower = origin.lower().removesuffix("/")
        if lower not in ("*", "null") and not _ORIGIN.fullmatch(lower):
            raise UsageError(
                f"{origin!r} is not a valid origin",
                hint="expected an origin like https://app.example or http://localhost:*",
            )
        found.append(lower)
    return tuple(found)


def _is_visit(scope: Scope, headers: Headers) -> bool:
    """Return whether a user follows a link to one of the pages, which is harmless."""
    return (
        scope["method"] in ("GET", "HEAD")
        and scope["path"] in _PAGES
        and headers.get("sec-fetch-mode") == "navigate"
        and headers.get("sec-fetch-dest") == "document"
    )


def _same_origin(origin: str, host: str) -> bool:
    """Return whether the request is from a page of this server, whose host was checked before."""
    return bool(host) and urlsplit(origin.lower()).netloc == host.lower()


@dataclass(frozen=True, slots=True)
class Protection:
    """The protection settings of a server.

    `host` is its listening address without the port; `keys` the file of its API keys, None for no
    keys; `cors` the origins whose pages may use it; `allowed_hosts` the accepted host names, in
    addition to loopback names and the address of the connection; `max_body` the limit of a body in
    bytes. `report` is called with the trace of each request (None: log it). With
    `forwarded_callers`, a gateway in front of this server may name the caller of a request. With
    `remote_metrics`, other machines may read /metrics of a server without keys.
    """

    host: str = "127.0.0.1"
    keys: KeyFile | None = None
    cors: tuple[str, ...] = ()
    allowed_hosts: tuple[str, ...] = ()
    max_body: int = MAX_BODY
    allow_anonymous: bool = False
    forwarded_callers: bool = True
    remote_metrics: bool = False
    report: Callable[[Trace], None] | None = None

    def __post_init__(self) -> None:
        """Raises `UsageError` if other machines could reach the server without a key."""
        if not is_loopback(self.host) and self.keys is None and not self.allow_anonymous:
            raise UsageError(
                f"{self.host!r} is not a loopback address, and no API keys are configured",
                hint="pass --keys FILE, or --allow-anonymous to allow all who reach the port",
            )


def protect(
    app: ASGIApp,
    settings: Protection,
    *,
    clock: Callable[[], float] = time.monotonic,
    resolves: bool = False,
) -> ASGIApp:
    """Wrap `app` in request ids, traces, host and origin checks, keys and limits.

    `clock` returns seconds, for limits and traces. `resolves` says that the application itself
    refuses models that the caller may not use (see `gateway.caller`). The application gets the
    trace of a request from `gateway.traces.trace_of(scope)` and may add to it.
    """
    keys = settings.keys.current if settings.keys is not None else None
    checked: ASGIApp = Checks(
        app,
        keys=keys,
        max_body=settings.max_body,
        limiter=Limiter(clock),
        forwarded_callers=settings.forwarded_callers,
        remote_metrics=settings.remote_metrics,
        resolves=resolves,
    )
    checked = Cors(checked, settings.cors)
    checked = HostCheck(checked, (settings.host, *settings.allowed_hosts))
    return CanonicalPath(Traced(checked, settings.report or default_report(), clock))
