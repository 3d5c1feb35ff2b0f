"""Blob downloads are complete and correct, or fail; numbers are those of the fault scenarios."""

from __future__ import annotations

import random
import time

import pytest

from modelpack.artifacts.descriptor import Descriptor
from modelpack.artifacts.digest import Digest
from modelpack.errors import (
    DigestMismatchError,
    NotFoundError,
    RegistryError,
    RemoteTimeoutError,
    RemoteUnavailableError,
    SizeMismatchError,
)
from modelpack.progress import Action
from modelpack.registry import Timeouts
from modelpack.storage import read_blob
from tests.registry import faults
from tests.registry.faulty import REPOSITORY, FaultyRegistry
from tests.registry.sources import Client, Connect, read_all

CONTENT = random.Random(2).randbytes(100_000)
BLOBS = "/blobs/sha256:"


def test_a_blob_is_read_whole_and_from_an_offset(registry: FaultyRegistry, client: Client) -> None:
    blob = registry.put_blob(CONTENT)
    assert read_all(client.repository, blob) == CONTENT
    assert read_all(client.repository, blob, 70_000) == CONTENT[70_000:]
    first, second = registry.seen("GET", BLOBS)
    assert "range" not in first.headers
    assert second.headers["range"] == "bytes=70000-"
    assert first.headers["accept-encoding"] == "identity"
    assert first.headers["user-agent"].startswith("modelpack/")


def test_an_empty_blob_and_the_end_of_a_blob(registry: FaultyRegistry, client: Client) -> None:
    assert read_all(client.repository, registry.put_blob(b"")) == b""
    blob = registry.put_blob(CONTENT)
    assert read_all(client.repository, blob, len(CONTENT)) == b""
    assert registry.count("GET", str(blob.digest)) == 0
    with pytest.raises(ValueError, match="outside"):
        client.repository.blob(blob).open(len(CONTENT) + 1)


def test_a_missing_blob_shows_when_it_is_opened(client: Client) -> None:
    missing = Descriptor("a/b", Digest.of(CONTENT), len(CONTENT))
    blob = client.repository.blob(missing)
    with pytest.raises(NotFoundError, match="BLOB_UNKNOWN") as caught:
        blob.open()
    assert caught.value.host == client.registry.host
    assert caught.value.status_code == 404
    assert client.sleeps == []


def test_connections_are_used_again(registry: FaultyRegistry, client: Client) -> None:
    blob = registry.put_blob(CONTENT)
    for _ in range(5):
        assert read_all(client.repository, blob) == CONTENT
    assert len(registry._server.connections) == 1


@pytest.mark.scenario(2)
def test_twenty_cuts_cost_nothing_but_requests(registry: FaultyRegistry, client: Client) -> None:
    blob = registry.put_blob(CONTENT)
    chance = random.Random(20)
    for _ in range(20):
        registry.faults.add("GET", BLOBS, faults.cut_after(chance.randrange(1, 4000)))
    assert read_all(client.repository, blob) == CONTENT
    assert registry.count("GET", BLOBS) == 21
    assert len(client.sleeps) == 20
    assert max(client.sleeps) == 0.25, "progress starts the count of failures anew"
    assert {report.action for report in client.reports} == {Action.RETRY}


@pytest.mark.scenario(2)
def test_cuts_without_progress_end(registry: FaultyRegistry, client: Client) -> None:
    blob = registry.put_blob(CONTENT)
    registry.faults.add("GET", BLOBS, faults.cut_after(5000))
    registry.faults.add("GET", BLOBS, faults.cut_after(0), times=None)
    with pytest.raises(RemoteUnavailableError, match="given up after 5 tries"):
        read_all(client.repository, blob)
    assert registry.count("GET", BLOBS) == 5
    assert client.sleeps == [0.25, 0.5, 1.0, 2.0]


@pytest.mark.scenario(3)
def test_a_short_blob_with_an_honest_length(registry: FaultyRegistry, client: Client) -> None:
    blob = registry.put_blob(CONTENT)
    registry.faults.add("GET", BLOBS, faults.shortened(1), times=None)
    with pytest.raises(SizeMismatchError, match="expected 100000 bytes, got 99999") as caught:
        read_all(client.repository, blob)
    assert (caught.value.expected, caught.value.got) == ("100000", "99999")
    assert registry.count("GET", BLOBS) == 1
    assert caught.value.exit_code == 5


