"""GatewayServer: the gateway on a socket, in the foreground or in a thread."""

from __future__ import annotations

from pathlib import Path

from modelpack.listening import GRACE, AppServer
from modelpack_server.gateway.app import GatewaySettings, create_gateway


class GatewayServer(AppServer):
    """A gateway at the address that its protection names, and `port` (0: a free one)."""

    def __init__(
        self,
        settings: GatewaySettings,
        port: int = 0,
        *,
        grace: int = GRACE,
        tls: tuple[Path, Path] | None = None,
    ) -> None:
        """Raises `UsageError` for upstreams, origins or an address that are none."""
        host = settings.protection.host
        app = create_gateway(settings)
        super().__init__(
            lambda: app,
            f"[{host}]:{port}" if ":" in host else f"{host}:{port}",
            name="gateway",
            allow_remote=True,  # `Protection` has seen to it that keys are asked for
            grace=grace,
            lifespan=True,
            tls=tls,
        )
