"""RegistryServer: the registry on a socket, in the foreground or in a thread."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from modelpack.http.hosts import is_loopback
from modelpack.http.listener import GRACE, AppServer
from modelpack.registry_server.app import NO_LIMITS, create_app
from modelpack.registry_server.auth import Guard
from modelpack.registry_server.cache import Upstream
from modelpack.registry_server.recorder import Recorder, RequestRecord
from modelpack.registry_server.uploads import Limits
from modelpack.store.layout import LayoutStore

if TYPE_CHECKING:
    from starlette.types import ASGIApp


class RegistryServer:
    """A registry over the store at `root` (None: the default store).

    As a context manager it serves from a background thread; `run` serves in the foreground. Either
    binds the socket; port 0 takes a free one.
    """

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
        """Raises `UsageError` for an address that is none, or not a loopback one.

        `guard` asks who is there: `registry_server.auth` has `Passwords` and `BearerTokens`. With
        one other addresses are permitted, too; `allow_remote` permits them without: whoever reaches
        the port may then read and, unless `read_only`, write. `tls` are the PEM files of a
        certificate and its key. `allowed_hosts` are further names that requests may use for this
        host. For `sparse` and `upstream`, which serves one server, see `create_app`. `on_request`
        is called from the server's thread.
        """
        self._server = AppServer(
            self._make_app,
            address,
            name="registry",
            allow_remote=allow_remote or guard is not None,
            grace=grace,
            tls=tls,
        )
        self.store = root if isinstance(root, LayoutStore) else LayoutStore(root)
        self._read_only = read_only
        self._sparse = sparse
        self._guard = guard
        self._limits = limits
        self._upstream = upstream
        self._allowed_hosts = (self._server.address[0], *allowed_hosts)
        self._on_request = on_request

    @property
    def host(self) -> str:
        """`host:port`, as a reference names the registry; the real port once it is bound."""
        return self._server.host

    @property
    def url(self) -> str:
        """The address of the API's root, without a slash at the end."""
        return self._server.url

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can reach the address."""
        return is_loopback(self._server.address[0])

    def run(self, on_ready: Callable[[], None] | None = None) -> None:
        """Serve until SIGINT or SIGTERM, then let requests finish; a second SIGINT cuts them.

        Runs in the main thread; `on_ready` is called once connections are accepted.
        """
        try:
            self._server.run(on_ready)
        finally:
            self._leave_upstream()

    def start(self) -> None:
        """Serve from a background thread; returns when connections are accepted."""
        self._server.start()

    def stop(self) -> None:
        """Stop a server that `start` began; requests under way get `grace` seconds."""
        self._server.stop()
        self._leave_upstream()

    def __enter__(self) -> RegistryServer:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    def _leave_upstream(self) -> None:
        if self._upstream is not None:
            self._upstream.stop.request()

    def _make_app(self) -> ASGIApp:
        app = create_app(
            self.store,
            read_only=self._read_only,
            sparse=self._sparse,
            allowed_hosts=self._allowed_hosts,
            guard=self._guard,
            limits=self._limits,
            upstream=self._upstream,
        )
        return app if self._on_request is None else Recorder(app, self._on_request)
