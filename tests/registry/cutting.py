"""A TCP proxy that cuts connections on demand, for tests with real registries."""

from __future__ import annotations

import contextlib
import socket
import threading
from types import TracebackType

_SIZE = 64 * 1024


class CuttingProxy:
    """Forwards connections to `upstream`; cuts, once, the one that has sent `after` bytes.

    `uploaded` counts the bytes that clients sent.
    """

    def __init__(self, upstream: str, after: int) -> None:
        host, _, port = upstream.rpartition(":")
        self._upstream = (host, int(port))
        self._left: int | None = after
        self._lock = threading.Lock()
        self._sockets: list[socket.socket] = []
        self._threads: list[threading.Thread] = []
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.host = f"127.0.0.1:{self._listening.getsockname()[1]}"
        self.uploaded = 0

    @property
    def has_cut(self) -> bool:
        """Whether the connection was lost already."""
        return self._left is None

    def __enter__(self) -> CuttingProxy:
        self._start(self._accept)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for each in (self._listening, *self._sockets):
            _cut(each)
        for thread in self._threads:
            thread.join()
        for each in (self._listening, *self._sockets):
            each.close()

    def _start(self, target: object, *arguments: object) -> None:
        thread = threading.Thread(target=target, args=arguments)  # type: ignore[arg-type]
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listening.accept()
                server = socket.create_connection(self._upstream)
                self._sockets += [client, server]
                self._start(self._pass, client, server, True)
                self._start(self._pass, server, client, False)

    def _pass(self, origin: socket.socket, target: socket.socket, counts: bool) -> None:
        with contextlib.suppress(OSError):
            while data := origin.recv(_SIZE):
                if counts and self._is_too_much(len(data)):
                    break
                target.sendall(data)
        _cut(origin)
        _cut(target)
        origin.close()  # a reset, because of unread bytes: no side waits to send

    def _is_too_much(self, count: int) -> bool:
        with self._lock:
            self.uploaded += count
            if self._left is None:
                return False
            self._left -= count
            if self._left > 0:
                return False
            self._left = None
            return True


def _cut(end: socket.socket) -> None:
    with contextlib.suppress(OSError):
        end.shutdown(socket.SHUT_RDWR)
