"""Interrupted uploads resume where the registry says, or start again if it does not say."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from modelpack.artifacts.descriptor import Descriptor
from modelpack.artifacts.digest import Digest
from modelpack.errors import DigestMismatchError, RemoteUnavailableError, SizeMismatchError
from modelpack.registry import BlobOptions, Credential, RetryPolicy, StaticCredentials, blob_upload
from modelpack.storage import Outcome
from modelpack.testing import registry as embedded_registry
from tests.peers import docker_registry
from tests.registry import faults
from tests.registry.cutting import CuttingProxy
from tests.registry.faulty import FaultyRegistry
from tests.registry.faulty_auth import BasicAuth
from tests.registry.faulty_content import Reply
from tests.registry.sources import Client, Connect, Content, read_all

CONTENT = random.Random(29).randbytes(3_000_000)
UPLOADS = "/blobs/uploads/"


def sent(registry: FaultyRegistry, method: str = "PUT") -> list[int]:
    return [request.body_size for request in registry.seen(method, UPLOADS)]


@pytest.mark.parametrize("after", [2, 1_048_576, 1_500_000, 2_999_999])
@pytest.mark.scenario(29)
def test_what_arrived_is_not_sent_again(
    registry: FaultyRegistry, client: Client, after: int
) -> None:
    registry.faults.add("PUT", UPLOADS, faults.kept_upload(after))
    assert client.write(CONTENT) is Outcome.WRITTEN
    assert registry.blob(Digest.of(CONTENT)) == CONTENT
    assert sent(registry) == [after, len(CONTENT) - after]
    assert registry.count("POST") == 1
    assert registry.count("GET", UPLOADS) == 1, "the registry is asked where it stopped"
    rest = registry.seen("PUT", UPLOADS)[1]
    assert rest.headers["content-range"] == f"{after}-{len(CONTENT) - 1}"
    assert rest.query["blank"] == [""], "the location that the registry named, with its query"


def test_all_that_is_missing_may_be_the_end(registry: FaultyRegistry, client: Client) -> None:
    registry.faults.add("PUT", UPLOADS, faults.kept_upload(len(CONTENT)))
    assert client.write(CONTENT) is Outcome.WRITTEN
    assert sent(registry) == [len(CONTENT), 0]
    assert "content-range" not in registry.seen("PUT", UPLOADS)[1].headers


def test_twenty_cuts_are_no_failure_while_bytes_arrive(
    registry: FaultyRegistry, client: Client
) -> None:
    chance = random.Random(20)
    for _ in range(20):
        registry.faults.add("PUT", UPLOADS, faults.kept_upload(chance.randrange(2, 140_000)))
    assert client.write(CONTENT) is Outcome.WRITTEN
    assert sum(sent(registry)) == len(CONTENT)
    assert client.sleeps == [0.25] * 20, "progress starts the count of failures anew"


def test_tries_without_progress_end(registry: FaultyRegistry, client: Client) -> None:
    registry.faults.add("PUT", UPLOADS, faults.kept_upload(1_000_000))
    registry.faults.add("PUT", UPLOADS, faults.kept_upload(0), times=None)
    with pytest.raises(RemoteUnavailableError, match="given up after 5 tries"):
        client.write(CONTENT)
    assert sent(registry) == [1_000_000, 0, 0, 0, 0, 0]
    assert registry.open_uploads == [], "the session was cancelled"


def test_only_what_came_after_the_last_checkpoint_is_read_again(
    registry: FaultyRegistry, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A copy reads from another registry, where reading again costs a request."""
    monkeypatch.setattr(blob_upload, "CHECKPOINT", 1024 * 1024)
    registry.faults.add("PUT", UPLOADS, faults.kept_upload(2_500_000))
    offsets: list[int] = []

    class Source(Content):
        def open(self, offset: int = 0):  # type: ignore[no-untyped-def]
            offsets.append(offset)
            return super().open(offset)

    source = Source(CONTENT)
    assert client.repository.write_blob(source.descriptor, source, client.watch) is Outcome.WRITTEN
    assert offsets == [0, 2 * 1024 * 1024]
    assert registry.blob(source.descriptor.digest) == CONTENT


