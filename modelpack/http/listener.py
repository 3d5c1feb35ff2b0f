"""AppServer: an ASGI application on a socket, in the foreground or in a thread."""

from __future__ import annotations

import gc
import logging
import signal
import socket
import ssl
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Self

import uvicorn

from modelpack.errors import ModelpackError, UsageError
from modelpack.http.connection import HttpConnection
from modelpack.http.hosts import is_loopback

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

#: Seconds that running requests get to finish when the server stops.
GRACE = 30
#: The loggers of our packages, whose records servers show.
LOGGERS = ("modelpack", "modelpack_engine", "modelpack_server")
#: The key of a function in the state of an application's lifespan (ASGI), which the server calls
#: when it begins to stop: before running requests get their grace.
ON_STOP = "modelpack.on_stop"
_BACKLOG = 128
# Seconds for which another thread may keep the interpreter's lock: the event loop releases the lock
# at each system call, and then waits this long to get it back. With 0.0001, it interrupts a thread
# that builds steps so often that they take 5 to 15 % longer. Python's default is 0.005.
_SWITCH = 0.001
# New objects after which the garbage collector runs. With Python's default (700) it runs dozens of
# times while a large request is parsed.
_COLLECTED = 50_000
_ANCESTORS = (b"content-security-policy", b"frame-ancestors 'none'")
_FRAMES = (b"x-frame-options", b"DENY")
_CLOSE = (b"connection", b"close")


class AppServer:
    """Serves the application of `make_app` at `address` (host:port; port 0 takes a free one).

    As a context manager it serves from a background thread; `run` serves in the foreground. Either
    binds the socket. `name` is for messages.
    """

    def __init__(
        self,
        make_app: Callable[[], ASGIApp],
        address: str,
        *,
        name: str,
        allow_remote: bool = False,
        grace: int = GRACE,
        drain: int = 0,
        lifespan: bool = False,
        tls: tuple[Path, Path] | None = None,
    ) -> None:
        """Raises `UsageError` for an invalid address, or unless `allow_remote` one beyond loopback.

        After SIGTERM, the server accepts requests for another `drain` seconds, but is unhealthy,
        and closes each connection after its response; then running requests get `grace` seconds.

        With `lifespan`, the application gets the events of start and end (ASGI's lifespan
        protocol). `tls` are the PEM files of a certificate and its key; without them the server
        speaks plain http.
        """
        if tls is not None:
            _check_certificate(*tls)
        self.address = _parsed_address(address)
        if not allow_remote and not is_loopback(self.address[0]):
            raise UsageError(
                f"{address!r} is not a loopback address, and the {name} asks for no password",
                hint="require a password, or give --allow-anonymous to allow all who reach it",
            )
        self._make_app = make_app
        self._name = name
        self._grace = grace
        self._drain = drain
        self._lifespan = lifespan
        self._tls = tls
        self._socket: socket.socket | None = None
        self._server: _Server | None = None
        self._thread: threading.Thread | None = None

    @property
    def host(self) -> str:
        """`host:port`; the real port once it is bound."""
        host, port = self.address
        if self._socket is not None:
            port = self._socket.getsockname()[1]
        return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"

    @property
    def url(self) -> str:
        """The address of the API's root, without a slash at the end."""
        return f"{'https' if self._tls else 'http'}://{self.host}"

    def run(self, on_ready: Callable[[], None] | None = None) -> None:
        """Serve until SIGINT or SIGTERM, then let requests finish; a second SIGINT cuts them.

        A second signal also ends the draining that SIGTERM begins.

        Runs in the main thread; `on_ready` is called once connections are accepted.
        """
        server = self._prepare(on_ready)
        sys.setswitchinterval(_SWITCH)
        gc.freeze()  # a full collection of imported objects stops all threads for 100 ms
        gc.set_threshold(_COLLECTED)
        try:
            assert self._socket is not None
            server.run([self._socket])
        finally:
            self._clean_up()

    def start(self) -> None:
        """Serve from a background thread; returns when connections are accepted."""
        started = threading.Event()
        server = self._prepare(started.set)
        assert self._socket is not None
        sockets = [self._socket]
        self._thread = threading.Thread(
            target=server.run, args=(sockets,), name=f"{self._name} {self.host}", daemon=True
        )
        self._thread.start()
        while not started.wait(0.1):
            if not self._thread.is_alive():
                self._clean_up()
                raise ModelpackError(f"the {self._name} at {self.url} did not start")

    def stop(self) -> None:
        """Stop a server that `start` began; requests under way get `grace` seconds."""
        if self._thread is None:
            return
        self.request_stop()
        self._thread.join()
        self._clean_up()

    def request_stop(self) -> None:
        """Make a running server stop as a signal does, and return at once."""
        if self._server is not None:
            self._server.should_exit = True

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _prepare(self, on_ready: Callable[[], None] | None) -> _Server:
        if self._server is not None:
            raise UsageError(f"the {self._name} at {self.url} is already running")
        app = Unframed(self._make_app())
        self._socket = _bound_socket(*self.address)
        # A library writes no log by default: an application that wants it configures `logging`.
        logging.getLogger("uvicorn").addHandler(logging.NullHandler())
        config = uvicorn.Config(
            app,
            http=HttpConnection,
            loop="asyncio",
            ws="none",
            lifespan="on" if self._lifespan else "off",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,  # `scope["client"]` is the peer: it may be trusted
            timeout_graceful_shutdown=self._grace,
            ssl_certfile=self._tls[0] if self._tls else None,
            ssl_keyfile=self._tls[1] if self._tls else None,
        )
        self._server = _Server(config, on_ready, app, self._drain)
        return self._server

    def _clean_up(self) -> None:
        if self._socket is not None:
            self._socket.close()
        self._socket = self._server = self._thread = None


