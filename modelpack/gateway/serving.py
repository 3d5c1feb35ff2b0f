"""GatewayServer: the gateway on a socket, in the foreground or in a thread."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType

from modelpack.gateway.app import GatewaySettings, create_gateway
from modelpack.listening import GRACE, AppServer


class GatewayServer:
    """A gateway at the address that its protection names, and `port` (0: a free one).

    As a context manager it serves from a background thread; `run` serves in the foreground.
    """

    def __init__(self, settings: GatewaySettings, port: int = 0, *, grace: int = GRACE) -> None:
        """Raises `UsageError` for upstreams, origins or an address that are none."""
        host = settings.protection.host
        app = create_gateway(settings)
        self._server = AppServer(
            lambda: app,
            f"[{host}]:{port}" if ":" in host else f"{host}:{port}",
            name="gateway",
            allow_remote=True,  # `Protection` has seen to it that keys are asked for
            grace=grace,
            lifespan=True,
        )

    @property
    def url(self) -> str:
        """The address, without a slash at the end; the real port once it is bound."""
        return self._server.url

    def run(self, on_ready: Callable[[], None] | None = None) -> None:
        """Serve until SIGINT or SIGTERM, then let requests finish."""
        self._server.run(on_ready)

    def __enter__(self) -> GatewayServer:
        self._server.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._server.stop()
