"""Sockets of the HTTP client: interruptible, with limits on a peer's time, speed and bytes.

`InterruptibleAdapter` makes requests and urllib3 use them. A filter removes queries from the log of
urllib3, because a query may be a signature or the state of an upload.
"""

from __future__ import annotations

import logging
import math
import os
import socket
import ssl
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from requests.adapters import HTTPAdapter
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool
from urllib3.exceptions import ConnectTimeoutError, NameResolutionError, NewConnectionError
from urllib3.util import wait_for_write

from modelpack.errors import RegistryError
from modelpack.progress import Stop
from modelpack.registry.limits import Timeouts
from modelpack.registry.tls import TlsContexts
from modelpack.registry.urls import Origin, Reach


class WithoutQueries(logging.Filter):
    """A log filter that removes the queries of URLs from records of requests that are `ours`."""

    def __init__(self, ours: Callable[[], bool]) -> None:
        super().__init__()
        self._ours = ours

    def filter(self, record: logging.LogRecord) -> bool:
        """Remove queries from the record's arguments; return True."""
        if isinstance(record.args, tuple) and self._ours():
            record.args = tuple(
                value.partition("?")[0] if isinstance(value, str) else value
                for value in record.args
            )
        return True


#: Seconds after which a blocked call checks for a stop.
SLICE = 0.25
# A name may have thousands of addresses, and each attempt may time out.
_MOST_ADDRESSES = 16
#: Connections kept for reuse, and hosts (registry, storage, token server) that they lead to.
POOL_SIZE = 16

T = TypeVar("T")


class Inflow:
    """Limits on the bytes that a peer sends and on their speed, counted at the socket.

    The peer may send `max_bytes`. After its first byte, it must keep `timeouts.minimum_speed` over
    each period of `timeouts.idle`, and finish within `seconds`. So a server cannot hold a client by
    sending a byte now and then, or interim responses without end. Unlike a `SpeedMeter`, it is
    checked while a call blocks, and counts the time of one call as a whole.
    """

    def __init__(
        self, timeouts: Timeouts, *, max_bytes: float = math.inf, seconds: float = math.inf
    ) -> None:
        self._timeouts = timeouts
        self._left = self._max_bytes = max_bytes
        self._seconds = seconds
        self._began: float | None = None
        self._window = 0.0
        self._window_bytes = 0

    def renew(self) -> None:
        """Reset the count against `max_bytes`."""
        self._left = self._max_bytes

    def count(self, received: int) -> None:
        """Count bytes that arrived; raise `TooMuchError`, or `TimeoutError` if too slow."""
        self._left -= received
        if self._left < 0:
            raise TooMuchError
        self._window_bytes += received
        self.check()

    def check(self) -> None:
        """Raise `TimeoutError` if a reply that has begun is too slow."""
        now = time.monotonic()
        if self._began is None:
            if self._window_bytes:
                self._began = self._window = now
            return
        elapsed = now - self._window
        if elapsed >= self._timeouts.idle:
            if self._window_bytes < self._timeouts.minimum_speed * elapsed:
                raise TimeoutError("timed out")
            self._window, self._window_bytes = now, 0
        if now - self._began >= self._seconds:
            raise TimeoutError("timed out")


class TooMuchError(OSError):
    """A peer sent too many bytes of headers, interim responses or trailers."""


class _Waiting(threading.local):
    """The stop and the limits that apply to the sockets of this thread."""

    stop: Stop | None = None
    send_limit: float | None = None
    inflow: Inflow | None = None


_waiting = _Waiting()

# urllib3's log may show the hosts and paths of our requests, but not their signatures.
logging.getLogger("urllib3.connectionpool").addFilter(
    WithoutQueries(lambda: _waiting.stop is not None)
)


