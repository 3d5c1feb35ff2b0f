"""Blob uploads are complete and correct, or fail; numbers are those of the fault scenarios."""

from __future__ import annotations

import hashlib
import os
import random
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from modelpack.artifacts.descriptor import Descriptor
from modelpack.artifacts.digest import Digest
from modelpack.errors import (
    NotFoundError,
    RegistryError,
)
from modelpack.progress import Action, Progress
from modelpack.registry import Credential, StaticCredentials
from modelpack.storage import Outcome
from tests.registry import faults
from tests.registry.faulty import FaultyRegistry
from tests.registry.faulty_auth import BasicAuth
from tests.registry.faulty_content import Reply
from tests.registry.sources import Client, Connect, Content

CONTENT = random.Random(28).randbytes(3_000_000)
UPLOADS = "/blobs/uploads/"


def test_a_blob_is_written_once(registry: FaultyRegistry, client: Client) -> None:
    blob = Content(CONTENT).descriptor
    assert not client.repository.has_blob(blob)
    assert client.write(CONTENT) is Outcome.WRITTEN
    assert registry.blob(blob.digest) == CONTENT
    (put,) = registry.seen("PUT", UPLOADS)
    assert put.headers["content-length"] == str(len(CONTENT))
    assert put.headers["content-type"] == "application/octet-stream"
    assert "transfer-encoding" not in put.headers
    assert put.query == {"_state": ["a+b=="], "blank": [""], "digest": [str(blob.digest)]}
    assert client.repository.has_blob(blob)


@pytest.mark.scenario(28)
def test_what_is_there_is_not_sent_again(registry: FaultyRegistry, client: Client) -> None:
    registry.put_blob(CONTENT)
    source = Content(CONTENT)
    assert client.repository.write_blob(source.descriptor, source, client.watch) is Outcome.EXISTED
    assert source.opened == 0
    assert {request.method for request in registry.requests} == {"HEAD"}


def test_a_blob_of_another_size_is_not_there(registry: FaultyRegistry, client: Client) -> None:
    blob = registry.put_blob(CONTENT)
    assert not client.repository.has_blob(Descriptor("a/b", blob.digest, blob.size + 1))


@pytest.mark.parametrize("content", [b"", b"x", b"x" * 1024 * 1024, b"y" * (1024 * 1024 + 1)])
def test_sizes(registry: FaultyRegistry, client: Client, content: bytes) -> None:
    assert client.write(content) is Outcome.WRITTEN
    assert registry.blob(Digest.of(content)) == content


def test_sha512(registry: FaultyRegistry, client: Client) -> None:
    blob = Descriptor("a/b", Digest.of(CONTENT, "sha512"), len(CONTENT))
    client.repository.write_blob(blob, Content(CONTENT), client.watch)
    assert registry.blob(blob.digest) == CONTENT
    assert registry.seen("POST")[0].query == {"digest-algorithm": ["sha512"]}


def test_progress_is_reported(client: Client) -> None:
    client.write(CONTENT)
    reports = [report for report in client.reports if report.action is Action.PUSH]
    assert [report.completed for report in reports] == [1048576, 2097152, 3000000]
    assert reports[-1] == Progress(
        Action.PUSH, Digest.of(CONTENT).short, Digest.of(CONTENT), 3000000, 3000000
    )
    assert reports[-1].finished


def test_a_location_may_be_relative(registry: FaultyRegistry, client: Client) -> None:
    registry.relative_locations = True
    assert client.write(CONTENT) is Outcome.WRITTEN
    assert registry.blob(Digest.of(CONTENT)) == CONTENT


@pytest.mark.parametrize(
    ("location", "problem"),
    [
        ("", "without a Location"),
        ("ftp://127.0.0.1/x", "expected an http"),
        ("http://u:p@127.0.0.1/x", "user name"),
        ("http://127.0.0.1:99999/x", "does not parse"),
        ("http://:80/x", "no valid host"),
    ],
)
def test_a_location_that_leads_nowhere(
    registry: FaultyRegistry, client: Client, location: str, problem: str
) -> None:
    registry.faults.add("POST", UPLOADS, faults.with_headers(Location=location))
    with pytest.raises(RegistryError, match=problem):
        client.write(CONTENT)
    assert client.sleeps == []


