"""One store used in two ways: by the registry over HTTP, and by the library."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from modelpack.artifacts import media_types
from modelpack.artifacts.descriptor import Descriptor
from modelpack.artifacts.digest import Digest
from modelpack.artifacts.manifest import Manifest
from modelpack.artifacts.reference import Reference
from modelpack.errors import NotFoundError
from modelpack.registry_server import RegistryServer
from modelpack.store.layout import LayoutStore
from modelpack.testing import registry
from tests.server.conftest import Client, digest_of, index, manifest


def entries(server: RegistryServer) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((server.store.root / "index.json").read_text())[
        "manifests"
    ]
    return found


def entry_annotations(server: RegistryServer) -> list[dict[str, str]]:
    return [entry.get("annotations", {}) for entry in entries(server)]


def model(store: LayoutStore, name: str) -> Manifest:
    """Write a small model into the store, not over HTTP."""
    config = store.write_bytes(b"{}", media_types.DOCKER_CONFIG_V01)
    layer = store.write_bytes(name.encode(), media_types.DOCKER_GGUF)
    built = Manifest.build(config, [layer])
    store.write_manifest(built.descriptor, built.raw, name)
    return built


def test_a_pushed_model_is_in_the_store() -> None:
    with registry() as server:
        raw = Client(server.url, "ai/smol").push_model("v1")
        for store in (server.store, LayoutStore(server.store.root)):
            for name in ("ai/smol:v1", "smol:v1", "docker.io/ai/smol:v1"):
                assert str(store.resolve(name).digest) == digest_of(raw)
            layer = Digest.parse(digest_of(b"weights"))
            assert store.blob_path(layer).read_bytes() == b"weights"
        assert entry_annotations(server) == [{media_types.REF_NAME: "docker.io/ai/smol:v1"}]


@pytest.mark.parametrize(
    ("name", "url_name"),
    [
        ("docker.io/ai/smol:v1", "ai/smol"),
        ("docker.io/ai/smol:v1", "smol"),
        ("ghcr.io/org/x:v1", "ghcr.io/org/x"),
        ("docker.io/foo.bar/x:v1", "docker.io/foo.bar/x"),
    ],
)
def test_a_stored_model_can_be_pulled(tmp_path: Path, name: str, url_name: str) -> None:
    store = LayoutStore(tmp_path / "store")
    built = model(store, name)
    with RegistryServer(store, address="127.0.0.1:0", grace=1) as server:
        client = Client(server.url, url_name)
        for reference in ("v1", str(built.digest)):
            assert client.request("GET", f"manifests/{reference}").content == built.raw
        assert client.request("GET", "tags/list").json()["tags"] == ["v1"]
        # And while the server runs.
        other = model(store, name.replace(":v1", ":v2"))
        assert client.request("GET", "manifests/v2").content == other.raw


def test_a_model_of_a_registry_with_a_port_has_no_url(tmp_path: Path) -> None:
    store = LayoutStore(tmp_path / "store")
    model(store, "127.0.0.1:5000/ai/x:v1")
    with RegistryServer(store, address="127.0.0.1:0", grace=1) as server:
        client = Client(server.url, "ai/x")
        assert client.request("GET", "tags/list").status_code == 404
        assert client.request("GET", "/v2/_catalog").json() == {"repositories": []}


def test_the_parts_of_a_stored_index_can_be_pulled_by_digest(tmp_path: Path) -> None:
    store = LayoutStore(tmp_path / "store")
    part = model(store, "docker.io/ai/part:v1")
    inner = index(part.raw)
    outer = index(inner)
    for raw, name in ((inner, None), (outer, "docker.io/other/all:v1")):
        digest = Digest.parse(digest_of(raw))
        store.write_manifest(Descriptor(media_types.OCI_INDEX, digest, len(raw)), raw, name)
    with RegistryServer(store, address="127.0.0.1:0", grace=1) as server:
        client = Client(server.url, "other/all")
        for raw in (part.raw, inner, outer):
            got = client.request("GET", f"manifests/{digest_of(raw)}")
            assert (got.status_code, got.content) == (200, raw)
        assert got.headers["Content-Type"] == media_types.OCI_INDEX
        stranger = Client(server.url, "other/none")
        assert stranger.request("GET", f"manifests/{digest_of(part.raw)}").status_code == 404


def test_a_manifest_pushed_by_digest_is_kept() -> None:
    with registry() as server:
        client = Client(server.url, "smol")
        raw = client.push_model(None)
        assert entry_annotations(server) == [{"org.modelpack.repository": "docker.io/ai/smol"}]
        assert server.store.gc(grace_seconds=0).removed == ()
        assert client.request("GET", f"manifests/{digest_of(raw)}").content == raw
        # A tag uses the entry, and leaves it when it is deleted.
        client.put_manifest("v1", raw)
        assert [one[media_types.REF_NAME] for one in entry_annotations(server)] == [
            "docker.io/ai/smol:v1"
        ]
        client.request("DELETE", "manifests/v1")
        assert entry_annotations(server) == [{"org.modelpack.repository": "docker.io/ai/smol"}]
        assert client.request("GET", f"manifests/{digest_of(raw)}").content == raw


def test_the_same_manifest_in_two_repositories() -> None:
    with registry() as server:
        one, two = Client(server.url, "a/one"), Client(server.url, "a/two")
        raw = one.push_model(None)
        digest = digest_of(raw)
        assert two.request("GET", f"manifests/{digest}").status_code == 404
        two.put_manifest(digest, raw)
        two.put_manifest("v1", raw)
        for client in (one, two):
            assert client.request("GET", f"manifests/{digest}").status_code == 200
        assert two.request("DELETE", f"manifests/{digest}").status_code == 202
        assert two.request("GET", f"manifests/{digest}").status_code == 404
        assert two.request("GET", "manifests/v1").status_code == 404
        assert one.request("GET", f"manifests/{digest}").content == raw


def test_deleting_frees_the_space() -> None:
    with registry() as server:
        client = Client(server.url, "a/b")
        subject = client.push_model("v1", b"subject")
        about = {"mediaType": media_types.OCI_MANIFEST, "size": 1, "digest": digest_of(subject)}
        referrer = manifest(client.push_blob(b"{}"), [client.push_blob(b"sbom")], subject=about)
        client.put_manifest(digest_of(referrer), referrer)
        client.request("DELETE", f"manifests/{digest_of(referrer)}")
        freed = {str(digest) for digest in server.store.gc(grace_seconds=0).removed}
        assert freed == {digest_of(b"sbom")}
        client.request("DELETE", f"manifests/{digest_of(subject)}")
        server.store.gc(grace_seconds=0)
        assert not [p for p in (server.store.root / "blobs").rglob("*") if p.is_file()]


def test_removing_in_the_library_shows_here() -> None:
    with registry() as server:
        client = Client(server.url, "a/b")
        raw = client.push_model("v1")
        server.store.tag("a/b:v1", Reference.parse("c/d:v2"))
        assert Client(server.url, "c/d").request("GET", "manifests/v2").content == raw
        server.store.remove("a/b:v1")
        assert client.request("GET", "tags/list").status_code == 404
        server.store.remove("c/d:v2")
        with pytest.raises(NotFoundError):
            server.store.resolve("c/d:v2")
        assert Client(server.url, "c/d").request("GET", "manifests/v2").status_code == 404
        assert entries(server) == []


def test_other_tools_entries_stay(tmp_path: Path) -> None:
    store = LayoutStore(tmp_path / "store")
    foreign = {"mediaType": "text/plain", "size": 1, "digest": digest_of(b"?"), "x": 1}
    odd = {"anything": True}
    (store.root / "index.json").write_text(
        json.dumps({"schemaVersion": 2, "manifests": [foreign, odd], "y": [2]})
    )
    with RegistryServer(store, address="127.0.0.1:0", grace=1) as server:
        client = Client(server.url, "a/b")
        raw = client.push_model("v1")
        client.request("DELETE", "manifests/v1")
        client.request("DELETE", f"manifests/{digest_of(raw)}")
        value = json.loads((store.root / "index.json").read_text())
    assert value["manifests"] == [foreign, odd]
    assert value["y"] == [2]


def test_a_blob_that_a_client_was_told_of_counts_as_recent(tmp_path: Path) -> None:
    """Between a client's HEAD and its manifest, garbage collection must keep the blob."""
    with registry(tmp_path / "store") as server:
        client = Client(server.url, "a/b")
        for content, request in (
            (b"head", ("HEAD", "blobs/{}")),
            (b"mount", ("POST", "blobs/uploads/?mount={}")),
        ):
            digest = client.push_blob(content)["digest"]
            path = server.store.root / "blobs" / digest.replace(":", "/")
            os.utime(path, (1, 1))
            client.request(request[0], request[1].format(digest))
            assert server.store.gc(grace_seconds=3600).removed == ()
            os.utime(path, (1, 1))
            assert len(server.store.gc(grace_seconds=3600).removed) == 1