@contextmanager
def waiting(stop: Stop, send_limit: float, inflow: Inflow | None = None) -> Iterator[None]:
    """Apply `stop` and limits to this thread's sockets in the block.

    The sockets fail if nothing can be sent for `send_limit` seconds, or if the peer breaks the
    limits of `inflow`.
    """
    outer = _waiting.stop, _waiting.send_limit, _waiting.inflow
    _waiting.stop, _waiting.send_limit, _waiting.inflow = stop, send_limit, inflow
    try:
        yield
    finally:
        _waiting.stop, _waiting.send_limit, _waiting.inflow = outer


class InterruptibleSocket(socket.socket):
    """A socket whose blocking calls end early for a stop."""

    _limit: float | None = None

    def settimeout(self, value: float | None) -> None:
        """Limit each call to `value` seconds, with `SLICE` as the timeout underneath."""
        self._limit = value
        super().settimeout(SLICE if value is None else min(value, SLICE))

    def gettimeout(self) -> float | None:
        """Return the limit, not the slice."""
        return self._limit

    def connect(self, address: Any) -> None:
        """Connect; the wait for the peer ends early for a stop."""
        limit = self._limit
        super().settimeout(0.0)
        error = self.connect_ex(address)
        if error:
            deadline = _deadline(limit)
            while not wait_for_write(self, SLICE):
                _check(deadline)
            error = self.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if error:
            raise OSError(error, os.strerror(error))
        self.settimeout(limit)

    def recv_into(self, *arguments: Any) -> int:
        """Receive bytes and count them."""
        count = self._patiently(self._limit, super().recv_into, *arguments)
        if _waiting.inflow is not None:
            _waiting.inflow.count(count)
        return count

    def send(self, *arguments: Any) -> int:
        """Send bytes; fail after the thread's limit."""
        limit = _waiting.send_limit or self._limit
        return self._patiently(limit, super().send, *arguments)

    def sendall(self, data: Any, *flags: int) -> None:
        """Send all; the limit is for each part that the peer takes, not for the whole."""
        with memoryview(data) as view, view.cast("B") as content:
            sent = 0
            while sent < len(content):
                sent += self.send(content[sent:], *flags)

    @staticmethod
    def _patiently(limit: float | None, call: Callable[..., T], *arguments: Any) -> T:
        deadline: float | None = None
        while True:
            try:
                return call(*arguments)
            except TimeoutError:
                if deadline is None:
                    deadline = _deadline(limit) - min(SLICE, limit or SLICE)
                _check(deadline)


class InterruptibleSSLSocket(InterruptibleSocket, ssl.SSLSocket):
    """The same for TLS: OpenSSL resumes a read, a write or a handshake after a timeout."""

    def do_handshake(self, block: bool = False) -> None:
        """Perform the handshake; a stop ends it."""
        try:
            self._patiently(self._limit, super().do_handshake, block)
        except BaseException:
            self.close()  # ssl closes it for its own errors only
            raise


def _deadline(limit: float | None) -> float:
    return float("inf") if limit is None else time.monotonic() + limit


def _check(deadline: float) -> None:
    if _waiting.stop is not None:
        _waiting.stop.check()
    if _waiting.inflow is not None:
        _waiting.inflow.check()
    if time.monotonic() >= deadline:
        raise TimeoutError("timed out")


def _addresses(host: str, port: int, limit: float | None) -> list[Any]:
    """Return the result of `getaddrinfo`, run in a thread: only so can the wait be interrupted."""
    found: list[Any] = []
    failed: list[Exception] = []

    def look_up() -> None:
        try:
            found.extend(socket.getaddrinfo(host, port, type=socket.SOCK_STREAM))
        except Exception as error:  # noqa: BLE001 - raised again below
            failed.append(error)

    thread = threading.Thread(target=look_up, name=f"look up {host}", daemon=True)
    thread.start()
    deadline = _deadline(limit)
    while thread.is_alive():
        thread.join(SLICE)
        if thread.is_alive():
            _check(deadline)
    if failed:
        raise failed[0]
    return found


