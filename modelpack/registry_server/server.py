"""The embedded registry: its ASGI application, and RegistryServer, which serves it on a socket.

`HostGuard` rejects requests that a page of another site makes a browser send. With DNS rebinding,
such a request has the page's host in `Host`; a form posted across origins has an `Origin`, and
browsers mark cross-site requests. Registry clients send none of these.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Final

from starlette.applications import Starlette
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from modelpack.errors import ModelpackError
from modelpack.http.hosts import AllowedHosts, is_cross_site, is_loopback
from modelpack.http.listener import GRACE, AppServer
from modelpack.registry_server.auth import Guard, needs_of
from modelpack.registry_server.blobs import Blobs
from modelpack.registry_server.cache import CachedContent, Upstream
from modelpack.registry_server.content import Content
from modelpack.registry_server.errors import (
    ApiError,
    Code,
    on_defect,
    on_disconnect,
    on_error,
    on_http_error,
)
from modelpack.registry_server.manifests import Discovery, Manifests
from modelpack.registry_server.metrics import Metrics, Recorder, RequestRecord
from modelpack.registry_server.uploads import Limits, Uploads
from modelpack.store.layout import LayoutStore

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
            return "this registry refuses requests from web pages of other sites"
        if scope["method"] not in _SAFE_METHODS and "origin" in headers:
            return "this registry refuses writes from web pages"
        return None


NO_LIMITS: Final = Limits()
Endpoint = Callable[[Request], Awaitable[Response]]


def create_app(
    store: LayoutStore,
    *,
    read_only: bool = False,
    sparse: bool = False,
    allowed_hosts: Sequence[str] = (),
    guard: Guard | None = None,
    limits: Limits = NO_LIMITS,
    upstream: Upstream | None = None,
    on_request: Callable[[RequestRecord], None] | None = None,
) -> Starlette:
    """Return a registry (distribution-spec 1.1) that serves and fills `store`.

    Requests must name a loopback host or one of `allowed_hosts` in their `Host` header. `read_only`
    answers 405 to every write. `sparse` accepts manifests of which blobs are missing; by default
    they are refused, since such a model cannot be opened. `guard` authorises requests; None allows
    all of them. With an `upstream` the registry is read-only; it fetches what the store lacks from
    there and keeps it. Requests whose `ns` names another registry than the upstream get 404.
    `on_request` is called in the event loop's thread after each request.
    """
    content = Content(store, sparse=sparse)
    if upstream:
        content = CachedContent(store, upstream, keep_free=limits.keep_free)
    metrics = Metrics()
    middleware = [
        Middleware(Recorder, metrics=metrics, report=on_request),
        Middleware(ApiVersion),
        Middleware(HostGuard, allowed=tuple(allowed_hosts)),
    ]
    if read_only or upstream:
        middleware.append(Middleware(ReadOnly))
    app = Starlette(
        routes=_routes(content, limits, metrics, guard, upstream),
        middleware=middleware,
        exception_handlers={
            ApiError: on_error,
            ModelpackError: on_error,
            ClientDisconnect: on_disconnect,
            HTTPException: on_http_error,
            Exception: on_defect,
        },
    )
    app.router.redirect_slashes = False
    return app


def _routes(
    content: Content,
    limits: Limits,
    metrics: Metrics,
    guard: Guard | None,
    upstream: Upstream | None,
) -> list[Route]:
    blobs, uploads = Blobs(content), Uploads(content, limits)
    manifests, discovery = Manifests(content, limits.manifest), Discovery(content)
    metrics.sessions = uploads.count
    session = {
        "GET": uploads.status,
        "PATCH": uploads.append,
        "PUT": uploads.finish,
        "DELETE": uploads.cancel,
    }
    manifest = {
        "GET": manifests.get,
        "HEAD": manifests.get,
        "PUT": manifests.put,
        "DELETE": manifests.delete,
    }
    blob = {"GET": blobs.get, "HEAD": blobs.get, "DELETE": blobs.delete}
    # A name is greedy: in `a/manifests/manifests/b` it is `a/manifests`.
    resources: dict[str, Mapping[str, Endpoint]] = {
        "/v2/": {"GET": _probe, "HEAD": _probe},
        "/v2": {"GET": _probe, "HEAD": _probe},
        "/metrics": {"GET": metrics.get},
        "/v2/_catalog": {"GET": discovery.catalog},
        "/v2/{name:path}/blobs/uploads/": {"POST": uploads.start},
        "/v2/{name:path}/blobs/uploads": {"POST": uploads.start},
        "/v2/{name:path}/blobs/uploads/{session}": session,
        "/v2/{name:path}/blobs/{digest}": blob,
        "/v2/{name:path}/manifests/{reference}": manifest,
        "/v2/{name:path}/tags/list": {"GET": discovery.tags},
        "/v2/{name:path}/referrers/{digest}": {"GET": discovery.referrers},
    }
    return [_resource(path, methods, guard, upstream) for path, methods in resources.items()]


def _resource(
    path: str, methods: Mapping[str, Endpoint], guard: Guard | None, upstream: Upstream | None
) -> Route:
    async def endpoint(request: Request) -> Response:
        if guard is not None:
            await guard.check(request, needs_of(request, path))
        namespace = upstream.namespace(request) if upstream else None
        handler = methods.get(request.method) or methods["GET"]  # HEAD is handled as GET
        response = await handler(request)
        if namespace:
            response.headers["OCI-Namespace"] = namespace
        return response

    return Route(path, endpoint, methods=list(methods))


async def _probe(_: Request) -> Response:
    return JSONResponse({})


class ApiVersion:
    """ASGI middleware that adds the headers of all responses, such as the API's version."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def with_version(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers["Docker-Distribution-Api-Version"] = "registry/2.0"
                headers["X-Content-Type-Options"] = "nosniff"  # browsers show no blob as a page
            await send(message)

        await self._app(scope, receive, with_version)


