"""Parts of one blob over several connections."""

from __future__ import annotations

import random
import signal
import sys
import threading
import time
from types import CodeType, FrameType

import pytest

from modelpack.errors import (
    InterruptedTransferError,
    NotFoundError,
    RemoteUnavailableError,
    SizeMismatchError,
)
from modelpack.progress import RunningTasks, Stop
from modelpack.registry import BlobOptions, Credential, RateLimit, StaticCredentials
from modelpack.registry.blob_download import RemoteBlob, SegmentFetch
from modelpack.storage import SegmentedSource, SegmentsRefused
from tests.registry import faults
from tests.registry.faulty import FaultyRegistry
from tests.registry.faulty_auth import BasicAuth
from tests.registry.sources import Client, Connect
from tests.scenarios.processes import wait_until

CONTENT = random.Random(5).randbytes(1_000_000)
BLOBS = "/blobs/sha256:"
SEGMENTS = [(start, min(start + 90_000, 1_000_000)) for start in range(100_000, 1_000_000, 90_000)]


class Sink:
    """A sink that keeps the bytes and counts them."""

    def __init__(self) -> None:
        self.content = bytearray(len(CONTENT))
        self.count = 0
        self.lock = threading.Lock()
        self.threads: set[str] = set()

    def write(self, offset: int, view: memoryview) -> None:
        with self.lock:
            self.content[offset : offset + len(view)] = view
            self.count += len(view)
            self.threads.add(threading.current_thread().name)


def fetch(client: Client, blob: object, stop: Stop | None = None) -> Sink:
    source = client.repository.blob(blob)  # type: ignore[arg-type]
    assert isinstance(source, SegmentedSource)
    sink = Sink()
    source.fetch_segments(SEGMENTS, sink, stop or client.stop)
    assert bytes(sink.content[100_000:]) == CONTENT[100_000:]
    assert sink.count == 900_000
    return sink


def asked(registry: FaultyRegistry) -> list[str]:
    return [request.headers["range"] for request in registry.seen("GET", BLOBS)]


def test_each_segment_is_a_range(registry: FaultyRegistry, client: Client) -> None:
    fetch(client, registry.put_blob(CONTENT))
    assert sorted(asked(registry)) == sorted(f"bytes={a}-{b - 1}" for a, b in SEGMENTS)


