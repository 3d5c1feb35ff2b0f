"""ModelServer: one model behind the OpenAI API, on a socket."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import TracebackType

from modelpack.listening import GRACE, AppServer
from modelpack_engine.async_engine import AsyncEngine
from modelpack_engine.config import EngineConfig
from modelpack_engine.opening import Opened
from modelpack_engine.server.app import create_app
from modelpack_engine.server.serving import ServedModel


class ModelServer:
    """Serves an opened model under `names`; the first is shown, all are answered.

    The socket answers while the model is loaded: /health says 503 until it is ready. As a context
    manager it serves from a background thread; `run` serves in the foreground.
    """

    def __init__(
        self,
        opened: Opened,
        names: Sequence[str],
        config: EngineConfig | None = None,
        *,
        address: str = "127.0.0.1:12434",
        allow_remote: bool = False,
        grace: int = GRACE,
    ) -> None:
        """Raises `UsageError` for an address that is none, or not loopback unless allowed."""
        self._server = AppServer(
            lambda: create_app(self.served),
            address,
            name="model server",
            allow_remote=allow_remote,
            grace=grace,
        )
        engine = AsyncEngine(lambda: opened.engine(config))
        self.served = ServedModel(tuple(names), engine)

    @property
    def url(self) -> str:
        """The address, without a slash at the end; the real port once it is bound."""
        return self._server.url

    def run(self, on_listening: Callable[[], None] | None = None) -> None:
        """Serve until SIGINT or SIGTERM, then let requests finish."""
        try:
            self._server.run(on_listening)
        finally:
            self.served.engine.close()

    def wait_until_ready(self, timeout: float | None = None) -> None:
        """Return once the model is loaded; raise what loading it raised."""
        self.served.engine.wait_until_ready(timeout)

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
        self.served.engine.close()


def served_names(name: str) -> tuple[str, ...]:
    """Return what clients may call a model: as it was typed, short, and in full."""
    from modelpack.reference import Reference

    try:
        reference = Reference.parse(name)
    except ValueError:  # an id
        return (name,)
    return tuple(dict.fromkeys((name, reference.familiar, str(reference.without_digest()))))