@pytest.mark.parametrize(
    "status",
    [
        faults.answering(404, b'{"errors":[{"code":"BLOB_UPLOAD_UNKNOWN"}]}'),
        faults.answering(405),
        faults.answering(204),
        faults.answering(204, Range="0-0"),
        faults.answering(204, Range="0-3000000"),
        faults.answering(204, Range="5-9"),
        faults.answering(204, Range="0-99999999999999999999"),
    ],
    ids=["lost", "not offered", "no range", "nothing", "more than was sent", "a hole", "absurd"],
)
@pytest.mark.scenario(29)
def test_a_status_that_helps_nobody_costs_a_new_session(
    registry: FaultyRegistry, client: Client, status: faults.Fault
) -> None:
    registry.faults.add("PUT", UPLOADS, faults.kept_upload(1_500_000))
    registry.faults.add("GET", UPLOADS, status)
    assert client.write(CONTENT) is Outcome.WRITTEN
    assert registry.blob(Digest.of(CONTENT)) == CONTENT
    assert sent(registry)[1] == len(CONTENT)
    assert registry.count("POST") == 2
    assert registry.open_uploads == [], "the first session was cancelled"


def test_a_status_that_does_not_come_is_asked_for_again(
    registry: FaultyRegistry, client: Client
) -> None:
    registry.faults.add("PUT", UPLOADS, faults.kept_upload(1_500_000))
    registry.faults.add("GET", UPLOADS, faults.answering(503), times=2)
    assert client.write(CONTENT) is Outcome.WRITTEN
    assert sent(registry) == [1_500_000, 1_500_000]
    assert client.sleeps == [0.25, 0.5, 1.0]


def test_a_registry_that_lies_about_what_it_has_gets_everything_once_more(
    registry: FaultyRegistry, client: Client
) -> None:
    """The registry reports all bytes but lost some: its digest at the end detects that."""

    def lose_some(exchange: faults.Exchange) -> None:
        reply = exchange.reply()
        session = exchange.path.rpartition("/")[2]
        held = exchange.registry.content.sessions[session]
        exchange.registry.content.sessions[session] = b"?" * len(held)
        exchange.send(reply)

    registry.faults.add("PUT", UPLOADS, faults.kept_upload(1_500_000))
    registry.faults.add("GET", UPLOADS, lose_some)
    assert client.write(CONTENT) is Outcome.WRITTEN
    assert registry.blob(Digest.of(CONTENT)) == CONTENT
    assert sent(registry) == [1_500_000, 1_500_000, 3_000_000]
    assert registry.count("POST") == 2
    assert registry.open_uploads == []


def test_bytes_that_arrive_late_are_asked_for_again(
    registry: FaultyRegistry, client: Client
) -> None:
    """After the cut, the registry still processed bytes that it had received."""

    def late(exchange: faults.Exchange) -> None:
        reply = exchange.reply()
        session = exchange.path.rpartition("/")[2]
        exchange.registry.content.sessions[session] += CONTENT[1_500_000:1_600_000]
        exchange.send(reply)

    registry.faults.add("PUT", UPLOADS, faults.kept_upload(1_500_000))
    registry.faults.add("GET", UPLOADS, late)
    assert client.write(CONTENT) is Outcome.WRITTEN
    assert registry.blob(Digest.of(CONTENT)) == CONTENT
    assert sent(registry)[2] == len(CONTENT) - 1_600_000
    assert registry.count("POST") == 1


def test_the_blob_appeared_meanwhile(registry: FaultyRegistry, client: Client) -> None:
    def cut_and_have(exchange: faults.Exchange) -> None:
        exchange.receive(1000)
        registry.put_blob(CONTENT)
        exchange.cut()

    registry.faults.add("PUT", UPLOADS, cut_and_have)
    assert client.write(CONTENT) is Outcome.EXISTED
    assert registry.open_uploads == []