@pytest.mark.scenario(17)
def test_a_location_on_another_host_gets_no_authorization(
    registry: FaultyRegistry, storage: FaultyRegistry, connect: Connect
) -> None:
    registry.auth = BasicAuth("ada", "s3cret")
    client = connect(
        registry.host, credentials=StaticCredentials({registry.host: Credential("ada", "s3cret")})
    )
    storage.content.sessions["there"] = b""
    location = f"{storage.url}/v2/team/model/blobs/uploads/there?signature=abc"
    registry.faults.add("POST", UPLOADS, faults.with_headers(Location=location))
    assert client.write(CONTENT) is Outcome.WRITTEN
    assert storage.blob(Digest.of(CONTENT)) == CONTENT
    (put,) = storage.seen("PUT")
    assert "authorization" not in put.headers
    assert put.query["signature"] == ["abc"]
    assert all("authorization" in r.headers for r in registry.requests[1:])


def test_a_put_that_is_redirected_sends_everything_there(
    registry: FaultyRegistry, storage: FaultyRegistry, client: Client
) -> None:
    storage.content.sessions["session-1"] = b""

    def redirect(exchange: faults.Exchange) -> None:
        exchange.receive()
        faults.redirecting(storage)(exchange)

    registry.faults.add("PUT", UPLOADS, redirect)
    assert client.write(CONTENT) is Outcome.WRITTEN
    assert storage.blob(Digest.of(CONTENT)) == CONTENT


@pytest.mark.long
@pytest.mark.scenario(28)
def test_memory_stays_flat(registry: FaultyRegistry, client: Client, tmp_path: Path) -> None:
    """A sparse file of 256 MiB; the server discards the bytes."""
    path = tmp_path / "sparse"
    path.touch()
    os.truncate(path, 256 * 1024 * 1024)
    with path.open("rb") as file:
        digest = Digest("sha256", hashlib.file_digest(file, "sha256").hexdigest())

    class SparseFile:
        def open(self, offset: int = 0) -> Any:
            return path.open("rb", buffering=0)

    def swallow(exchange: faults.Exchange) -> None:
        while exchange.unread:
            exchange.receive(min(exchange.unread, 1024 * 1024))
            exchange.body = b""
        exchange.send(Reply(201))

    registry.faults.add("PUT", UPLOADS, swallow)
    blob = Descriptor("a/b", digest, path.stat().st_size)
    tracemalloc.start()
    try:
        client.repository.write_blob(blob, SparseFile(), client.watch)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert registry.seen("PUT")[0].body_size == blob.size
    assert peak < 16 * 1024 * 1024


@pytest.mark.scenario(28)
def test_another_repository_gets_it_by_mount(registry: FaultyRegistry, client: Client) -> None:
    blob = registry.put_blob(CONTENT)
    other = client.registry.repository("other/model")
    assert other.mount_blob(blob, client.repository)
    assert registry.blob(blob.digest, "other/model") == CONTENT
    (post,) = registry.seen("POST")
    assert post.query == {"mount": [str(blob.digest)], "from": ["team/model"]}
    assert registry.count("PUT") == 0


def test_a_mount_from_another_client_of_the_same_registry(
    registry: FaultyRegistry, client: Client, connect: Connect
) -> None:
    blob = registry.put_blob(CONTENT)
    other = connect(registry.host, name="other/model")
    assert other.repository.mount_blob(blob, client.repository)


def test_a_mount_that_became_a_session_is_used(registry: FaultyRegistry, client: Client) -> None:
    other = client.registry.repository("other/model")
    blob = Content(CONTENT).descriptor
    assert not other.mount_blob(blob, client.repository)
    assert other.write_blob(blob, Content(CONTENT), client.watch) is Outcome.WRITTEN
    assert registry.count("POST") == 1
    assert registry.open_uploads == []


def test_a_session_that_is_not_needed_any_more_is_cancelled(
    registry: FaultyRegistry, client: Client
) -> None:
    other = client.registry.repository("other/model")
    blob = Content(CONTENT).descriptor
    assert not other.mount_blob(blob, client.repository)
    registry.put_blob(CONTENT, "other/model")
    assert other.write_blob(blob, Content(CONTENT), client.watch) is Outcome.EXISTED
    assert registry.open_uploads == []


def test_what_cannot_be_mounted(
    registry: FaultyRegistry, storage: FaultyRegistry, client: Client, connect: Connect
) -> None:
    blob = registry.put_blob(CONTENT)
    assert not client.repository.mount_blob(blob, client.repository)
    assert not client.repository.mount_blob(blob, connect(storage.host, name="a/b").repository)
    assert not client.repository.mount_blob(blob, _NoSource())
    assert registry.requests == []
    registry.faults.add("POST", UPLOADS, faults.answering(403))
    assert not client.registry.repository("other/model").mount_blob(blob, client.repository)


class _NoSource:
    def resolve(self, name: str) -> Descriptor:
        raise NotFoundError(name)

    def fetch_manifest(self, descriptor: Descriptor) -> bytes:
        raise NotFoundError("none")

    def blob(self, descriptor: Descriptor) -> Any:
        raise NotFoundError("none")
