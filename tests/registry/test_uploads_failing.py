"""Uploads that fail, or must fail; the numbers are those of the fault scenarios."""

from __future__ import annotations

import os
import random
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest

from modelpack.artifacts.digest import Digest
from modelpack.errors import (
    DigestMismatchError,
    InterruptedTransferError,
    RegistryError,
    RemoteTimeoutError,
    RemoteUnavailableError,
    SizeMismatchError,
    SourceChangedError,
)
from modelpack.progress import Stop
from modelpack.registry import Timeouts
from modelpack.storage import Outcome, Watch
from tests.registry import faults
from tests.registry.faulty import FaultyRegistry
from tests.registry.faulty_content import Reply, error_reply
from tests.registry.sources import Client, Connect, Content

CONTENT = random.Random(28).randbytes(3_000_000)
UPLOADS = "/blobs/uploads/"


@pytest.mark.parametrize("after", [0, 1_500_000])
def test_a_broken_connection_costs_a_new_session(
    registry: FaultyRegistry, client: Client, after: int
) -> None:
    registry.faults.add("PUT", UPLOADS, faults.cut_upload(after))
    source = Content(CONTENT)
    assert client.repository.write_blob(source.descriptor, source, client.watch) is Outcome.WRITTEN
    assert source.opened == 2
    assert registry.blob(source.descriptor.digest) == CONTENT
    assert registry.open_uploads == [], "the first session was cancelled"
    assert client.sleeps == [0.25]


def test_an_answer_that_got_lost_is_noticed(registry: FaultyRegistry, client: Client) -> None:
    """The blob arrived but the 201 was lost: the client does not send the blob again."""

    def take_and_cut(exchange: faults.Exchange) -> None:
        exchange.reply()
        exchange.cut()

    registry.faults.add("PUT", UPLOADS, take_and_cut)
    assert client.write(CONTENT) is Outcome.EXISTED
    assert registry.count("PUT") == 1


def test_tries_come_to_an_end(registry: FaultyRegistry, client: Client) -> None:
    registry.faults.add("PUT", UPLOADS, faults.cut_upload(1000), times=None)
    with pytest.raises(RemoteUnavailableError, match="given up after 5 tries"):
        client.write(CONTENT)
    assert registry.count("PUT") == 5
    assert registry.open_uploads == []


@pytest.mark.parametrize(
    "answer",
    [
        faults.answering(404, b'{"errors":[{"code":"BLOB_UPLOAD_UNKNOWN"}]}'),
        faults.answering(416),
        faults.answering(503),
    ],
)
def test_a_lost_session_is_replaced(
    registry: FaultyRegistry, client: Client, answer: faults.Fault
) -> None:
    registry.faults.add("PUT", UPLOADS, answer)
    assert client.write(CONTENT) is Outcome.WRITTEN
    assert registry.count("POST") == 2


def test_a_refused_upload_is_not_retried(registry: FaultyRegistry, client: Client) -> None:
    body = b'{"errors":[{"code":"SIZE_INVALID","message":"too\\nbig"}]}'
    registry.faults.add("PUT", UPLOADS, faults.answering(413, body))
    with pytest.raises(RegistryError, match="413 SIZE_INVALID: too big") as caught:
        client.write(CONTENT)
    assert caught.value.status_code == 413
    assert registry.open_uploads == []
    assert client.sleeps == []


@pytest.mark.parametrize(
    ("status", "code", "puts"),
    [
        (400, "BLOB_UPLOAD_INVALID", 2),
        (404, "BLOB_UPLOAD_UNKNOWN", 2),
        (405, "UNSUPPORTED", 1),
        (415, "UNSUPPORTED", 1),
    ],
)
def test_content_that_a_put_may_not_have_goes_by_patch(
    registry: FaultyRegistry, client: Client, status: int, code: str, puts: int
) -> None:
    """Artifactory: the content in one PATCH, as docker sends it, and an empty PUT."""

    def refuse(exchange: faults.Exchange) -> None:
        reply = error_reply(status, code) if exchange.length else exchange.reply()
        exchange.receive()
        exchange.send(reply)

    registry.faults.add("PUT", UPLOADS, refuse, times=None)
    assert client.write(CONTENT) is Outcome.WRITTEN
    assert registry.blob(Digest.of(CONTENT)) == CONTENT
    assert registry.count("PUT") == puts + 1
    [patch] = registry.seen("PATCH")
    assert patch.body_size == len(CONTENT)
    assert "content-range" not in patch.headers
    assert client.write(CONTENT[:1000]) is Outcome.WRITTEN
    assert registry.count("PUT") == puts + 2, "the next blob goes by PATCH at once"
    assert client.write(b"") is Outcome.WRITTEN
    assert registry.open_uploads == []


@pytest.mark.parametrize("code", ["DIGEST_INVALID", "NAME_UNKNOWN", "SIZE_INVALID"])
def test_other_refusals_of_a_put_are_final(
    registry: FaultyRegistry, client: Client, code: str
) -> None:
    body = f'{{"errors":[{{"code":"{code}"}}]}}'.encode()
    registry.faults.add("PUT", UPLOADS, faults.answering(400, body), times=None)
    with pytest.raises(RegistryError, match=code):
        client.write(CONTENT)
    assert registry.count("PUT") == 1
    assert registry.count("PATCH") == 0
    assert registry.open_uploads == []


@pytest.mark.parametrize("method", ["PUT", "PATCH"])
def test_a_registry_that_accepts_no_content_is_an_error(
    registry: FaultyRegistry, client: Client, method: str
) -> None:
    for refused in ("PUT", method):
        registry.faults.add(refused, UPLOADS, faults.answering(405), times=None)
    with pytest.raises(RegistryError, match="405"):
        client.write(CONTENT)
    assert len([r for r in registry.requests if r.method in ("PUT", "PATCH")]) <= 4
    assert registry.open_uploads == []


