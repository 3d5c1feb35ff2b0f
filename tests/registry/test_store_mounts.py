"""Pushes from a store: blobs that another repository of the registry has are mounted."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

import modelpack
from modelpack.artifacts.digest import Digest
from modelpack.registry.http_client import Call, HttpClient
from modelpack.store import blob_places
from modelpack.store.blob_places import MAX_PLACES, BlobPlaces
from modelpack.store.tree import Tree
from modelpack.testing import registry as embedded_registry
from tests.models import tiny_gguf
from tests.peers import docker_registry
from tests.registry.cutting import CuttingProxy
from tests.registry.distribution import distribution
from tests.registry.faults import Exchange
from tests.registry.faulty import FaultyRegistry
from tests.registry.faulty_auth import BearerAuth
from tests.registry.faulty_content import error_reply

UPLOADS = r"/v2/second/model/blobs/uploads"


@pytest.fixture(
    params=[
        "embedded",
        pytest.param("docker-registry", marks=pytest.mark.peer("docker-registry")),
        pytest.param("distribution", marks=[pytest.mark.long, pytest.mark.peer("go")]),
    ]
)
def wire(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[CuttingProxy]:
    """A proxy before a registry, that counts the bytes which clients send."""
    root = tmp_path / "registry"
    start = {"docker-registry": docker_registry, "distribution": distribution}.get(request.param)
    if start is None:
        with embedded_registry(root) as server, CuttingProxy(server.host, 10**9) as proxy:
            yield proxy
    else:
        with start(root) as host, CuttingProxy(host, 10**9) as proxy:
            yield proxy


class BlobBytes:
    """Counts the bytes of the bodies that clients send to uploads."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.sent = 0
        attempt = HttpClient.attempt

        def counted(client: HttpClient, call: Call) -> object:
            if "/blobs/" in call.url and call.body is not None:
                self.sent += len(call.body)
            return attempt(client, call)

        monkeypatch.setattr(HttpClient, "attempt", counted)

    def of_push(self, source: str, to: str, store: modelpack.Store) -> int:
        """Push a model and return the bytes."""
        self.sent = 0
        modelpack.push(source, to=to, store=store)
        return self.sent


@pytest.fixture
def blob_bytes(monkeypatch: pytest.MonkeyPatch) -> BlobBytes:
    return BlobBytes(monkeypatch)


@pytest.fixture
def store(tmp_path: Path) -> modelpack.Store:
    """A store with the model `m`, which has half a megabyte."""
    store = modelpack.Store(tmp_path / "store")
    gguf = tiny_gguf(tmp_path)
    with gguf.open("ab") as file:
        file.write(os.urandom(500_000))
    modelpack.package("m", modelpack.PackageRequest(gguf=gguf), store=store)
    return store


def test_a_second_repository_costs_no_blob_bytes(
    wire: CuttingProxy, blob_bytes: BlobBytes, store: modelpack.Store, tmp_path: Path
) -> None:
    first, second, third = (f"{wire.host}/{name}/model:v1" for name in ("a", "b", "c"))
    assert blob_bytes.of_push("m", first, store) > 500_000
    before = wire.uploaded
    assert before > 500_000
    assert blob_bytes.of_push("m", second, store) == 0
    assert wire.uploaded - before < 20_000, "heads and a manifest"

    other = modelpack.Store(tmp_path / "other")
    modelpack.pull(second, store=other)
    before = wire.uploaded
    assert blob_bytes.of_push(second, third, other) == 0, "a pull is remembered, too"
    assert wire.uploaded - before < 20_000
    fresh = modelpack.Store(tmp_path / "fresh")
    assert modelpack.pull(third, store=fresh).digest == store.resolve("m").digest


def push_twice(registry: FaultyRegistry, store: modelpack.Store) -> modelpack.Pushed:
    modelpack.push("m", to=f"{registry.host}/team/model:v1", store=store)
    registry.requests.clear()
    return modelpack.push("m", to=f"{registry.host}/second/model:v1", store=store)


def test_mounts_are_counted(registry: FaultyRegistry, store: modelpack.Store) -> None:
    done = push_twice(registry, store).transfer
    assert (done.written, done.existed, done.bytes_written) == (0, 0, 0)
    assert done.mounted == registry.count("POST", UPLOADS)
    assert all(post.query["from"] == ["team/model"] for post in registry.seen("POST"))


@pytest.fixture
def tokens(registry: FaultyRegistry, monkeypatch: pytest.MonkeyPatch) -> BearerAuth:
    """Tokens that the registry asks for, and credentials that get them."""
    registry.auth = auth = BearerAuth("ada", "s3cret")
    monkeypatch.setenv("MODELPACK_USERNAME", "ada")
    monkeypatch.setenv("MODELPACK_PASSWORD", "s3cret")
    monkeypatch.setenv("MODELPACK_REGISTRY", registry.host)
    return auth


def test_the_token_is_for_both_repositories(
    registry: FaultyRegistry, store: modelpack.Store, tokens: BearerAuth
) -> None:
    assert push_twice(registry, store).transfer.mounted
    assert tokens.token_requests[-1]["scope"] == [
        "repository:second/model:pull,push",
        "repository:team/model:pull",
    ]


