"""The client against Debian's docker-registry."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from modelpack.artifacts.descriptor import Descriptor
from modelpack.artifacts.manifest import Manifest
from modelpack.errors import AuthError, NotFoundError, RegistryError
from modelpack.registry import Credential, StaticCredentials
from modelpack.storage import Outcome, read_blob
from tests.peers import docker_registry
from tests.registry.sources import Client, Connect, Content, read_all

pytestmark = pytest.mark.peer("docker-registry")

# "ada" with the password "correct horse", by bcrypt.
HTPASSWD = "ada:$2y$04$BImCW5aL/t/pAbzZodxIQeST1kR4kJQcWPFSTRnk9SH218whYzifW\n"
CONFIG_TYPE = "application/vnd.docker.ai.model.config.v0.1+json"
LAYER_TYPE = "application/vnd.docker.ai.gguf.v3"


@pytest.fixture
def client(registry_host: str, connect: Connect) -> Client:
    """A client of an unused repository."""
    return connect(registry_host, name=f"client/{os.urandom(6).hex()}")


def push_model(client: Client, weights: bytes) -> tuple[Manifest, list[Outcome]]:
    config, layer = Content(b'{"config":{}}'), Content(weights)
    manifest = Manifest.build(
        Descriptor(CONFIG_TYPE, config.descriptor.digest, config.descriptor.size),
        [Descriptor(LAYER_TYPE, layer.descriptor.digest, layer.descriptor.size)],
    )
    outcomes = [
        client.repository.write_blob(manifest.layers[0], layer, client.watch),
        client.repository.write_blob(manifest.config, config, client.watch),
    ]
    client.repository.write_manifest(manifest.descriptor, manifest.raw, "v1")
    return manifest, outcomes


def test_push_and_pull(client: Client) -> None:
    weights = os.urandom(3_000_000)
    manifest, outcomes = push_model(client, weights)
    assert outcomes == [Outcome.WRITTEN, Outcome.WRITTEN]
    repository = client.repository
    client.registry.ping()
    assert repository.resolve("v1") == repository.resolve(str(manifest.digest))
    assert repository.resolve("v1") == manifest.descriptor
    assert repository.fetch_manifest(manifest.descriptor) == manifest.raw
    assert repository.fetch_manifest_by_name("v1") == (manifest.descriptor, manifest.raw)
    assert read_blob(repository, manifest.config) == b'{"config":{}}'
    assert read_all(repository, manifest.layers[0]) == weights
    assert read_all(repository, manifest.layers[0], 2_999_000) == weights[2_999_000:]
    assert client.sleeps == []


@pytest.mark.scenario(28)
def test_a_second_push_sends_nothing(client: Client) -> None:
    weights = os.urandom(100_000)
    manifest, _ = push_model(client, weights)
    assert all(client.repository.has_blob(blob) for blob in manifest.blobs)
    assert push_model(client, weights)[1] == [Outcome.EXISTED, Outcome.EXISTED]


@pytest.mark.scenario(28)
def test_another_repository_mounts(client: Client) -> None:
    manifest, _ = push_model(client, os.urandom(100_000))
    other = client.registry.repository(f"{client.repository.name}-copy")
    assert not any(other.has_blob(blob) for blob in manifest.blobs)
    assert all(other.mount_blob(blob, client.repository) for blob in manifest.blobs)
    other.write_manifest(manifest.descriptor, manifest.raw, "v2")
    assert list(other.tags()) == ["v2"]


def test_a_mount_that_became_a_session_is_used(client: Client) -> None:
    other = client.registry.repository(f"{client.repository.name}-copy")
    blob = Content(os.urandom(100_000))
    assert not other.mount_blob(blob.descriptor, client.repository)
    assert other.write_blob(blob.descriptor, blob, client.watch) is Outcome.WRITTEN


def test_empty_and_large_blobs(client: Client) -> None:
    for content in (b"", os.urandom(1024 * 1024), bytes(20_000_000)):
        blob = Content(content)
        assert client.repository.write_blob(blob.descriptor, blob, client.watch)
        assert read_all(client.repository, blob.descriptor) == content


@pytest.mark.scenario(30)
def test_a_wrong_source_leaves_nothing(client: Client) -> None:
    blob = Content(os.urandom(3_000_000))
    with pytest.raises(Exception, match="does not match its digest"):
        client.repository.write_blob(
            blob.descriptor,
            Content(blob.content[:-1] + bytes([blob.content[-1] ^ 1])),
            client.watch,
        )
    assert not client.repository.has_blob(blob.descriptor)
    assert client.repository.write_blob(blob.descriptor, blob, client.watch) is Outcome.WRITTEN


def test_tags_and_deletes(client: Client) -> None:
    manifest, _ = push_model(client, os.urandom(1000))
    client.repository.write_manifest(manifest.descriptor, manifest.raw, "v2")
    assert sorted(client.repository.tags()) == ["v1", "v2"]
    with pytest.raises(RegistryError, match=r"UNSUPPORTED|DIGEST_INVALID"):
        client.repository.delete_manifest("v1")  # 2.8.2 deletes by digest only
    client.repository.delete_manifest(str(manifest.digest))
    for name in ("v1", "v2", str(manifest.digest)):
        with pytest.raises(NotFoundError):
            client.repository.resolve(name)
    client.repository.delete_blob(manifest.layers[0].digest)
    assert not client.repository.has_blob(manifest.layers[0])


def test_what_is_not_there(client: Client) -> None:
    with pytest.raises(NotFoundError, match="NAME_UNKNOWN"):
        list(client.repository.tags())
    with pytest.raises(NotFoundError):
        client.repository.fetch_manifest_by_name("v1")
    blob = Content(b"nowhere")
    with pytest.raises(NotFoundError, match="BLOB_UNKNOWN"):
        client.repository.blob(blob.descriptor).open()
    config = Descriptor(CONFIG_TYPE, blob.descriptor.digest, blob.descriptor.size)
    manifest = Manifest.build(config, [])
    with pytest.raises(RegistryError, match="MANIFEST_BLOB_UNKNOWN"):
        client.repository.write_manifest(manifest.descriptor, manifest.raw)


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The host:port of a registry with a password."""
    root: Path = tmp_path_factory.mktemp("guarded")
    (root / "htpasswd").write_text(HTPASSWD)
    extra = f"auth: {{htpasswd: {{realm: Registry, path: {root / 'htpasswd'}}}}}"
    with docker_registry(root, extra) as host:
        yield host


def with_password(connect: Connect, host: str, password: str) -> Client:
    credential = Credential("ada", password, source="a test")
    return connect(host, credentials=StaticCredentials({host: credential}))


def test_a_password(guarded: str, connect: Connect) -> None:
    client = with_password(connect, guarded, "correct horse")
    weights = os.urandom(100_000)
    manifest, _ = push_model(client, weights)
    assert read_all(client.repository, manifest.layers[0]) == weights


@pytest.mark.scenario(15)
def test_a_wrong_password(guarded: str, connect: Connect) -> None:
    client = with_password(connect, guarded, "battery staple")
    with pytest.raises(AuthError, match="refused the credentials of 'ada' from a test") as caught:
        client.repository.resolve("v1")
    assert "battery" not in str(caught.value)
    with pytest.raises(AuthError, match="none are stored for it"):
        connect(guarded).registry.ping()