@pytest.mark.parametrize("status", [200, 202, 204])
def test_a_success_that_is_not_created_is_looked_into(
    registry: FaultyRegistry, client: Client, status: int
) -> None:
    registry.faults.add("PUT", UPLOADS, faults.answering(status))
    with pytest.raises(RegistryError, match="the blob is not there"):
        client.write(CONTENT)

    def stored(exchange: faults.Exchange) -> None:
        exchange.reply()
        exchange.send(Reply(status))

    registry.faults.add("PUT", UPLOADS, stored)
    assert client.write(CONTENT) is Outcome.WRITTEN


@pytest.mark.scenario(30)
def test_a_source_with_other_bytes(registry: FaultyRegistry, client: Client) -> None:
    changed = bytearray(CONTENT)
    changed[2_999_999] ^= 1
    blob = Content(CONTENT).descriptor
    with pytest.raises(DigestMismatchError) as caught:
        client.repository.write_blob(blob, Content(bytes(changed)), client.watch)
    assert caught.value.expected == str(blob.digest)
    assert registry.blob(blob.digest) is None
    assert registry.open_uploads == []
    assert registry.count("PUT") == 1, "no second try"
    assert registry.seen("PUT")[0].body_size < len(CONTENT), "the last bytes are held back"


@pytest.mark.parametrize(
    ("content", "got"),
    [
        (CONTENT[:-1], "2999999"),
        (CONTENT[: 2 * 1024 * 1024], "2097152"),
        (b"", "0"),
        (CONTENT + b"x", "more than 3000000"),
    ],
)
@pytest.mark.scenario(30)
def test_a_source_of_another_length(
    registry: FaultyRegistry, client: Client, content: bytes, got: str
) -> None:
    with pytest.raises(SizeMismatchError) as caught:
        client.repository.write_blob(Content(CONTENT).descriptor, Content(content), client.watch)
    assert caught.value.got == got
    assert registry.open_uploads == []
    assert registry.content.blobs == {}


@pytest.mark.parametrize("error", [SourceChangedError("it changed"), OSError(5, "bad sector")])
@pytest.mark.scenario(30)
def test_what_the_source_raises_is_raised(
    registry: FaultyRegistry, client: Client, error: Exception
) -> None:
    class Broken:
        @contextmanager
        def open(self, offset: int = 0) -> Iterator[Any]:
            yield self

        def readinto(self, buffer: memoryview) -> int:
            raise error

    with pytest.raises(type(error)) as caught:
        client.repository.write_blob(Content(CONTENT).descriptor, Broken(), client.watch)
    assert caught.value is error
    assert registry.open_uploads == []
    assert client.sleeps == []


@pytest.mark.scenario(31)
def test_a_server_that_stops_reading(registry: FaultyRegistry, connect: Connect) -> None:
    client = connect(registry.host, timeouts=Timeouts(connect=1, idle=0.3, commit=0.3))
    registry.faults.add("PUT", UPLOADS, faults.stalled_upload(1000), times=None)
    big = bytes(30_000_000)  # more than socket buffers hold
    with pytest.raises(RemoteTimeoutError, match="did not answer in time"):
        client.write(big)


@pytest.mark.parametrize("by_client", [False, True])
@pytest.mark.parametrize("fault", [faults.silent, faults.stalled_upload(1000)])
@pytest.mark.scenario(35)
def test_a_stop_cancels_the_upload_within_two_seconds(
    registry: FaultyRegistry, client: Client, fault: faults.Fault, by_client: bool
) -> None:
    stop = client.stop if by_client else Stop()
    reached = threading.Event()
    stopped_at: list[float] = []

    def stall(exchange: faults.Exchange) -> None:
        reached.set()
        fault(exchange)

    def request_stop() -> None:
        reached.wait(10)
        stopped_at.append(time.monotonic())
        stop.request()

    registry.faults.add("PUT", UPLOADS, stall)
    source = Content(bytes(30_000_000))
    thread = threading.Thread(target=request_stop)
    thread.start()
    try:
        with pytest.raises(InterruptedTransferError) as caught:
            client.repository.write_blob(
                source.descriptor, source, Watch(client.reports.append, stop)
            )
    finally:
        thread.join()
    assert time.monotonic() - stopped_at[0] < 2
    assert caught.value.exit_code == 130
    assert registry.count("DELETE", UPLOADS) == 1
    assert registry.open_uploads == []


@pytest.mark.scenario(35)
def test_a_stop_ends_the_wait_for_a_retry(registry: FaultyRegistry, connect: Connect) -> None:
    from modelpack.registry import RetryPolicy

    client = connect(registry.host, retry=RetryPolicy(first_delay=30))
    registry.faults.add("POST", UPLOADS, faults.answering(503), times=None)
    timer = threading.Timer(0.1, client.stop.request)
    timer.start()
    started = time.monotonic()
    with pytest.raises(InterruptedTransferError):
        client.write(CONTENT)
    timer.join()
    assert time.monotonic() - started < 2


def test_many_at_once(registry: FaultyRegistry, client: Client) -> None:
    contents = [os.urandom(200_000) for _ in range(12)]
    with ThreadPoolExecutor(4) as executor:
        outcomes = list(executor.map(lambda content: client.write(content), contents))
    assert set(outcomes) == {Outcome.WRITTEN}
    assert all(registry.blob(Digest.of(content)) == content for content in contents)
