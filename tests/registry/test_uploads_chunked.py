"""Uploads in chunks, if the caller or the registry asks for chunks."""

from __future__ import annotations

import random

import pytest

from modelpack.artifacts.digest import Digest
from modelpack.errors import DeniedError, RegistryError, RemoteUnavailableError
from modelpack.registry import BlobOptions
from modelpack.storage import Outcome
from tests.registry import faults
from tests.registry.faulty import FaultyRegistry
from tests.registry.faulty_content import error_reply
from tests.registry.sources import Client, Connect, Content

CONTENT = random.Random(29).randbytes(3_000_000)
UPLOADS = "/blobs/uploads/"
MILLION = BlobOptions(chunk_size=1_000_000)


def sizes(registry: FaultyRegistry, method: str) -> list[int]:
    return [request.body_size for request in registry.seen(method, UPLOADS)]


@pytest.fixture
def chunking(registry: FaultyRegistry, connect: Connect) -> Client:
    return connect(registry.host, blobs=MILLION)


@pytest.mark.parametrize(
    ("size", "chunks", "last"),
    [
        (3_000_000, [1_000_000] * 2, 1_000_000),
        (2_000_001, [1_000_000] * 2, 1),
        (1_000_000, [], 1_000_000),
        (5, [], 5),
        (0, [], 0),
    ],
)
def test_chunks_that_were_asked_for(
    registry: FaultyRegistry, chunking: Client, size: int, chunks: list[int], last: int
) -> None:
    source = Content(CONTENT[:size])
    written = chunking.repository.write_blob(source.descriptor, source, chunking.watch)
    assert written is Outcome.WRITTEN
    assert registry.blob(source.descriptor.digest) == CONTENT[:size]
    assert sizes(registry, "PATCH") == chunks
    assert sizes(registry, "PUT") == [last]
    assert source.opened == 1, "one chunk after the other from one reading"
    ranges = [request.headers["content-range"] for request in registry.seen("PATCH")]
    assert ranges == [f"{n * 1_000_000}-{(n + 1) * 1_000_000 - 1}" for n in range(len(chunks))]


@pytest.mark.parametrize(
    ("asked", "minimum", "sent"),
    [
        (None, "800000", []),  # larger than the blob: the client's own choice
        (500_000, "800000", [800_000] * 3),
        (1_000_000, "800000", [1_000_000] * 2),
        (None, "nonsense", []),
        (None, "-5", []),
    ],
)
def test_chunks_that_the_registry_wants(
    registry: FaultyRegistry, connect: Connect, asked: int | None, minimum: str, sent: list[int]
) -> None:
    client = connect(registry.host, blobs=BlobOptions(chunk_size=asked))
    registry.faults.add("POST", UPLOADS, faults.with_headers(OCI_Chunk_Min_Length=minimum))
    assert client.write(CONTENT) is Outcome.WRITTEN
    assert sizes(registry, "PATCH") == sent