class ReadOnly:
    """ASGI middleware that answers 405 to everything but reading."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["method"] not in ("GET", "HEAD"):
            error = ApiError(
                405, Code.UNSUPPORTED, "this registry is read-only", headers={"Allow": "GET, HEAD"}
            )
            await error.response()(scope, receive, send)
            return
        await self._app(scope, receive, send)


class RegistryServer(AppServer):
    """A registry over the store at `root` (None: the default store)."""

    def __init__(
        self,
        root: Path | str | LayoutStore | None = None,
        *,
        address: str = "127.0.0.1:5000",
        read_only: bool = False,
        sparse: bool = False,
        allow_remote: bool = False,
        guard: Guard | None = None,
        tls: tuple[Path, Path] | None = None,
        limits: Limits = NO_LIMITS,
        upstream: Upstream | None = None,
        allowed_hosts: Sequence[str] = (),
        grace: int = GRACE,
        on_request: Callable[[RequestRecord], None] | None = None,
    ) -> None:
        """Raises `UsageError` for an address that is invalid or not a loopback one.

        `guard` authenticates requests: `registry_server.auth` has `Passwords` and `BearerTokens`.
        With a guard, other addresses are permitted too. `allow_remote` permits them without a
        guard: everyone who reaches the port may then read and, unless `read_only`, write. `tls` are
        the PEM files of a certificate and its key. `allowed_hosts` are further names of this host
        in requests. For the others see `create_app`; an `upstream` belongs to one server.
        """

        def make_app() -> Starlette:
            return create_app(
                self.store,
                read_only=read_only,
                sparse=sparse,
                allowed_hosts=(self.address[0], *allowed_hosts),
                guard=guard,
                limits=limits,
                upstream=upstream,
                on_request=on_request,
            )

        super().__init__(
            make_app,
            address,
            name="registry",
            allow_remote=allow_remote or guard is not None,
            grace=grace,
            tls=tls,
        )
        self.store = root if isinstance(root, LayoutStore) else LayoutStore(root)
        self._upstream = upstream

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can reach the address."""
        return is_loopback(self.address[0])

    def run(self, on_ready: Callable[[], None] | None = None) -> None:
        """Serve as `AppServer.run`, and end the downloads from the upstream."""
        try:
            super().run(on_ready)
        finally:
            self._leave_upstream()

    def stop(self) -> None:
        """Stop as `AppServer.stop`, and end the downloads from the upstream."""
        super().stop()
        self._leave_upstream()

    def _leave_upstream(self) -> None:
        if self._upstream is not None:
            self._upstream.stop.request()