@pytest.mark.parametrize("status", [400, 401, 403])
def test_a_refused_token_for_both_becomes_an_upload(
    registry: FaultyRegistry, store: modelpack.Store, tokens: BearerAuth, status: int
) -> None:
    modelpack.push("m", to=f"{registry.host}/team/model:v1", store=store)

    def refuse(exchange: Exchange) -> None:
        is_for_both = len(exchange.query["scope"]) > 1
        reply = error_reply(status, "DENIED") if is_for_both else tokens.refusal(exchange)
        assert reply is not None
        exchange.send(reply)

    registry.faults.add("GET", "/token", refuse, times=None)
    done = modelpack.push("m", to=f"{registry.host}/second/model:v1", store=store).transfer
    assert (done.mounted, done.existed) == (0, 0)
    assert done.written


@pytest.mark.parametrize("status", [400, 401, 403, 404, 405])
def test_a_refused_mount_becomes_an_upload(
    registry: FaultyRegistry, store: modelpack.Store, status: int
) -> None:
    modelpack.push("m", to=f"{registry.host}/team/model:v1", store=store)

    def refuse(exchange: Exchange) -> None:
        if "mount" in exchange.query:
            exchange.send(error_reply(status, "DENIED"))
        else:
            exchange.send(exchange.reply())

    registry.faults.add("POST", UPLOADS, refuse, times=100)
    done = modelpack.push("m", to=f"{registry.host}/second/model:v1", store=store).transfer
    assert (done.mounted, done.existed) == (0, 0)
    assert done.written
    assert registry.open_uploads == []


def test_a_blob_that_is_gone_there_is_uploaded(
    registry: FaultyRegistry, store: modelpack.Store
) -> None:
    for name in ("old/model", "team/model"):
        modelpack.push("m", to=f"{registry.host}/{name}:v1", store=store)
    for key in [key for key in registry.content.blobs if key[0] == "team/model"]:
        del registry.content.blobs[key]
    done = modelpack.push("m", to=f"{registry.host}/second/model:v1", store=store).transfer
    assert (done.written, done.existed) == (0, 0), "the older place has it"
    assert registry.open_uploads == []
    registry.content.blobs.clear()
    done = modelpack.push("m", to=f"{registry.host}/third/model:v1", store=store).transfer
    assert (done.mounted, done.existed) == (0, 0)
    assert registry.open_uploads == []


def test_places_in_other_registries_are_not_asked(
    registry: FaultyRegistry, storage: FaultyRegistry, store: modelpack.Store
) -> None:
    modelpack.push("m", to=f"{storage.host}/team/model:v1", store=store)
    modelpack.push("m", to=f"{registry.host}/second/model:v1", store=store)
    assert not any("mount" in post.query for post in registry.seen("POST"))


def test_only_stored_blobs_are_mounted(registry: FaultyRegistry, store: modelpack.Store) -> None:
    """A store must not get a blob published that the user could not upload."""
    secret = registry.put_blob(b"secret", "private/model")
    store.note_place([secret.digest], f"{registry.host}/private/model")
    with modelpack.registry.Registry(registry.host) as client:
        assert not client.repository("public/model").mount_blob(secret, store)
    assert registry.count("POST") == 0


DIGESTS = [Digest.of(str(number).encode()) for number in range(20)]


def test_the_latest_places_come_first_and_their_number_is_limited(tmp_path: Path) -> None:
    store = modelpack.Store(tmp_path / "store")
    names = [f"r.example/team/m{number}" for number in range(MAX_PLACES + 3)]
    for name in [*names, names[-2]]:
        store.note_place(DIGESTS[:1], name)
    assert store.places(DIGESTS[0]) == [names[-2], names[-1], *names[-3:2:-1]]
    assert store.places(DIGESTS[1]) == []


def test_the_number_of_blobs_and_of_bytes_is_limited(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = modelpack.Store(tmp_path / "store")
    monkeypatch.setattr(blob_places, "MAX_BLOBS", 10)
    for digest in DIGESTS:
        store.note_place([digest], "r.example/m")
    assert [bool(store.places(digest)) for digest in DIGESTS] == [False] * 10 + [True] * 10
    monkeypatch.setattr(blob_places, "_MAX_BYTES", 600)
    store.note_place(DIGESTS[:1], "r.example/m")
    assert store.places(DIGESTS[0]) == ["r.example/m"]
    assert (store.root / "ingest" / "places.json").stat().st_size <= 600


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b'{"version": 2}', b'{"version": 1, "blobs": []}', b"[" * 10**5]
)
def test_a_damaged_file_counts_as_empty(tmp_path: Path, content: bytes) -> None:
    store = modelpack.Store(tmp_path / "store")
    (store.root / "ingest" / "places.json").write_bytes(content)
    assert store.places(DIGESTS[0]) == []
    store.note_place(DIGESTS[:1], "r.example/m")
    assert store.places(DIGESTS[0]) == ["r.example/m"]


def test_entries_of_other_types_are_ignored(tmp_path: Path) -> None:
    store = modelpack.Store(tmp_path / "store")
    entry = f'{{"version": 1, "blobs": {{"{DIGESTS[0]}": ["r.example/m", 7, null], "x": 3}}}}'
    (store.root / "ingest" / "places.json").write_text(entry)
    assert store.places(DIGESTS[0]) == ["r.example/m"]


def test_a_store_that_is_locked_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blob_places, "PATIENCE", 0.01)
    store = modelpack.Store(tmp_path / "store")
    with Tree(store.root).lock().held():
        store.note_place(DIGESTS[:1], "r.example/m")
    assert store.places(DIGESTS[0]) == []


def test_a_store_that_cannot_be_written_to_is_no_error(tmp_path: Path) -> None:
    places = BlobPlaces(Tree(tmp_path / "absent"))
    places.note(DIGESTS[:1], "r.example/m")
    assert places.of(DIGESTS[0]) == []