def test_a_large_blob_goes_in_chunks_where_the_registry_says_how_large_they_are(
    registry: FaultyRegistry, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("modelpack.registry.blob_upload._CHUNK", 1_500_000)
    registry.faults.add("POST", UPLOADS, faults.with_headers(OCI_Chunk_Min_Length="1000"))
    assert client.write(CONTENT) is Outcome.WRITTEN
    assert sizes(registry, "PATCH") == [1_500_000]


@pytest.mark.scenario(29)
def test_a_cut_inside_the_third_chunk(registry: FaultyRegistry, chunking: Client) -> None:
    for _ in range(2):
        registry.faults.add("PATCH", UPLOADS, lambda exchange: exchange.send(exchange.reply()))
    registry.faults.add("PUT", UPLOADS, faults.kept_upload(400_000))
    assert chunking.write(CONTENT) is Outcome.WRITTEN
    assert registry.blob(Digest.of(CONTENT)) == CONTENT
    assert sizes(registry, "PUT") == [400_000, 600_000]
    assert registry.count("POST") == 1


def test_a_cut_that_keeps_nothing_of_the_chunk(registry: FaultyRegistry, chunking: Client) -> None:
    registry.faults.add("PATCH", UPLOADS, lambda exchange: exchange.send(exchange.reply()))
    registry.faults.add("PATCH", UPLOADS, faults.cut_upload(400_000))
    assert chunking.write(CONTENT) is Outcome.WRITTEN
    assert sizes(registry, "PATCH") == [1_000_000, 400_000, 1_000_000]
    assert registry.count("POST") == 1


def test_a_created_for_a_chunk_is_as_good_as_accepted(
    registry: FaultyRegistry, chunking: Client
) -> None:
    from dataclasses import replace

    created = faults.changed(lambda reply: replace(reply, status=201))
    registry.faults.add("PATCH", UPLOADS, created, times=None)
    assert chunking.write(CONTENT) is Outcome.WRITTEN
    assert sizes(registry, "PATCH") == [1_000_000] * 2


@pytest.mark.parametrize(
    "answer",
    [
        faults.with_headers(Range="0-0"),
        faults.with_headers(Range="0-524287"),
        faults.answering(405),
        faults.answering(413),
        faults.answering(400, b'{"errors":[{"code":"UNSUPPORTED"}]}'),
    ],
    ids=["nothing is kept", "some is kept", "not allowed", "too large", "unsupported"],
)
def test_a_registry_that_cannot_do_chunks_gets_the_blob_in_one_piece(
    registry: FaultyRegistry, chunking: Client, answer: faults.Fault
) -> None:
    registry.faults.add("PATCH", UPLOADS, answer, times=None)
    assert chunking.write(CONTENT) is Outcome.WRITTEN
    assert registry.blob(Digest.of(CONTENT)) == CONTENT
    assert registry.count("PATCH") == 1
    assert sizes(registry, "PUT") == [3_000_000]
    assert registry.open_uploads == []


def test_chunks_that_are_out_of_order_for_ever_end(
    registry: FaultyRegistry, chunking: Client
) -> None:
    """No loop on 416: the client asks for the offset twice, then uploads in one request."""
    registry.faults.add("PATCH", UPLOADS, faults.answering(416), times=None)
    assert chunking.write(CONTENT) is Outcome.WRITTEN
    assert registry.count("PATCH") == 2
    assert sizes(registry, "PUT") == [3_000_000]


def test_a_session_that_is_lost_after_each_first_chunk_ends(
    registry: FaultyRegistry, chunking: Client
) -> None:
    def lose_it_at_the_second(exchange: faults.Exchange) -> None:
        reply = exchange.reply()
        if not exchange.headers["content-range"].startswith("0-"):
            registry.content.sessions.clear()
            endless = len(sizes(registry, "PATCH")) > 100
            reply = error_reply(403, "DENIED") if endless else error_reply(503, "UNAVAILABLE")
        exchange.send(reply)

    registry.faults.add("PATCH", UPLOADS, lose_it_at_the_second, times=None)
    source = Content(CONTENT)
    with pytest.raises(RemoteUnavailableError, match="given up after"):
        chunking.repository.write_blob(source.descriptor, source, chunking.watch)
    assert len(sizes(registry, "PATCH")) <= 2 * 6


def test_what_is_forbidden_is_not_tried_again(registry: FaultyRegistry, chunking: Client) -> None:
    registry.faults.add("PATCH", UPLOADS, faults.answering(403), times=None)
    with pytest.raises(DeniedError):
        chunking.write(CONTENT)
    assert registry.count("PATCH") == 1
    assert registry.open_uploads == []


def test_what_is_refused_in_one_piece_too_is_an_error(
    registry: FaultyRegistry, chunking: Client
) -> None:
    for method in ("PATCH", "PUT"):
        registry.faults.add(method, UPLOADS, faults.answering(413), times=None)
    with pytest.raises(RegistryError, match="413"):
        chunking.write(CONTENT)
    assert registry.count("PUT") == 1


@pytest.mark.parametrize("wrong", [{"chunk_size": 0}, {"connections": 0}])
def test_options_that_make_no_sense(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="must be positive, got"):
        BlobOptions(**wrong)
