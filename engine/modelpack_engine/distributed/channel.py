"""The channel between rank 0 and its followers: messages, and both ends of the connections.

A message has a kind, a length, and a body of JSON, plain integers or safetensors. Nothing in it is
ever executed (no pickle), and an unexpected message raises `WireError`.
"""

from __future__ import annotations

import hmac
import importlib.metadata
import json
import logging
import queue
import secrets
import socket
import struct
import sys
import threading
import time
from array import array
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack, suppress
from enum import IntEnum
from itertools import chain
from typing import Any

import modelpack
from modelpack_engine.core.batch import Chunk, StepBatch
from modelpack_engine.errors import EngineError, ModelLoadError, OutOfMemoryError

#: The most bytes of a body: many times a step of 2048 rows with tables of a million tokens.
MAX_BODY = 1 << 28

_HEADER = struct.Struct("<BI")


class Kind(IntEnum):
    """The kind of a message.

    Bodies are JSON, except integers from STEP to WARM_UP, and safetensors of layers of adapters.
    """

    # Messages of a follower.
    HELLO = 1  # its rank and versions, once
    DONE = 2  # the result of a request
    REFUSED = 3  # a request failed; the follower continues
    FAILED = 4  # why the follower ends now
    # Messages of rank 0.
    LOAD = 16  # load the named model
    CONFIGURE = 17  # the engine's configuration; followers reply with the KV cache sizes that fit
    BUILD = 18  # the sizes of all ranks; followers reply once they can run steps
    STEP = 19
    RELEASE = 20  # sequences whose state is dropped
    SCRUB = 21  # blocks to be zeroed
    SCRUB_SLOTS = 22  # single tokens to be zeroed
    WARM_UP = 23  # shapes of steps to be compiled
    UNLOAD = 24
    BYE = 25
    ADAPTER_NORMS = 26  # what a layer's weights with an adapter are, for DoRA; with arrays
    ADAPTER_LAYER = 27  # the adapter's matrices for a layer
    ADAPTER = 28  # put the layers that came before into a slot, or free it


class WireError(EngineError):
    """A message is invalid or unexpected."""


def encode(kind: Kind, body: bytes | Mapping[str, Any] = b"") -> bytes:
    """Return a message as bytes."""
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    assert len(raw) <= MAX_BODY, f"a message of {len(raw)} bytes"
    return _HEADER.pack(kind, len(raw)) + raw


def receive(connection: socket.socket) -> tuple[Kind, bytes] | None:
    """Return the next message, or None at the end of the connection; raises `WireError`."""
    header = receive_exactly(connection, _HEADER.size)
    if header is None:
        return None
    number, length = _HEADER.unpack(header)
    if length > MAX_BODY:
        raise WireError(f"a message of {length} bytes, expected at most {MAX_BODY}")
    try:
        kind = Kind(number)
    except ValueError:
        raise WireError(f"a message of the unknown kind {number}") from None
    body = receive_exactly(connection, length)
    return None if body is None else (kind, body)


def receive_exactly(connection: socket.socket, length: int) -> bytes | None:
    """Return `length` bytes, or None if the connection ends before."""
    data = bytearray(length)
    view, got = memoryview(data), 0
    while got < length:
        count = connection.recv_into(view[got:])
        if not count:
            return None
        got += count
    return bytes(data)


def fields(body: bytes, **types: type) -> dict[str, Any]:
    """Return the fields of a JSON body that `types` names; raises `WireError` for another type.

    A bool is not accepted as an `int`. Other fields are ignored.
    """
    try:
        value = json.loads(body)
    except (ValueError, RecursionError):
        raise WireError("a message is not JSON") from None
    if not isinstance(value, dict):
        raise WireError(f"a message of {type(value).__name__}, expected an object")
    found = {}
    for name, kind in types.items():
        given = value.get(name)
        if not isinstance(given, kind) or (kind is int and isinstance(given, bool)):
            raise WireError(f"a message's {name} is {str(given)[:100]!r}, expected {kind.__name__}")
        found[name] = given
    return found


#: Fields of a batch that stay at rank 0: they are for sampling and for the host. A divided model
#: reads no pictures.
LEFT_OUT = frozenset(
    {
        "sample_seqs",
        "prompt_logprob_rows",
        "prompt_logprob_seqs",
        "table_width",
        "decode_snapshots",
        "windows",
        "rope_positions",
        "media_rows",
    }
)
#: Fields of a chunk that stay at rank 0: a divided model keeps no snapshots of prefixes, and reads
#: no pictures, whose tokens have spans.
LEFT_OUT_OF_CHUNKS = frozenset(
    {"snapshot", "snapshot_after", "snapshot_hash", "spans", "in_windows"}
)