@pytest.mark.parametrize("other", [CONTENT[:-1] + b"?", CONTENT[:-1], CONTENT + b"?"])
@pytest.mark.scenario(30)
def test_a_source_that_changed_between_two_tries_is_never_completed(
    registry: FaultyRegistry, client: Client, other: bytes
) -> None:
    registry.faults.add("PUT", UPLOADS, faults.kept_upload(1_500_000))
    source = Content(CONTENT)
    wanted = source.descriptor

    def change(exchange: faults.Exchange) -> None:
        source.content = other
        exchange.send(exchange.reply())

    registry.faults.add("GET", UPLOADS, change)
    with pytest.raises((DigestMismatchError, SizeMismatchError)):
        client.repository.write_blob(wanted, source, client.watch)
    assert registry.blob(wanted.digest) is None
    assert registry.open_uploads == []


def test_a_session_of_a_failed_mount_is_resumed_too(
    registry: FaultyRegistry, client: Client
) -> None:
    blob = Descriptor("a/b", Digest.of(CONTENT), len(CONTENT))
    assert not client.repository.mount_blob(blob, client.registry.repository("other/model"))
    registry.faults.add("PUT", UPLOADS, faults.kept_upload(1_000_000))
    source = Content(CONTENT)
    assert client.repository.write_blob(blob, source, client.watch) is Outcome.WRITTEN
    assert sent(registry) == [1_000_000, 2_000_000]


@pytest.mark.scenario(17)
def test_a_status_elsewhere_gets_no_authorization(
    registry: FaultyRegistry, storage: FaultyRegistry, connect: Connect
) -> None:
    """The `Location` of a status may be on another host."""
    registry.auth = BasicAuth("ada", "s3cret")
    ada = StaticCredentials({registry.host: Credential("ada", "s3cret")})
    client = connect(registry.host, credentials=ada)
    storage.content.sessions["session-1"] = b""

    def moved(exchange: faults.Exchange) -> None:
        target = storage.url + exchange.target
        storage.content.sessions["session-1"] = CONTENT[:1_500_000]
        exchange.send(Reply(204, {"Location": target, "Range": "0-1499999"}))

    registry.faults.add("PUT", UPLOADS, faults.kept_upload(1_500_000))
    registry.faults.add("GET", UPLOADS, moved)
    assert client.write(CONTENT) is Outcome.WRITTEN
    assert storage.blob(Digest.of(CONTENT)) == CONTENT
    assert storage.count("PUT") == 1
    assert all("authorization" not in request.headers for request in storage.requests)
    assert "authorization" in registry.seen("GET", UPLOADS)[0].headers


# Against real registries

LARGE = random.Random(29).randbytes(12_000_000)
WHOLE = BlobOptions()
# The registry needs a moment to detect that the connection ended.
PATIENT = RetryPolicy(first_delay=0.5, chance=lambda: 0.0)
CHUNKS = BlobOptions(chunk_size=4_000_000)


def push_through_a_cut(host: str, blobs: BlobOptions) -> int:
    """Upload over a connection that breaks after 60 %; return the bytes that it took."""
    source = Content(LARGE)
    with (
        CuttingProxy(host, 7_200_000) as proxy,
        Client(proxy.host, blobs=blobs, retry=PATIENT) as client,
    ):
        written = client.repository.write_blob(source.descriptor, source, client.watch)
        assert proxy.has_cut
        assert written is Outcome.WRITTEN
        assert read_all(client.repository, source.descriptor) == LARGE
        return proxy.uploaded


@pytest.mark.parametrize("blobs", [WHOLE, CHUNKS], ids=["whole", "chunks"])
@pytest.mark.scenario(29)
def test_our_registry_goes_on_where_it_was_cut(blobs: BlobOptions) -> None:
    with embedded_registry() as server:
        assert push_through_a_cut(server.host, blobs) < len(LARGE) * 1.1


@pytest.mark.sample(1)
@pytest.mark.parametrize("blobs", [WHOLE, CHUNKS], ids=["whole", "chunks"])
@pytest.mark.scenario(29)
def test_docker_registry_starts_again(blobs: BlobOptions, tmp_path: Path) -> None:
    """docker-registry 2.8.2 keeps the bytes, but not the state that a client needs to resume."""
    with docker_registry(tmp_path / "registry") as host:
        assert push_through_a_cut(host, blobs) < len(LARGE) * 1.7