@pytest.mark.parametrize("cut", [0, 10, 99_999])
@pytest.mark.scenario(3)
def test_a_short_blob_in_chunks(registry: FaultyRegistry, client: Client, cut: int) -> None:
    blob = Descriptor("a/b", registry.put_blob(CONTENT[:cut]).digest, len(CONTENT))
    registry.faults.add("GET", BLOBS, faults.chunked, times=None)
    with pytest.raises(SizeMismatchError, match=f"expected 100000 bytes, got {cut}"):
        read_all(client.repository, blob)


@pytest.mark.parametrize("fault", [faults.Exchange.send, faults.chunked])
@pytest.mark.scenario(3)
def test_a_blob_that_is_too_long(registry: FaultyRegistry, client: Client, fault: object) -> None:
    long = registry.put_blob(CONTENT + b"more")
    blob = Descriptor("a/b", long.digest, len(CONTENT))
    if fault is faults.chunked:
        registry.faults.add("GET", BLOBS, faults.chunked, times=None)
    received = bytearray()
    with pytest.raises(SizeMismatchError):
        read_all(client.repository, blob, into=received)
    assert received == CONTENT[: len(received)], "never more than the descriptor says"


def test_chunks_are_fine(registry: FaultyRegistry, client: Client) -> None:
    registry.faults.add("GET", BLOBS, faults.chunked, times=None)
    assert read_all(client.repository, registry.put_blob(CONTENT)) == CONTENT


@pytest.mark.scenario(4)
def test_a_flipped_bit_is_noticed(registry: FaultyRegistry, client: Client) -> None:
    blob = registry.put_blob(CONTENT)
    registry.faults.add("GET", BLOBS, faults.flipped_bit(50_000))
    with pytest.raises(DigestMismatchError) as caught:
        read_blob(client.repository, blob)
    assert caught.value.expected == str(blob.digest)
    assert read_blob(client.repository, blob) == CONTENT


@pytest.mark.scenario(5)
def test_a_server_without_ranges(registry: FaultyRegistry, client: Client) -> None:
    blob = registry.put_blob(CONTENT)
    registry.faults.add("GET", BLOBS, faults.cut_after(60_000))
    registry.faults.add("GET", BLOBS, faults.ignoring_range, times=None)
    assert read_all(client.repository, blob) == CONTENT
    assert read_all(client.repository, blob, 99_000) == CONTENT[99_000:]


@pytest.mark.parametrize("shift", [-1, 1, 5000])
@pytest.mark.scenario(6)
def test_a_range_that_starts_elsewhere(
    registry: FaultyRegistry, client: Client, shift: int
) -> None:
    blob = registry.put_blob(CONTENT)
    registry.faults.add("GET", BLOBS, faults.shifted_range(shift))
    assert read_all(client.repository, blob, 60_000) == CONTENT[60_000:]
    wrong, right = registry.seen("GET", BLOBS)
    assert wrong.headers["range"] == "bytes=60000-"
    assert "range" not in right.headers, "it starts again from the first byte"


@pytest.mark.parametrize(
    "content_range", ["", "bytes */100000", "bytes 60000-99999", "pages 60000-99999/100000"]
)
@pytest.mark.scenario(6)
def test_a_range_that_is_not_said(
    registry: FaultyRegistry, client: Client, content_range: str
) -> None:
    blob = registry.put_blob(CONTENT)
    registry.faults.add("GET", BLOBS, faults.with_headers(Content_Range=content_range))
    assert read_all(client.repository, blob, 60_000) == CONTENT[60_000:]


def test_a_range_of_a_blob_of_another_size(registry: FaultyRegistry, client: Client) -> None:
    blob = registry.put_blob(CONTENT)
    registry.faults.add("GET", BLOBS, faults.with_headers(Content_Range="bytes 60000-99999/100001"))
    with pytest.raises(SizeMismatchError, match="got 100001"):
        client.repository.blob(blob).open(60_000)