_ITEM = 4


def pack_integers(numbers: Iterable[int]) -> bytes:
    """Return numbers as bytes."""
    packed = array("i", numbers)
    if sys.byteorder == "big":
        packed.byteswap()
    return packed.tobytes()


def unpack_integers(body: bytes) -> array[int]:
    """Return the numbers of a body; raises `WireError`."""
    if len(body) % _ITEM:
        raise WireError(f"a body of {len(body)} bytes is not a list of integers")
    numbers: array[int] = array("i")
    numbers.frombytes(body)
    if sys.byteorder == "big":
        numbers.byteswap()
    return numbers


def pack_step(batch: StepBatch, num_sampled: int) -> bytes:
    """Return a step as bytes. Its tables are as wide as on the device."""
    counts = (
        num_sampled,
        len(batch.token_ids),
        len(batch.from_previous),
        batch.num_decode,
        batch.decode_width,
        len(batch.decode_seq_ids),
        len(batch.sample_rows),
        len(batch.released),
        len(batch.chunks),
        len(batch.adapter_slots),
    )
    chunks = (
        (c.row, c.length, c.padded_length, c.kv_length, c.seq_id, len(table), *table)
        for c in batch.chunks
        for table in (c.block_table,)
    )
    return pack_integers(
        chain(
            counts,
            batch.token_ids,
            batch.positions,
            batch.slots,
            chain.from_iterable(batch.from_previous),
            chain.from_iterable(batch.padded_tables()),
            batch.decode_lengths,
            batch.decode_seq_ids,
            batch.sample_rows,
            batch.released,
            batch.adapter_slots,
            chain.from_iterable(chunks),
        )
    )


def unpack_step(body: bytes) -> tuple[StepBatch, int]:
    """Return a batch without its sequences, and how many of its sample rows get a token.

    Raises `WireError` unless `pack_step` packed it.
    """
    reader = _Reader(body)
    sampled, rows, from_previous, decode, width, decode_seqs, sample, released, chunks, adapters = (
        reader.counts(10)
    )
    if adapters not in (0, rows):
        raise WireError(f"a step with {rows} rows has adapters for {adapters}")
    if sampled > sample or decode > rows or decode_seqs > decode:
        raise WireError(f"a step with {rows} rows has {decode} decode rows and samples {sampled}")
    token_ids, positions, slots = (reader.take(rows) for _ in range(3))
    pairs = reader.take(2 * from_previous)
    tables = reader.take(decode * width)
    batch = StepBatch(
        token_ids=token_ids,
        positions=positions,
        slots=slots,
        from_previous=tuple(zip(pairs[::2], pairs[1::2], strict=True)),
        num_decode=decode,
        decode_tables=[tables[i * width : (i + 1) * width] for i in range(decode)],
        decode_lengths=reader.take(decode),
        decode_seq_ids=tuple(reader.take(decode_seqs)),
        sample_rows=tuple(reader.take(sample)),
        sample_seqs=(),
        released=tuple(reader.take(released)),
        adapter_slots=reader.take(adapters),
        chunks=tuple(reader.chunk(rows) for _ in range(chunks)),
    )
    reader.end()
    if any(not 0 <= row < rows for row in batch.sample_rows):
        raise WireError(f"a step of {rows} rows samples rows beyond them")
    return batch, sampled


class _Reader:
    """Reads the numbers of a body in order."""

    def __init__(self, body: bytes) -> None:
        self._numbers = unpack_integers(body)
        self._at = 0

    def take(self, count: int) -> list[int]:
        stop = self._at + count
        if stop > len(self._numbers):
            raise WireError(f"a step of {len(self._numbers)} numbers, expected {stop} or more")
        taken = self._numbers[self._at : stop].tolist()
        self._at = stop
        return taken

    def counts(self, count: int) -> list[int]:
        counts = self.take(count)
        if min(counts) < 0:
            raise WireError(f"a step with a count of {min(counts)}")
        return counts

    def chunk(self, rows: int) -> Chunk:
        row, length, padded, kv_length, seq_id, width = self.counts(6)
        if row + padded > rows or length > padded:
            raise WireError(f"a chunk of rows {row} to {row + padded}, in a step of {rows}")
        return Chunk(row, length, padded, kv_length, tuple(self.take(width)), seq_id)

    def end(self) -> None:
        if self._at != len(self._numbers):
            raise WireError(f"a step has {len(self._numbers) - self._at} numbers too many")


