"""The gateway as an ASGI application: /health, /metrics and the proxy, behind all checks."""

from __future__ import annotations

import asyncio
import dataclasses
import socket
import sys
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import httpx
from prometheus_client import CONTENT_TYPE_PLAIN_0_0_4
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from modelpack.http.listener import GRACE, AppServer
from modelpack_server.gateway.metrics import GatewayMetrics
from modelpack_server.gateway.protection import Protection, protect
from modelpack_server.gateway.proxy import Proxy
from modelpack_server.gateway.trace_spans import default_report
from modelpack_server.gateway.traces import Trace
from modelpack_server.gateway.upstreams import (
    PROBE_INTERVAL,
    Lookup,
    Policy,
    Upstreams,
    addresses_of,
)

_KEPT_CONNECTIONS = 100
#: Seconds for which idle connections to upstreams are kept: much less than servers keep them, which
#: is 5 for uvicorn's (ours and vLLM's). A request that meets the server's close is lost, since the
#: server may have begun it.
KEPT_SECONDS = 2.0
#: TCP asks a silent upstream for a sign of life after 15 seconds, and then every 5: a request to a
#: machine that died ends after 30 seconds. The name of the first option is another one on macOS.
_KEEPALIVE_IDLE = getattr(socket, "TCP_KEEPIDLE", getattr(socket, "TCP_KEEPALIVE", 0))
KEEPALIVE = [
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    (socket.IPPROTO_TCP, _KEEPALIVE_IDLE, 15),
    (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 5),
    (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3),
]
if sys.platform == "linux":  # the same for bytes that nobody acknowledges, in milliseconds
    KEEPALIVE.append((socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 30_000))


@dataclass(frozen=True, slots=True)
class GatewaySettings:
    """The settings of a gateway: the URLs of upstreams, the policy among them, and the protection.

    `timeout` is the limit of seconds between two pieces of a reply. `upstream_key` replaces the
    clients' credentials in requests to upstreams. `lookup` finds the addresses of host names.
    """

    upstreams: tuple[str, ...]
    protection: Protection = field(default_factory=Protection)
    policy: Policy = "least-busy"
    timeout: float = 600.0
    probe_interval: float = PROBE_INTERVAL
    upstream_key: str | None = field(default=None, repr=False)
    lookup: Lookup = addresses_of


def create_gateway(settings: GatewaySettings) -> ASGIApp:
    """Return the gateway; its server must run ASGI's lifespan protocol.

    Raises `UsageError` for invalid upstreams or origins.
    """
    metrics = GatewayMetrics()
    report = settings.protection.report or default_report()

    def told(trace: Trace) -> None:
        metrics.observe(trace)
        report(trace)

    protection = dataclasses.replace(settings.protection, report=told, forwarded_callers=False)
    return protect(_Gateway(settings, metrics), protection)


def upstream_transport() -> httpx.AsyncHTTPTransport:
    """Return the transport to upstreams.

    It ignores the environment's proxies and certificates: upstreams are configured explicitly.
    """
    limits = httpx.Limits(
        max_connections=None,
        max_keepalive_connections=_KEPT_CONNECTIONS,
        keepalive_expiry=KEPT_SECONDS,
    )
    return httpx.AsyncHTTPTransport(limits=limits, trust_env=False, socket_options=KEEPALIVE)


class _Gateway:
    def __init__(self, settings: GatewaySettings, metrics: GatewayMetrics) -> None:
        self._settings = settings
        self._metrics = metrics
        self._upstreams = Upstreams(
            settings.upstreams, policy=settings.policy, lookup=settings.lookup
        )
        self._transport: httpx.AsyncHTTPTransport | None = None
        self._proxy = Proxy(
            self._upstreams,
            self._open_transport,
            keyed=settings.protection.keys is not None,
            upstream_key=settings.upstream_key,
            timeout=settings.timeout,
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._live(receive, send)
        elif scope["path"] == "/health" and scope["method"] in ("GET", "HEAD"):
            await self._health()(scope, receive, send)
        elif scope["path"] == "/metrics" and scope["method"] in ("GET", "HEAD"):
            await self._show_metrics()(scope, receive, send)
        else:
            await self._proxy(scope, receive, send)

    def _open_transport(self) -> httpx.AsyncHTTPTransport:
        assert self._transport is not None, "the server did not run the lifespan protocol"
        return self._transport

    async def _live(self, receive: Receive, send: Send) -> None:
        await receive()
        async with upstream_transport() as transport:
            self._transport = transport
            await self._upstreams.look_up()
            watch = asyncio.create_task(
                self._upstreams.watch(transport, self._settings.probe_interval)
            )
            await send({"type": "lifespan.startup.complete"})
            await receive()
            watch.cancel()
            with suppress(asyncio.CancelledError):
                await watch
        await send({"type": "lifespan.shutdown.complete"})

    def _health(self) -> Response:
        well = [upstream.healthy for upstream in self._upstreams.all]
        counts = {"healthy": sum(well), "total": len(well)}
        if any(well):
            return JSONResponse({"status": "ok", "upstreams": counts})
        body = {"status": "no upstream can be reached", "upstreams": counts}
        return JSONResponse(body, 503, {"Retry-After": "1"})

    def _show_metrics(self) -> Response:
        rows = [(u.name, u.healthy, u.running, u.failures) for u in self._upstreams.all]
        return Response(self._metrics.render(rows), media_type=CONTENT_TYPE_PLAIN_0_0_4)


class GatewayServer(AppServer):
    """The server of a gateway, at the host of its protection and `port` (0: a free port)."""

    def __init__(
        self,
        settings: GatewaySettings,
        port: int = 0,
        *,
        grace: int = GRACE,
        drain: int = 0,
        tls: tuple[Path, Path] | None = None,
    ) -> None:
        """Raises `UsageError` for invalid upstreams, origins or addresses."""
        host = settings.protection.host
        app = create_gateway(settings)
        super().__init__(
            lambda: app,
            f"[{host}]:{port}" if ":" in host else f"{host}:{port}",
            name="gateway",
            allow_remote=True,  # `Protection` requires keys beyond loopback
            grace=grace,
            drain=drain,
            lifespan=True,
            tls=tls,
        )
