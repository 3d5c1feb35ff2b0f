"""The channel between ranks: TCP, rank 0 listens and every follower has a connection to it.

Whoever connects has to know a token, which rank 0 hands out inside MLX's group. A thread for each
connection reads it, so that the end of a process is noticed at once, whatever the others are doing:
a rank that waits for another inside MLX waits for ever.
"""

from __future__ import annotations

import hmac
import importlib.metadata
import logging
import queue
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack, suppress
from typing import Any

import modelpack
from modelpack_engine.errors import EngineError, ModelLoadError, OutOfMemoryError
from modelpack_engine.parallel.steps import pack_integers
from modelpack_engine.parallel.wire import (
    Kind,
    WireError,
    encode,
    fields,
    receive,
    receive_exactly,
)

_log = logging.getLogger(__name__)

#: Bytes of the token.
TOKEN_BYTES = 16
#: Seconds until the machine of a silent connection counts as gone: the system asks it by itself.
_SILENCE, _INTERVAL, _ATTEMPTS = 5, 2, 3
#: Seconds that a rank may take to connect once the group has formed.
_CONNECTING = 60.0

#: Called once, from any thread, with what ended the group. Does not return where a rank has to end.
OnFailure = Callable[[EngineError], None]

# Errors that keep their class on the way to rank 0; any other is an EngineError there.
_ERRORS: dict[str, type[EngineError]] = {
    error.__name__: error for error in (ModelLoadError, OutOfMemoryError)
}


def versions() -> dict[str, str]:
    """Return what has to be the same on all ranks."""
    return {"modelpack": modelpack.__version__} | {
        name: importlib.metadata.version(name) for name in ("mlx", "mlx-lm")
    }


class LeaderChannel:
    """Rank 0's end. `on_failure` hears of a follower that ended or failed, once."""

    def __init__(self, size: int, host: str, on_failure: OnFailure) -> None:
        self.size = size
        self.token = secrets.token_bytes(TOKEN_BYTES)
        self._on_failure = on_failure
        self._connections: dict[int, socket.socket] = {}
        self._answers: queue.SimpleQueue[tuple[int, Kind, bytes]] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._failure: EngineError | None = None
        self._is_closing = False
        try:
            self._listener = socket.create_server((host, 0), backlog=size)
        except OSError as error:
            raise EngineError(
                f"rank 0 cannot listen on {host!r} for the other ranks: {error}",
                hint="set MODELPACK_CHANNEL_HOST to an address of rank 0 that the others reach",
            ) from error
        self.address: tuple[str, int] = (host, self._listener.getsockname()[1])

    def accept(self, timeout: float = _CONNECTING) -> None:
        """Wait until every follower has connected; raises `EngineError` if one does not."""
        deadline = time.monotonic() + timeout
        with self._listener, ExitStack() as accepted:
            while len(self._connections) < self.size - 1:
                self._listener.settimeout(max(0.01, deadline - time.monotonic()))
                try:
                    connection, peer = self._listener.accept()
                except TimeoutError:
                    missing = sorted(set(range(1, self.size)) - set(self._connections))
                    raise EngineError(
                        f"ranks {missing} did not connect to {self.address} in {timeout:.0f} s"
                    ) from None
                connection.settimeout(max(0.01, deadline - time.monotonic()))
                try:
                    rank = self._greet(connection)
                except (OSError, WireError) as error:
                    _log.warning("a connection from %s was refused: %s", peer, error)
                    connection.close()
                    continue
                except EngineError:
                    connection.close()
                    raise
                connection.settimeout(None)
                keep_watch(connection)
                self._connections[rank] = accepted.enter_context(connection)
            accepted.pop_all()
        for rank, connection in self._connections.items():
            _spawn(self._read, rank, connection)

    def _greet(self, connection: socket.socket) -> int:
        token = receive_exactly(connection, TOKEN_BYTES)
        if token is None or not hmac.compare_digest(token, self.token):
            raise WireError("it does not know the token")
        message = receive(connection)
        if message is None or message[0] is not Kind.HELLO:
            raise WireError("it did not say which rank it is")
        hello = fields(message[1], rank=int, versions=dict)
        rank: int = hello["rank"]
        if not 0 < rank < self.size or rank in self._connections:
            raise WireError(f"it is rank {rank}, expected another of 1 to {self.size - 1}")
        if hello["versions"] != versions():
            raise EngineError(
                f"rank {rank} has {hello['versions']}, and rank 0 {versions()}",
                hint="install the same versions on all machines",
            )
        return rank

    # What rank 0 says and hears.

    def send(self, kind: Kind, body: bytes | Mapping[str, Any] = b"") -> None:
        """Tell every follower; raises `EngineError` once one has failed."""
        message = encode(kind, body)
        self._check()
        for rank, connection in self._connections.items():
            try:
                connection.sendall(message)
            except OSError as error:
                self.fail(EngineError(f"rank {rank} of {self.size} ended: {error}"))
                self._check()

    def send_integers(self, kind: Kind, numbers: Iterable[int]) -> None:
        """Tell every follower numbers."""
        self.send(kind, pack_integers(numbers))

    def gather(self, number: int, **types: type) -> list[dict[str, Any]]:
        """Return every follower's answer to the question `number`, in the order of ranks.

        Raises what the first that refuses has to say; answers to earlier questions are dropped.
        """
        answers: dict[int, dict[str, Any]] = {}
        while len(answers) < self.size - 1:
            self._check()
            try:
                rank, kind, body = self._answers.get(timeout=0.5)
            except queue.Empty:
                continue
            if fields(body, number=int)["number"] != number:
                continue
            if kind is Kind.REFUSED:
                raise _told(rank, body)
            answers[rank] = fields(body, **types)
        return [answers[rank] for rank in sorted(answers)]

    def close(self) -> None:
        """Let the followers end."""
        with self._lock:
            if self._is_closing:
                return
            self._is_closing = True
        for connection in self._connections.values():
            with suppress(OSError):  # it has ended already
                connection.sendall(encode(Kind.BYE))
                connection.shutdown(socket.SHUT_WR)
        self._listener.close()

    def fail(self, error: EngineError) -> None:
        """Give the group up: a rank has ended, or is out of step with the others."""
        with self._lock:
            if self._is_closing or self._failure is not None:
                return
            self._failure = error
        self._on_failure(error)
        for connection in self._connections.values():
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def _check(self) -> None:
        if self._failure is not None:
            raise self._failure

    # The thread of a connection.

    def _read(self, rank: int, connection: socket.socket) -> None:
        try:
            with connection:
                while (message := receive(connection)) is not None:
                    self._take(rank, *message)
            why = "its connection was closed: it was killed, or crashed"
        except (OSError, WireError) as error:
            why = str(error)
        self.fail(EngineError(f"rank {rank} of {self.size} ended: {why}"))

    def _take(self, rank: int, kind: Kind, body: bytes) -> None:
        if kind is Kind.FAILED:
            self.fail(_told(rank, body))
        elif kind in (Kind.DONE, Kind.REFUSED):
            self._answers.put((rank, kind, body))
        else:
            raise WireError(f"a message of the kind {kind.name}")


