"""Manifests: which are accepted, how they are stored, and how they are deleted."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor

import pytest

from modelpack.artifacts import media_types
from modelpack.registry_server import RegistryServer
from modelpack.testing import registry
from tests.server.conftest import Client, digest_of, errors, index, manifest

LIMIT = 4 * 1024 * 1024


def test_bytes_are_kept_as_they_came(client: Client) -> None:
    config, layer = client.push_blob(b"{}"), client.push_blob(b"w")
    raw = json.dumps(json.loads(manifest(config, [layer])), indent=3).encode() + b"\n \n"
    response = client.put_manifest("v1", raw)
    assert response.status_code == 201
    assert response.headers["Docker-Content-Digest"] == digest_of(raw)
    for reference in ("v1", digest_of(raw)):
        got = client.request("GET", f"manifests/{reference}")
        assert got.content == raw
        assert got.headers["Content-Type"] == media_types.OCI_MANIFEST
        assert got.headers["Docker-Content-Digest"] == digest_of(raw)
    location = client.request("GET", response.headers["Location"])
    assert location.content == raw


@pytest.mark.parametrize("accept", [None, "*/*", "text/html", media_types.OCI_INDEX])
def test_what_a_client_accepts_changes_nothing(client: Client, accept: str | None) -> None:
    raw = client.push_model("v1")
    response = client.request("GET", "manifests/v1", headers={"Accept": accept})
    assert (response.status_code, response.content) == (200, raw)


def test_many_kinds(client: Client) -> None:
    config, layer = client.push_blob(b"{}"), client.push_blob(b"w")
    docker = manifest(config, [layer], mediaType=media_types.DOCKER_MANIFEST)
    no_layers = manifest(config, [])
    artifact = manifest(
        {**config, "mediaType": media_types.OCI_EMPTY}, [layer], artifactType="application/x.test"
    )
    untyped = json.loads(manifest(config, [layer]))
    del untyped["mediaType"]
    plain = json.dumps(untyped).encode()
    listed = index(docker, no_layers, artifact)
    nested = index(listed, index())
    kinds = [
        (docker, media_types.DOCKER_MANIFEST),
        (no_layers, media_types.OCI_MANIFEST),
        (artifact, media_types.OCI_MANIFEST + "; charset=utf-8"),
        (plain, media_types.OCI_MANIFEST),
        (listed, media_types.OCI_INDEX),
        (index(), media_types.OCI_INDEX),
        (nested, media_types.OCI_INDEX),
        (
            index(docker, mediaType=media_types.DOCKER_MANIFEST_LIST),
            media_types.DOCKER_MANIFEST_LIST,
        ),
    ]
    for algorithm in ("sha256", "sha512"):
        for raw, media_type in kinds:
            digest = digest_of(raw, algorithm)
            response = client.put_manifest(digest, raw, media_type)
            assert response.status_code == 201, response.text
            assert response.headers["Docker-Content-Digest"] == digest
            got = client.request("GET", f"manifests/{digest}")
            assert got.content == raw
            assert got.headers["Content-Type"] == media_type.partition(";")[0]
            assert got.headers["Docker-Content-Digest"] == digest


def test_a_manifest_without_a_content_type(client: Client) -> None:
    raw = client.push_model("v1")
    response = client.request("PUT", "manifests/v2", data=raw)
    assert response.status_code == 201
    got = client.request("HEAD", "manifests/v2")
    assert got.headers["Content-Type"] == media_types.OCI_MANIFEST


@pytest.mark.parametrize(
    ("raw", "media_type"),
    [
        (b"", media_types.OCI_MANIFEST),
        (b"not json", media_types.OCI_MANIFEST),
        (b"[]", media_types.OCI_MANIFEST),
        (b'{"schemaVersion":1}', media_types.OCI_MANIFEST),
        (b'{"schemaVersion":2,"layers":[]}', media_types.OCI_MANIFEST),
        (b"[" * 100_000, media_types.OCI_MANIFEST),
        (index(), media_types.OCI_MANIFEST),
        (index(), "application/json"),
        (manifest({"mediaType": "a/b", "size": 1, "digest": "sha256:../x"}, []),
         media_types.OCI_MANIFEST),
        (manifest({"mediaType": "a/b", "size": -1, "digest": digest_of(b"")}, []),
         media_types.OCI_MANIFEST),
    ],
)  # fmt: skip
def test_what_is_no_manifest(client: Client, raw: bytes, media_type: str) -> None:
    response = client.put_manifest("v1", raw, media_type)
    assert (response.status_code, errors(response)) == (400, ["MANIFEST_INVALID"])
    assert client.request("HEAD", "manifests/v1").status_code == 404


def test_another_digest(client: Client) -> None:
    raw = client.push_model("v1")
    response = client.put_manifest(digest_of(raw + b" "), raw)
    assert (response.status_code, errors(response)) == (400, ["DIGEST_INVALID"])
    assert client.request("HEAD", f"manifests/{digest_of(raw + b' ')}").status_code == 404


def test_size_limit(client: Client) -> None:
    config = client.push_blob(b"{}")
    raw = manifest(config, [])
    largest = raw + b" " * (LIMIT - len(raw))
    assert client.put_manifest("v1", largest).status_code == 201
    assert client.request("GET", "manifests/v1").content == largest
    for body in (largest + b" ", iter([largest, b" "]), b" " * 50_000_000):
        response = client.put_manifest("v2", body)  # type: ignore[arg-type]
        assert (response.status_code, errors(response)) == (413, ["SIZE_INVALID"])


def test_missing_blobs(client: Client) -> None:
    config = client.push_blob(b"{}")
    lost = [
        {**config, "digest": digest_of(b"not here 1")},
        {**config, "digest": digest_of(b"not here 2")},
        {**config, "size": 3},  # stored, but with another size
    ]
    response = client.put_manifest("v1", manifest(config, [*lost, config]))
    assert response.status_code == 404
    assert errors(response) == ["MANIFEST_BLOB_UNKNOWN"] * 3
    details = [problem["detail"] for problem in response.json()["errors"]]
    assert details == [{"digest": one["digest"], "size": one["size"]} for one in lost]
    response = client.put_manifest("v1", index(b'{"mediaType":"a/b"}'), media_types.OCI_INDEX)
    assert (response.status_code, errors(response)) == (404, ["MANIFEST_BLOB_UNKNOWN"])
    assert client.request("GET", "tags/list").status_code == 404


@pytest.mark.parametrize(
    "media_type",
    [
        "application/vnd.oci.image.layer.nondistributable.v1.tar",
        "application/vnd.oci.image.layer.nondistributable.v1.tar+zstd",
        "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip",
    ],
)
def test_layers_that_live_elsewhere(client: Client, media_type: str) -> None:
    layer = {"mediaType": media_type, "size": 5, "digest": digest_of(b"elsewhere")}
    raw = manifest(client.push_blob(b"{}"), [layer])
    assert client.put_manifest("v1", raw).status_code == 201


def test_a_sparse_registry_takes_manifests_without_their_blobs() -> None:
    from modelpack.registry_server import RegistryServer

    absent = {"mediaType": "a/b", "size": 5, "digest": digest_of(b"absent")}
    raw = manifest(absent, [])
    with registry() as plain:
        store = plain.store
        assert Client(plain.url, "a/b").put_manifest("v1", raw).status_code == 404
        with RegistryServer(store, address="127.0.0.1:0", sparse=True, grace=1) as sparse:
            assert Client(sparse.url, "a/b").put_manifest("v1", raw).status_code == 201


def test_subject(client: Client) -> None:
    subject = {"mediaType": media_types.OCI_MANIFEST, "size": 9, "digest": digest_of(b"later")}
    config = client.push_blob(b"{}")
    raw = manifest(config, [], subject=subject)
    response = client.put_manifest("v1", raw)
    assert (response.status_code, response.headers["OCI-Subject"]) == (201, subject["digest"])
    assert "OCI-Subject" not in client.put_manifest("v2", manifest(config, [])).headers


def test_several_tags_at_once(client: Client) -> None:
    raw = client.push_model(None)
    tags = [f"t{i}" for i in range(12)]
    query = "&".join(f"tag={tag}" for tag in [*tags, "t0"])
    response = client.put_manifest(f"{digest_of(raw)}?{query}", raw)
    assert response.status_code == 201
    assert response.headers["OCI-Tag"].split(", ") == tags
    assert client.request("GET", "tags/list").json()["tags"] == sorted(tags)
    for query, status in [("tag=ok&tag=.bad", 400), ("tag=sha256:x", 400), ("tag=x&" * 101, 201)]:
        assert client.put_manifest(f"{digest_of(raw)}?{query}", raw).status_code == status
    many = "&".join(f"tag=m{i}" for i in range(101))
    assert client.put_manifest(f"{digest_of(raw)}?{many}", raw).status_code == 414
    assert "ok" not in client.request("GET", "tags/list").json()["tags"]


def test_a_tag_moves_and_the_old_digest_stays(client: Client) -> None:
    first = client.push_model("v1", b"first")
    second = client.push_model("v1", b"second")
    assert client.request("GET", "manifests/v1").content == second
    assert client.request("GET", f"manifests/{digest_of(first)}").content == first


def test_deleting_a_tag_leaves_the_digest(client: Client) -> None:
    raw = client.push_model("v1")
    client.put_manifest("v2", raw)
    for tag, left in (("v1", ["v2"]), ("v2", [])):
        assert client.request("DELETE", f"manifests/{tag}").status_code == 202
        assert client.request("GET", f"manifests/{tag}").status_code == 404
        assert client.request("GET", "tags/list").json()["tags"] == left
        assert client.request("GET", f"manifests/{digest_of(raw)}").content == raw
    assert client.request("DELETE", "manifests/v2").status_code == 404


def test_deleting_a_digest_deletes_its_tags(client: Client, server: RegistryServer) -> None:
    elsewhere = Client(server.url, client.name + "/elsewhere")
    raw = client.push_model("v1")
    other = client.push_model("other", b"other")
    client.put_manifest("v2", raw)
    elsewhere.push_model("v1")
    assert client.request("DELETE", f"manifests/{digest_of(raw)}").status_code == 202
    for reference in ("v1", "v2", digest_of(raw)):
        assert client.request("GET", f"manifests/{reference}").status_code == 404
    assert client.request("GET", "tags/list").json()["tags"] == ["other"]
    assert client.request("GET", "manifests/other").content == other
    assert elsewhere.request("GET", "manifests/v1").content == raw
    assert client.request("DELETE", f"manifests/{digest_of(raw)}").status_code == 404


def test_a_part_of_an_index_goes_after_it(client: Client) -> None:
    part = client.push_model(None)
    whole = index(part)
    client.put_manifest("all", whole, media_types.OCI_INDEX)
    response = client.request("DELETE", f"manifests/{digest_of(part)}")
    assert (response.status_code, errors(response)) == (405, ["DENIED"])
    assert client.request("DELETE", f"manifests/{digest_of(whole)}").status_code == 202
    assert client.request("DELETE", f"manifests/{digest_of(part)}").status_code == 202


def test_blobs_in_use_stay(client: Client) -> None:
    content = client.name.encode()
    raw = client.push_model("v1", content)
    for digest in (digest_of(content), digest_of(raw)):
        response = client.request("DELETE", f"blobs/{digest}")
        assert (response.status_code, errors(response)) == (405, ["DENIED"])
    client.request("DELETE", f"manifests/{digest_of(raw)}")
    assert client.request("DELETE", f"blobs/{digest_of(content)}").status_code == 202
    assert client.request("GET", f"blobs/{digest_of(content)}").status_code == 404
    assert client.request("DELETE", f"blobs/{digest_of(content)}").status_code == 404


def test_many_clients_tag_at_once(client: Client) -> None:
    models = [client.push_model(None, bytes([i])) for i in range(4)]

    def tag(i: int) -> int:
        status: int = client.put_manifest(f"t{i}", models[i % 4]).status_code
        return status

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(tag, range(24))) == [201] * 24
    tags = client.request("GET", "tags/list").json()["tags"]
    assert tags == sorted(f"t{i}" for i in range(24))
    for i in range(24):
        assert client.request("GET", f"manifests/t{i}").content == models[i % 4]