def test_no_more_connections_than_allowed_for_all_blobs(
    registry: FaultyRegistry, connect: Connect
) -> None:
    """Two blobs at a time have a connection each, and share the others."""
    client = connect(registry.host, blobs=BlobOptions(connections=3))
    blob = registry.put_blob(CONTENT)
    busy, most, lock = 0, 0, threading.Lock()

    def counted(exchange: faults.Exchange) -> None:
        nonlocal busy, most
        with lock:
            busy += 1
            most = max(most, busy)
        reply = exchange.reply()
        exchange.registry.closing.wait(0.02)
        with lock:
            busy -= 1
        exchange.send(reply)

    registry.faults.add("GET", BLOBS, counted, times=None)
    threads = [threading.Thread(target=fetch, args=(client, blob)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(asked(registry)) == 2 * len(SEGMENTS)
    assert 2 < most <= 4


@pytest.mark.parametrize(
    "blobs", [BlobOptions(connections=1), BlobOptions(rate=RateLimit(1e9))], ids=["one", "rate"]
)
def test_one_connection_where_more_help_nobody(
    registry: FaultyRegistry, connect: Connect, blobs: BlobOptions
) -> None:
    client = connect(registry.host, blobs=blobs)
    blob = registry.put_blob(CONTENT)
    source = client.repository.blob(blob)
    assert isinstance(source, RemoteBlob)
    assert source.connections == 1
    assert fetch(client, blob).threads == {threading.current_thread().name}


def test_cuts_cost_the_rest_of_a_segment(registry: FaultyRegistry, client: Client) -> None:
    chance = random.Random(6)
    for _ in range(15):
        registry.faults.add("GET", BLOBS, faults.cut_after(chance.randrange(1, 20_000)))
    fetch(client, registry.put_blob(CONTENT))
    assert len(asked(registry)) == len(SEGMENTS) + 15


@pytest.mark.parametrize(
    "fault", [faults.ignoring_range, faults.shifted_range(1)], ids=["whole", "elsewhere"]
)
def test_a_registry_without_ranges_is_asked_once(
    registry: FaultyRegistry, client: Client, fault: faults.Fault
) -> None:
    registry.faults.add("GET", BLOBS, fault, times=None)
    with pytest.raises(SegmentsRefused):
        fetch(client, registry.put_blob(CONTENT))
    assert registry.count("GET", BLOBS) == 1


def test_a_failure_ends_all(registry: FaultyRegistry, client: Client) -> None:
    """A failure does not wait for threads whose bytes never arrive."""
    blob = registry.put_blob(CONTENT)
    last = f"bytes={SEGMENTS[2][0]}-"

    def fail(exchange: faults.Exchange) -> None:
        if exchange.headers["range"].startswith(last):
            exchange.send(exchange.registry.content.answer(exchange).__class__(404))
        elif exchange.headers["range"].startswith(f"bytes={SEGMENTS[1][0]}-"):
            faults.silent_after(5)(exchange)
        else:
            exchange.send(exchange.reply())

    registry.faults.add("GET", BLOBS, fail, times=None)
    before, started = threading.active_count(), time.monotonic()
    with pytest.raises(NotFoundError):
        fetch(client, blob)
    assert time.monotonic() - started < 20, "the idle time is a minute"
    connections = registry._server.connections  # each has a thread of the server until it ends
    wait_until(lambda: threading.active_count() <= before + len(connections), "threads to end", 10)


def test_the_end_of_tries_ends_all(registry: FaultyRegistry, client: Client) -> None:
    registry.faults.add("GET", BLOBS, faults.cut_after(0), times=None)
    with pytest.raises(RemoteUnavailableError, match="given up after 5 tries"):
        fetch(client, registry.put_blob(CONTENT))


def test_a_blob_of_another_size(registry: FaultyRegistry, client: Client) -> None:
    from dataclasses import replace

    blob = replace(registry.put_blob(CONTENT + b"more"), size=len(CONTENT))
    with pytest.raises(SizeMismatchError, match="got 1000004"):
        fetch(client, blob)


def test_a_stop_ends_all_within_two_seconds(registry: FaultyRegistry, client: Client) -> None:
    blob = registry.put_blob(CONTENT)
    stop = Stop()
    waiting = threading.Barrier(4)

    def stall(exchange: faults.Exchange) -> None:
        exchange.send_head(206, {
            "Content-Length": "90000",
            "Content-Range": exchange.headers["range"].replace("bytes=", "bytes ") + "/1000000",
        })  # fmt: skip
        exchange.write(b"")
        if waiting.wait(30) == 0:
            stop.request()
        exchange.keep_silent()

    registry.faults.add("GET", BLOBS, stall, times=None)
    ended: list[float] = []

    def run() -> None:
        with pytest.raises(InterruptedTransferError):
            fetch(client, blob, stop)
        ended.append(time.monotonic())

    thread = threading.Thread(target=run)
    thread.start()
    while not stop.is_requested():
        thread.join(0.01)
    requested = time.monotonic()
    thread.join(10)
    assert ended[0] - requested < 2


def running(code: CodeType) -> set[int]:
    """Return the threads that run `code`, or what it has called."""
    found = set()
    for thread, frame in sys._current_frames().items():
        called: FrameType | None = frame
        while called is not None:
            if called.f_code is code:
                found.add(thread)
            called = called.f_back
    return found


@pytest.mark.usefixtures("interrupts")
def test_an_interrupt_that_another_thread_receives_ends_all(
    registry: FaultyRegistry, client: Client
) -> None:
    """The system may deliver Ctrl-C to any thread, while the main thread waits for a segment."""
    blob = registry.put_blob(CONTENT)
    main, asked = threading.get_ident(), threading.Event()

    def interrupt(exchange: faults.Exchange) -> None:
        reply = exchange.reply()
        exchange.send_head(reply.status, {**reply.headers, "Content-Length": str(len(reply.body))})
        exchange.write(b"")
        if exchange.headers["range"].startswith(f"bytes={SEGMENTS[0][0]}-"):
            assert asked.wait(20), "a second thread asks for the second segment"
            exchange.write(reply.body)
        else:
            asked.set()
            wait_until(lambda: main in running(RunningTasks.wait.__code__), "the main thread")
            signal.pthread_kill(threading.get_ident(), signal.SIGINT)
            exchange.keep_silent()

    registry.faults.add("GET", BLOBS, interrupt, times=None)
    source = client.repository.blob(blob)
    assert isinstance(source, SegmentedSource)
    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        source.fetch_segments(SEGMENTS[:2], Sink(), client.stop)
    assert not running(SegmentFetch._fetch.__code__)
    assert time.monotonic() - started < 20, "the registry is silent for a minute"


@pytest.mark.scenario(16)
def test_addresses_that_run_out_are_asked_for_again(
    registry: FaultyRegistry, storage: FaultyRegistry, connect: Connect
) -> None:
    """Presigned URLs expire after three requests; storages report that in four ways."""
    registry.auth = BasicAuth("ada", "s3cret")
    ada = StaticCredentials({registry.host: Credential("ada", "s3cret")})
    client = connect(registry.host, credentials=ada)
    blob = storage.put_blob(CONTENT)
    client.registry.ping()
    registry.faults.add("GET", BLOBS, faults.redirecting(storage), times=None)
    for status in (400, 401, 403, 410):
        for _ in range(2):
            storage.faults.add("GET", BLOBS, lambda exchange: exchange.send(exchange.reply()))
        storage.faults.add("GET", BLOBS, faults.answering(status, b"<Error>expired</Error>"))
    fetch(client, blob)
    assert storage.count("GET", BLOBS) == registry.count("GET", BLOBS) == len(SEGMENTS) + 4
    assert all("authorization" not in request.headers for request in storage.requests)
    assert all("range" in request.headers for request in storage.requests)


def test_etags_that_differ_do_not_matter(registry: FaultyRegistry, client: Client) -> None:
    """Replicas of a storage have different ETags: only the digest at the end counts."""
    for number in range(20):
        registry.faults.add("GET", BLOBS, faults.with_headers(ETag=f'"{number}"'))
    fetch(client, registry.put_blob(CONTENT))
    assert all("if-range" not in request.headers for request in registry.seen("GET", BLOBS))