class FollowerChannel:
    """A follower's end. `on_failure` hears that rank 0 ended without a word, once."""

    def __init__(
        self, rank: int, address: tuple[str, int], token: bytes, on_failure: OnFailure
    ) -> None:
        self.rank = rank
        self._on_failure = on_failure
        self._messages: queue.SimpleQueue[tuple[Kind, bytes]] = queue.SimpleQueue()
        try:
            self._connection = socket.create_connection(address, timeout=_CONNECTING)
        except OSError as error:
            raise EngineError(
                f"rank {rank} cannot reach rank 0 at {address}: {error}",
                hint="set MODELPACK_CHANNEL_HOST to an address of rank 0 that the others reach",
            ) from error
        self._connection.settimeout(None)
        keep_watch(self._connection)
        hello = encode(Kind.HELLO, {"rank": rank, "versions": versions()})
        self._connection.sendall(token + hello)
        _spawn(self._read)

    def receive(self) -> tuple[Kind, bytes]:
        """Return what rank 0 says next; BYE is the last."""
        return self._messages.get()

    def answer(self, number: int, **body: Any) -> None:
        """Tell rank 0 that what it asked for is done."""
        self._send(Kind.DONE, {"number": number, **body})

    def refuse(self, number: int, error: Exception) -> None:
        """Tell rank 0 that it cannot be done, and why."""
        self._send(Kind.REFUSED, {"number": number, **_described(error)})

    def fail(self, error: Exception) -> None:
        """Tell rank 0 why this rank ends."""
        self._send(Kind.FAILED, _described(error))

    def _send(self, kind: Kind, body: Mapping[str, Any]) -> None:
        try:
            self._connection.sendall(encode(kind, body))
        except OSError as error:
            self._on_failure(EngineError(f"rank 0 ended: {error}"))

    def _read(self) -> None:
        try:
            with self._connection as connection:
                while (message := receive(connection)) is not None:
                    self._messages.put(message)
                    if message[0] is Kind.BYE:
                        return
            why = "its connection was closed"
        except (OSError, WireError) as error:
            why = str(error)
        self._on_failure(EngineError(f"rank 0 ended: {why}"))


def keep_watch(connection: socket.socket) -> None:
    """Have the system notice within seconds that the other machine is gone, and send at once."""
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (
        ("TCP_KEEPIDLE", _SILENCE),
        ("TCP_KEEPALIVE", _SILENCE),  # macOS's name for it
        ("TCP_KEEPINTVL", _INTERVAL),
        ("TCP_KEEPCNT", _ATTEMPTS),
    ):
        option = getattr(socket, name, None)
        if option is not None:
            connection.setsockopt(socket.IPPROTO_TCP, option, value)


def _spawn(work: Callable[..., None], *args: Any) -> None:
    threading.Thread(target=work, args=args, name="modelpack-ranks", daemon=True).start()


def _described(error: Exception) -> dict[str, Any]:
    text = str(error) or type(error).__name__
    hint = getattr(error, "hint", None)
    return {"type": type(error).__name__, "message": text, "hint": hint or ""}


def _told(rank: int, body: bytes) -> EngineError:
    said = fields(body, type=str, message=str, hint=str)
    kind = _ERRORS.get(said["type"], EngineError)
    return kind(f"rank {rank}: {said['message']}", hint=said["hint"] or None)