class _Connecting(HTTPConnection):
    reach: Reach  # set by the adapter

    def _new_conn(self) -> socket.socket:
        try:
            addresses = _addresses(self._dns_host.strip("[]"), self.port, self.timeout)
        except (socket.gaierror, UnicodeError) as error:
            raise NameResolutionError(self.host, self, error) from error  # type: ignore[arg-type]
        except TimeoutError as error:
            raise ConnectTimeoutError(self, f"the lookup of {self.host} timed out") from error
        failed: OSError | None = None
        refused: RegistryError | None = None
        is_target = self.proxy is None  # a proxy's address is the user's choice
        for family, kind, protocol, _, address in addresses[:_MOST_ADDRESSES]:
            if is_target:
                try:
                    self.reach.check(self._dns_host, self.port, address[0])
                except RegistryError as error:
                    refused = error
                    continue
            sock = InterruptibleSocket(family, kind, protocol)
            try:
                for option in self.socket_options or ():
                    sock.setsockopt(*option)
                sock.settimeout(self.timeout)
                sock.connect(address)
            except OSError as error:
                sock.close()
                failed = error
            except BaseException:
                sock.close()
                raise
            else:
                if is_target:
                    self.reach.connected(self._dns_host, address[0])
                sys.audit("http.client.connect", self, self.host, self.port)
                return sock
        if refused is not None and failed is None:
            raise refused
        if isinstance(failed, TimeoutError):
            raise ConnectTimeoutError(self, f"no connection to {self.host}") from failed
        raise NewConnectionError(self, f"no connection to {self.host}: {failed}") from failed


class _TlsConnection(_Connecting, HTTPSConnection):
    contexts: TlsContexts  # set by the adapter

    def connect(self) -> None:
        host, port = self._tunnel_host or self.host, self._tunnel_port or self.port
        context = self.contexts.context(Origin("https", host.strip("[]"), port).netloc)
        context.sslsocket_class = InterruptibleSSLSocket
        self.ssl_context, self.cert_reqs = context, context.verify_mode
        super().connect()
        # The user chose which certificates are not verified: urllib3 need not warn each time.
        self.is_verified = True


def _pools(contexts: TlsContexts, reach: Reach) -> dict[str, type[HTTPConnectionPool]]:
    class Plain(_Connecting):
        pass

    class Tls(_TlsConnection):
        pass

    class PlainPool(HTTPConnectionPool):
        ConnectionCls = Plain

    class TlsPool(HTTPSConnectionPool):
        ConnectionCls = Tls

    Tls.contexts = contexts
    Plain.reach = Tls.reach = reach
    return {"http": PlainPool, "https": TlsPool}


class InterruptibleAdapter(HTTPAdapter):
    """Makes a requests session use these sockets, directly and through an HTTP proxy."""

    def __init__(self, contexts: TlsContexts, reach: Reach) -> None:
        self._pools = _pools(contexts, reach)
        super().__init__(pool_connections=POOL_SIZE, pool_maxsize=POOL_SIZE)

    def init_poolmanager(self, *arguments: Any, **options: Any) -> None:
        """Create the pools, with our connections."""
        super().init_poolmanager(*arguments, **options)
        self.poolmanager.pool_classes_by_scheme = self._pools

    def proxy_manager_for(self, proxy: str, **options: Any) -> Any:
        """Return the pools for `proxy`, with our connections.

        Raises `RegistryError` for a proxy of another kind than HTTP: urllib3 would then not use our
        connections, which check addresses and certificates, and limit how long a server may take.
        """
        scheme = proxy.partition(":")[0].lower()
        if scheme not in ("http", "https"):
            raise RegistryError(
                f"cannot use the proxy of the environment: {scheme[:20]!r} is not supported, only "
                "http and https",
                hint="unset ALL_PROXY, HTTP_PROXY and HTTPS_PROXY, or set them to an HTTP proxy",
            )
        manager = super().proxy_manager_for(proxy, **options)
        manager.pool_classes_by_scheme = self._pools
        return manager

    def cert_verify(self, conn: Any, url: str, verify: Any, cert: Any) -> None:
        """Do nothing: `TlsContexts` decides which certificates to trust."""