_log = logging.getLogger(__name__)

#: Bytes of the token that a follower has to send.
TOKEN_BYTES = 16
#: Keepalive probes: seconds of silence before the first, seconds between two, and their number.
_SILENCE, _INTERVAL, _ATTEMPTS = 5, 2, 3
#: Seconds that a rank may take to connect once the group has formed.
_CONNECTING = 60.0

#: Called once, from any thread, with the error that ended the group. It may end the process.
OnFailure = Callable[[EngineError], None]

# Errors that keep their class on the way to rank 0; any other is an EngineError there.
_ERRORS: dict[str, type[EngineError]] = {
    error.__name__: error for error in (ModelLoadError, OutOfMemoryError)
}


def versions() -> dict[str, str]:
    """Return the versions that have to be the same on all ranks."""
    return {"modelpack": modelpack.__version__} | {
        name: importlib.metadata.version(name) for name in ("mlx", "mlx-lm")
    }


class LeaderChannel:
    """Rank 0's end of the channel. `on_failure` is called once, if a follower ends or fails."""

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
            raise WireError("it did not send the right token")
        message = receive(connection)
        if message is None or message[0] is not Kind.HELLO:
            raise WireError("its first message is not HELLO")
        hello = fields(message[1], rank=int, versions=dict)
        rank: int = hello["rank"]
        if not 0 < rank < self.size or rank in self._connections:
            raise WireError(f"its rank is {rank}, expected another from 1 to {self.size - 1}")
        if hello["versions"] != versions():
            raise EngineError(
                f"rank {rank} has the versions {hello['versions']}, but rank 0 has {versions()}",
                hint="install the same versions on all machines",
            )
        return rank

    # Requests of rank 0, and the responses of followers

    def send(self, kind: Kind, body: bytes | Mapping[str, Any] = b"") -> None:
        """Send a message to every follower; raises `EngineError` once one has failed."""
        message = encode(kind, body)
        self._check()
        for rank, connection in self._connections.items():
            try:
                connection.sendall(message)
            except OSError as error:
                self.fail(EngineError(f"rank {rank} of {self.size} ended: {error}"))
                self._check()

    def send_integers(self, kind: Kind, numbers: Iterable[int]) -> None:
        """Send numbers to every follower."""
        self.send(kind, pack_integers(numbers))

    def gather(self, number: int, **types: type) -> list[dict[str, Any]]:
        """Return every follower's response to the request `number`, in the order of ranks.

        Raises the error of the first follower that refuses; drops responses to earlier requests.
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
                raise _error_of(rank, body)
            answers[rank] = fields(body, **types)
        return [answers[rank] for rank in sorted(answers)]

    def close(self) -> None:
        """Make the followers end, and close the listener."""
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
        """End the group, because a rank has ended or is out of step with the others."""
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

    # The thread of a connection

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
            self.fail(_error_of(rank, body))
        elif kind in (Kind.DONE, Kind.REFUSED):
            self._answers.put((rank, kind, body))
        else:
            raise WireError(f"a message of the unexpected kind {kind.name}")


class FollowerChannel:
    """A follower's end of the channel. `on_failure` is called once, if rank 0 ends without BYE."""

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
        """Return the next message of rank 0; BYE is the last."""
        return self._messages.get()

    def answer(self, number: int, **body: Any) -> None:
        """Report to rank 0 that a request is done."""
        self._send(Kind.DONE, {"number": number, **body})

    def refuse(self, number: int, error: Exception) -> None:
        """Report to rank 0 that a request failed, and why."""
        self._send(Kind.REFUSED, {"number": number, **_described(error)})

    def fail(self, error: Exception) -> None:
        """Report to rank 0 why this rank ends."""
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
    """Detect within seconds that the other machine is gone, and send messages without delay."""
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


def _error_of(rank: int, body: bytes) -> EngineError:
    error = fields(body, type=str, message=str, hint=str)
    kind = _ERRORS.get(error["type"], EngineError)
    return kind(f"rank {rank}: {error['message']}", hint=error["hint"] or None)
