"""Blobs read by ranges: the number of requests, and registries without ranges."""

from __future__ import annotations

import hashlib

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from modelpack.artifacts.descriptor import Descriptor
from modelpack.artifacts.digest import Digest
from modelpack.errors import (
    NotFoundError,
    RegistryError,
    RemoteUnavailableError,
    SizeMismatchError,
    UnsupportedError,
)
from modelpack.registry.blob_download import BLOCK
from tests.registry.faults import (
    answering,
    cut_after,
    ignoring_range,
    redirecting,
    replaced,
    shifted_range,
)
from tests.registry.faulty import FaultyRegistry
from tests.registry.sources import Client

BLOBS = "/blobs/sha256:"
CONTENT = b"".join(hashlib.sha256(str(i).encode()).digest() for i in range(BLOCK * 40 // 32)) + b"!"


@pytest.fixture
def blob(registry: FaultyRegistry) -> Descriptor:
    return registry.put_blob(CONTENT)


def test_a_few_bytes_cost_a_few_blocks(
    registry: FaultyRegistry, client: Client, blob: Descriptor
) -> None:
    with client.repository.open_file(blob) as file:
        assert file.read(10) == CONTENT[:10]
        assert file.read(20) == CONTENT[10:30]
        assert (file.bytes_fetched, file.requests) == (2 * BLOCK, 1)
        file.seek(-5, 2)
        assert file.read() == CONTENT[-5:]
        assert file.requests == 3  # they are in two blocks
        assert file.bytes_fetched < len(CONTENT) // 10
    ranges = [request.headers["range"] for request in registry.seen("GET", BLOBS)]
    assert ranges[0] == f"bytes=0-{2 * BLOCK - 1}"


def test_reading_on_asks_for_more_each_time(client: Client, blob: Descriptor) -> None:
    with client.repository.open_file(blob) as file:
        assert file.readall() == CONTENT
        assert file.bytes_fetched == len(CONTENT)
        assert file.requests <= 6


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.tuples(st.integers(0, len(CONTENT) + 9), st.integers(0, 3 * BLOCK)), max_size=4),
    st.booleans(),
)
def test_any_range_is_as_the_blob(
    registry: FaultyRegistry, client: Client, reads: list[tuple[int, int]], ranges: bool
) -> None:
    blob = registry.put_blob(CONTENT)
    registry.faults.clear()
    if not ranges:
        registry.faults.add("GET", BLOBS, ignoring_range, times=None)
    with client.repository.open_file(blob) as file:
        for offset, length in reads:
            file.seek(offset)
            read = bytearray()
            while len(read) < length and (part := file.read(length - len(read))):
                read += part
            assert bytes(read) == CONTENT[offset : offset + length]
        assert file.tell() == (reads[-1][0] + len(read) if reads else 0)


def test_a_registry_without_ranges_is_read_from_the_start(
    registry: FaultyRegistry, client: Client, blob: Descriptor
) -> None:
    registry.faults.add("GET", BLOBS, ignoring_range, times=None)
    with client.repository.open_file(blob) as file:
        assert file.read(10) == CONTENT[:10]
        file.seek(BLOCK * 3)
        assert file.read(10) == CONTENT[BLOCK * 3 : BLOCK * 3 + 10]
        assert file.bytes_fetched == BLOCK * 4
        file.seek(0)
        assert file.read(3) == CONTENT[:3]
    assert registry.count("GET", BLOBS) == 1


@pytest.mark.parametrize("ranges", [True, False])
def test_there_is_a_limit(
    registry: FaultyRegistry, client: Client, blob: Descriptor, ranges: bool
) -> None:
    if not ranges:
        registry.faults.add("GET", BLOBS, ignoring_range, times=None)
    with client.repository.open_file(blob, limit=4 * BLOCK) as file:
        with pytest.raises(UnsupportedError, match="takes more than"):
            file.readall()
        assert file.bytes_fetched <= 4 * BLOCK


def test_what_was_read_once_is_not_fetched_again(client: Client, blob: Descriptor) -> None:
    with client.repository.open_file(blob) as file:
        for _ in range(3):
            file.seek(7)
            assert file.read(9) == CONTENT[7:16]
        assert file.requests == 1


def test_a_cut_connection_is_tried_again(
    registry: FaultyRegistry, client: Client, blob: Descriptor
) -> None:
    registry.faults.add("GET", BLOBS, cut_after(1000), times=2)
    with client.repository.open_file(blob) as file:
        assert file.read(5000) == CONTENT[:5000]
        assert file.requests == 3
    registry.faults.add("GET", BLOBS, cut_after(1000), times=None)
    with client.repository.open_file(blob) as file, pytest.raises(RemoteUnavailableError):
        file.read(5000)


def test_a_redirect_to_storage(
    registry: FaultyRegistry, storage: FaultyRegistry, client: Client, blob: Descriptor
) -> None:
    storage.put_blob(CONTENT)
    registry.faults.add("GET", BLOBS, redirecting(storage), times=None)
    with client.repository.open_file(blob) as file:
        file.seek(BLOCK)
        assert file.read(4) == CONTENT[BLOCK : BLOCK + 4]
    assert storage.seen("GET", BLOBS)[0].headers["range"].startswith("bytes=")


@pytest.mark.parametrize(
    ("fault", "error"),
    [
        (shifted_range(1), RegistryError),
        (answering(416), SizeMismatchError),
        (answering(404), NotFoundError),
        (answering(403), RegistryError),
        (replaced(b"short"), RegistryError),
    ],
)
def test_answers_that_are_refused(
    registry: FaultyRegistry,
    client: Client,
    blob: Descriptor,
    fault: object,
    error: type[Exception],
) -> None:
    registry.faults.add("GET", BLOBS, fault, times=None)  # type: ignore[arg-type]
    with client.repository.open_file(blob) as file, pytest.raises(error):
        file.read(1)


@pytest.mark.parametrize("ranges", [True, False])
@pytest.mark.parametrize("size", [len(CONTENT) - 1, len(CONTENT) + 1])
def test_a_blob_of_another_size(
    registry: FaultyRegistry, client: Client, blob: Descriptor, size: int, ranges: bool
) -> None:
    if not ranges:
        registry.faults.add("GET", BLOBS, ignoring_range, times=None)
    wrong = Descriptor(blob.media_type, blob.digest, size)
    with client.repository.open_file(wrong) as file, pytest.raises(SizeMismatchError):
        file.read(1)


def test_edges(registry: FaultyRegistry, client: Client) -> None:
    empty = Descriptor("a/b", Digest.of(b""), 0)
    with client.repository.open_file(empty) as file:
        assert file.read() == b""
        assert file.requests == 0
        with pytest.raises(ValueError, match="before the start"):
            file.seek(-1)
    assert registry.requests == []
