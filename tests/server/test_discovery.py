"""Lists of tags, referrers and repositories."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
import requests

from modelpack.artifacts import media_types
from modelpack.registry_server import RegistryServer
from modelpack.testing import registry
from tests.server.conftest import Client, digest_of, index, manifest

TAGS = sorted(["v1", "v10", "v2", "V3", "_x", "latest", "0.1"])


@pytest.fixture(scope="module")
def tagged(server: RegistryServer) -> Client:
    client = Client(server.url, "discovery/tags")
    raw = client.push_model(TAGS[0])
    for tag in TAGS[1:]:
        client.put_manifest(tag, raw)
    return client


def test_all_tags(tagged: Client) -> None:
    response = tagged.request("GET", "tags/list")
    assert response.json() == {"name": "discovery/tags", "tags": TAGS}
    assert "Link" not in response.headers


@pytest.mark.parametrize(
    ("query", "expected", "more"),
    [
        ("n=3", TAGS[:3], True),
        ("n=7", TAGS, False),
        ("n=100", TAGS, False),
        ("n=0", [], False),
        ("n=0&last=V3", [], False),
        ("last=v1", ["v10", "v2"], False),
        ("n=1&last=v1", ["v10"], True),
        ("n=1&last=v10", ["v2"], False),
        ("last=v15", ["v2"], False),
        ("last=zzz", [], False),
        ("n=2&last=zzz", [], False),
    ],
)
def test_pages(tagged: Client, query: str, expected: list[str], more: bool) -> None:
    response = tagged.request("GET", f"tags/list?{query}")
    assert response.json()["tags"] == expected
    assert ("Link" in response.headers) is more


@pytest.mark.parametrize("n", ["-1", "x", "", "1.5", "9" * 30])
def test_bad_page_sizes(tagged: Client, n: str) -> None:
    assert tagged.request("GET", f"tags/list?n={n}").status_code == 400


def follow(client: Client, path: str) -> Iterator[requests.Response]:
    while True:
        response = client.request("GET", path)
        assert response.status_code == 200
        yield response
        if "next" not in response.links:
            return
        path = response.links["next"]["url"]


@pytest.mark.parametrize("n", [1, 2, 3, 6])
def test_following_the_links_finds_each_tag_once(tagged: Client, n: int) -> None:
    pages = [page.json()["tags"] for page in follow(tagged, f"tags/list?n={n}")]
    assert [tag for page in pages for tag in page] == TAGS
    assert all(len(page) == n for page in pages[:-1])


def test_a_repository_without_tags(client: Client) -> None:
    client.push_model(None)
    assert client.request("GET", "tags/list").json()["tags"] == []


def referrers(client: Client, subject: bytes, query: str = "") -> list[dict[str, object]]:
    response = client.request("GET", f"referrers/{digest_of(subject)}{query}")
    assert response.status_code == 200
    assert response.headers["Content-Type"] == media_types.OCI_INDEX
    value = response.json()
    assert (value["schemaVersion"], value["mediaType"]) == (2, media_types.OCI_INDEX)
    found: list[dict[str, object]] = value["manifests"]
    return found


def subject_of(raw: bytes) -> dict[str, object]:
    media_type = json.loads(raw)["mediaType"]
    return {"mediaType": media_type, "size": len(raw), "digest": digest_of(raw)}


def test_referrers(client: Client) -> None:
    config = client.push_blob(b"{}")
    subject = manifest(config, [], annotations={"about": "itself"})
    about = subject_of(subject)
    plain = manifest(config, [], subject=about)
    typed = manifest(
        {**config, "mediaType": media_types.OCI_EMPTY},
        [],
        subject=about,
        artifactType="application/x.sbom",
        annotations={"k": "v", "a<b": "&"},
    )
    untyped_index = index(subject=about, annotations={"k": "index"})
    typed_index = index(subject=about, artifactType="application/x.sbom")
    # Any order is accepted: the subject is pushed last.
    client.put_manifest(digest_of(plain), plain)
    client.put_manifest("signed", typed)
    client.put_manifest(digest_of(untyped_index), untyped_index, media_types.OCI_INDEX)
    client.put_manifest(digest_of(typed_index), typed_index, media_types.OCI_INDEX)
    client.put_manifest("v1", subject)

    expected = [
        {**subject_of(plain), "artifactType": "application/x.test"},
        {
            **subject_of(typed),
            "artifactType": "application/x.sbom",
            "annotations": {"k": "v", "a<b": "&"},
        },
        {**subject_of(untyped_index), "annotations": {"k": "index"}},
        {**subject_of(typed_index), "artifactType": "application/x.sbom"},
    ]
    in_order = sorted(expected, key=lambda one: str(one["digest"]))
    assert referrers(client, subject) == in_order
    sboms = [one for one in in_order if one.get("artifactType") == "application/x.sbom"]
    assert referrers(client, subject, "?artifactType=application/x.sbom") == sboms
    assert referrers(client, subject, "?artifactType=application/x.none") == []
    assert referrers(client, plain) == []

    assert client.request("DELETE", f"manifests/{digest_of(typed)}").status_code == 202
    left = [one for one in in_order if one["digest"] != digest_of(typed)]
    assert referrers(client, subject) == left


def test_referrers_belong_to_a_repository(client: Client, server: RegistryServer) -> None:
    subject = client.push_model("v1")
    raw = manifest(client.push_blob(b"{}"), [], subject=subject_of(subject))
    client.put_manifest(digest_of(raw), raw)
    other = Client(server.url, client.name + "/other")
    other.push_model("v1")
    assert len(referrers(client, subject)) == 1
    assert referrers(other, subject) == []


def test_referrers_that_a_client_listed_under_the_fallback_tag(client: Client) -> None:
    """A copy from a registry without the referrers API includes such a list."""
    subject = client.push_model("v1")
    raw = manifest(client.push_blob(b"{}"), [], subject=subject_of(subject))
    client.put_manifest(digest_of(raw), raw)
    tag = digest_of(subject).replace(":", "-")
    client.put_manifest(tag, index(raw), media_types.OCI_INDEX)
    assert [one["digest"] for one in referrers(client, subject)] == [digest_of(raw)]


def test_long_lists_of_referrers_have_pages(client: Client) -> None:
    config = client.push_blob(b"{}")
    subject = client.push_model("v1")
    pushed = set()
    for i in range(5):
        note = {"number": str(i), "text": "x" * 1_500_000}
        raw = manifest(config, [], subject=subject_of(subject), annotations=note)
        assert client.put_manifest(digest_of(raw), raw).status_code == 201
        pushed.add(digest_of(raw))
    path = f"referrers/{digest_of(subject)}?artifactType=application/x.test"
    pages = list(follow(client, path))
    assert len(pages) == 3
    assert all(len(page.content) <= 4 * 1024 * 1024 for page in pages)
    assert all(page.headers["OCI-Filters-Applied"] == "artifactType" for page in pages)
    found = [one["digest"] for page in pages for one in page.json()["manifests"]]
    assert (len(found), set(found)) == (5, pushed)


def test_catalog() -> None:
    names = ["ai/a", "b/c/d", "ghcr.io/org/x", "z/z"]
    with registry() as server:
        assert Client(server.url, "x").request("GET", "/v2/_catalog").json() == {"repositories": []}
        for name in ("docker.io/a", *names):
            Client(server.url, name).push_model("v1")
        client = Client(server.url, "x")
        assert client.request("GET", "/v2/_catalog").json() == {"repositories": names}
        pages = [page.json()["repositories"] for page in follow(client, "/v2/_catalog?n=3")]
        assert pages == [names[:3], names[3:]]