def test_a_range_past_the_end_of_a_shorter_blob(registry: FaultyRegistry, client: Client) -> None:
    """docker-registry announces a body with its 416 and sends none; the client does not wait."""
    blob = Descriptor("a/b", registry.put_blob(CONTENT[:10]).digest, len(CONTENT))
    with pytest.raises(SizeMismatchError):
        client.repository.blob(blob).open(50)


def test_a_part_of_a_range_is_followed_by_the_next(
    registry: FaultyRegistry, client: Client
) -> None:
    blob = registry.put_blob(CONTENT)

    def part(exchange: faults.Exchange) -> None:
        start = int(exchange.headers["range"].removeprefix("bytes=").rstrip("-"))
        exchange.headers["range"] = f"bytes={start}-{start + 9_999}"
        exchange.send(exchange.reply())

    registry.faults.add("GET", BLOBS, part, times=3)
    assert read_all(client.repository, blob, 60_000) == CONTENT[60_000:]
    assert registry.count("GET", BLOBS) == 4


@pytest.mark.scenario(16)
def test_storage_elsewhere_sees_no_authorization(
    registry: FaultyRegistry, storage: FaultyRegistry, connect: Connect
) -> None:
    from modelpack.registry import Credential, StaticCredentials
    from tests.registry.faulty_auth import BasicAuth

    registry.auth = BasicAuth("ada", "s3cret")
    blob = storage.put_blob(CONTENT)
    client = connect(
        registry.host, credentials=StaticCredentials({registry.host: Credential("ada", "s3cret")})
    )
    client.registry.ping()
    registry.faults.add("GET", BLOBS, faults.redirecting(storage), times=None)
    storage.faults.add("GET", BLOBS, faults.cut_after(30_000))
    assert read_all(client.repository, blob) == CONTENT
    assert all("authorization" in request.headers for request in registry.seen("GET", BLOBS))
    first, second = storage.seen("GET", BLOBS)
    assert "authorization" not in first.headers | second.headers
    assert second.headers["range"] == "bytes=30000-", "a redirect keeps the range"
    assert registry.count("GET", BLOBS) == 2, "each try asks the registry where to go"


def test_a_signature_that_ran_out_is_asked_for_again(
    registry: FaultyRegistry, storage: FaultyRegistry, client: Client
) -> None:
    blob = storage.put_blob(CONTENT)
    registry.faults.add("GET", BLOBS, faults.redirecting(storage), times=None)
    storage.faults.add("GET", BLOBS, faults.answering(403, b"<Error>expired</Error>"))
    assert read_all(client.repository, blob) == CONTENT
    assert registry.count("GET", BLOBS) == 2


@pytest.mark.parametrize("fault", [faults.silent, faults.silent_after(10)])
@pytest.mark.scenario(31)
def test_a_silent_server_ends_in_a_timeout(
    registry: FaultyRegistry, connect: Connect, fault: faults.Fault
) -> None:
    client = connect(registry.host, timeouts=Timeouts(connect=1, idle=0.2))
    blob = registry.put_blob(CONTENT)
    registry.faults.add("GET", BLOBS, fault, times=None)
    started = time.monotonic()
    with pytest.raises(RemoteTimeoutError, match="did not answer in time") as caught:
        read_all(client.repository, blob)
    assert caught.value.exit_code == 6
    assert time.monotonic() - started < 10


def test_a_server_that_drips_is_left(registry: FaultyRegistry, connect: Connect) -> None:
    client = connect(registry.host, timeouts=Timeouts(connect=1, idle=0.2, minimum_speed=1e6))
    blob = registry.put_blob(CONTENT)
    registry.faults.add("GET", BLOBS, faults.dripping())
    assert read_all(client.repository, blob) == CONTENT
    assert any("sends too slowly" in report.message for report in client.reports)


def test_blobs_of_two_repositories_are_apart(registry: FaultyRegistry, client: Client) -> None:
    blob = registry.put_blob(CONTENT, repository="other/model")
    with pytest.raises(RegistryError):
        read_all(client.repository, blob)
    other = client.registry.repository("other/model")
    assert read_all(other, blob) == CONTENT
    assert registry.blob(blob.digest, REPOSITORY) is None
