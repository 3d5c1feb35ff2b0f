"""ModelServer: a pool of models behind its APIs, on a socket."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType

from starlette.types import ASGIApp

from modelpack.listening import GRACE, AppServer
from modelpack_engine.pool.pool import ModelPool
from modelpack_engine.server.app import create_app
from modelpack_engine.server.bodies import MAX_BODY_BYTES


class ModelServer:
    """Serves a pool. As a context manager it serves from a background thread; `run` in front.

    The socket answers while models are loaded: /health says 503 until those that are pinned are.
    `wrap` puts an application before this one; bodies larger than `max_body_bytes` are refused.
    """

    def __init__(
        self,
        make_pool: Callable[[], ModelPool],
        *,
        address: str = "127.0.0.1:12434",
        allow_remote: bool = False,
        grace: int = GRACE,
        max_body_bytes: int = MAX_BODY_BYTES,
        wrap: Callable[[ASGIApp], ASGIApp] = lambda app: app,
    ) -> None:
        """Raises `UsageError` for an address that is none, or not loopback unless allowed."""
        self._server = AppServer(
            lambda: wrap(create_app(make_pool(), max_body_bytes=max_body_bytes)),
            address,
            name="model server",
            allow_remote=allow_remote,
            grace=grace,
            lifespan=True,
        )

    @property
    def url(self) -> str:
        """The address, without a slash at the end; the real port once it is bound."""
        return self._server.url

    def run(self, on_listening: Callable[[], None] | None = None) -> None:
        """Serve until SIGINT or SIGTERM, then let requests finish."""
        self._server.run(on_listening)

    def __enter__(self) -> ModelServer:
        self._server.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._server.stop()