class Unframed:
    """ASGI middleware that forbids pages of other sites to show a response in a frame.

    Policies of the application or an upstream stay: browsers apply all of them. Once `closes` is
    set, connections are closed after their responses: clients then open the next one to another
    server, since a proxy or Service sends no new connections to one that stops. `GET /health`
    returns 503 then, so that a gateway or load balancer sends no more requests.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self.closes = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def unframed(message: Message) -> None:
            if message["type"] == "http.response.start":
                others = [pair for pair in message["headers"] if pair[0].lower() != _FRAMES[0]]
                others += _FRAMES, _ANCESTORS
                if self.closes:
                    others = [pair for pair in others if pair[0].lower() != _CLOSE[0]] + [_CLOSE]
                message = {**message, "headers": others}
            await send(message)

        if self.closes and scope["type"] == "http" and scope["path"] == "/health":
            await _draining(unframed)
        else:
            await self._app(scope, receive, unframed)


async def _draining(send: Send) -> None:
    headers = [(b"content-type", b"application/json")]
    await send({"type": "http.response.start", "status": 503, "headers": headers})
    await send({"type": "http.response.body", "body": b'{"status":"draining"}'})


class _Server(uvicorn.Server):
    """Uvicorn's server: it calls `on_ready`, drains after SIGTERM, and returns after signals."""

    def __init__(
        self,
        config: uvicorn.Config,
        on_ready: Callable[[], None] | None,
        app: Unframed,
        drain: int,
    ) -> None:
        super().__init__(config)
        self._on_ready = on_ready
        self._app = app
        self._drain = drain
        self._until: float | None = None  # the end of draining, of `time.monotonic`

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self._on_ready is not None:
            self._on_ready()

    async def on_tick(self, counter: int) -> bool:
        """Stop when draining is over; uvicorn calls this ten times a second."""
        if self._until is not None and time.monotonic() >= self._until:
            self.should_exit = True
        return await super().on_tick(counter)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Tell the application that the server stops, and then stop."""
        on_stop = self.lifespan.state.get(ON_STOP)
        if on_stop is not None:
            on_stop()
        await super().shutdown(sockets)

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Stop on signals; uvicorn would raise them again afterwards, which ends the process."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        signals = (signal.SIGINT, signal.SIGTERM)
        before = {number: signal.signal(number, self._stop) for number in signals}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _stop(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGTERM and self._drain and self._until is None:
            self._app.closes, self._until = True, time.monotonic() + self._drain
            return
        self.force_exit = self.should_exit and number == signal.SIGINT
        self.should_exit = True


def _check_certificate(certificate: Path, key: Path) -> None:
    def no_password() -> str:
        raise ValueError("the key is encrypted")  # OpenSSL would ask at the terminal

    try:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate, key, password=no_password)
    except ssl.SSLError:
        raise UsageError(f"{certificate} and {key} are not a certificate and its key") from None
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or str(error)
        raise UsageError(f"cannot use {certificate} and {key}: {why}") from None


def _parsed_address(text: str) -> tuple[str, int]:
    host, colon, port = text.rpartition(":")
    bare = host.removeprefix("[").removesuffix("]")
    if not colon or not bare or not port.isascii() or not port.isdigit() or int(port) > 65535:
        raise UsageError(f"{text!r} is not an address: expected HOST:PORT, like 127.0.0.1:5000")
    return bare, int(port)


def _bound_socket(host: str, port: int) -> socket.socket:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        bound = socket.socket(family, kind, protocol)
        try:
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            bound.bind(address)
            bound.listen(_BACKLOG)
            bound.setblocking(False)
        except BaseException:
            bound.close()
            raise
    except OSError as error:
        why = error.strerror or str(error)
        raise UsageError(
            f"cannot listen on {host}:{port}: {why}",
            hint="choose another port, or 0 for any free one",
        ) from error
    return bound
