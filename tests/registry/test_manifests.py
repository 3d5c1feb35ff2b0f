"""Manifests and tags: the registry's headers must agree with the bytes."""

from __future__ import annotations

import json
import tracemalloc

import pytest

from modelpack.artifacts.descriptor import Descriptor
from modelpack.artifacts.digest import Digest
from modelpack.artifacts.media_types import DOCKER_MANIFEST, OCI_INDEX, OCI_MANIFEST
from modelpack.errors import (
    DigestMismatchError,
    InvalidDigestError,
    InvalidReferenceError,
    ManifestError,
    ModelpackError,
    NotFoundError,
    RegistryError,
    SizeMismatchError,
    UnsupportedError,
)
from tests.registry import faults
from tests.registry.faulty import REPOSITORY, FaultyRegistry
from tests.registry.sources import Client, manifest_for

MANIFESTS = "/manifests/"


def test_a_manifest_by_tag_and_by_digest(registry: FaultyRegistry, client: Client) -> None:
    descriptor, raw = manifest_for(registry)
    assert client.repository.resolve("v1") == descriptor
    assert client.repository.resolve(str(descriptor.digest)) == descriptor
    assert registry.count("GET") == 0, "HEAD says it all"
    assert client.repository.fetch_manifest(descriptor) == raw
    assert client.repository.fetch_manifest_by_name("v1") == (descriptor, raw)
    assert registry.count("GET", MANIFESTS) == 2
    accepted = registry.requests[0].headers["accept"]
    assert accepted.split(", ")[0] == OCI_MANIFEST
    assert {OCI_INDEX, DOCKER_MANIFEST} <= set(accepted.split(", "))


@pytest.mark.parametrize(
    "fault",
    [
        faults.without_headers("Docker-Content-Digest"),
        faults.without_headers("Content-Type"),
        faults.answering(405),
        faults.answering(400),
    ],
)
def test_resolve_reads_what_head_leaves_out(
    registry: FaultyRegistry, client: Client, fault: faults.Fault
) -> None:
    descriptor, _ = manifest_for(registry)
    registry.faults.add("HEAD", MANIFESTS, fault, times=None)
    assert client.repository.resolve("v1") == descriptor
    assert registry.count("GET", MANIFESTS) == 1


def test_old_servers_say_no_digest(registry: FaultyRegistry, client: Client) -> None:
    descriptor, raw = manifest_for(registry)
    registry.faults.add("*", MANIFESTS, faults.without_headers("Docker-Content-Digest"), times=None)
    assert client.repository.fetch_manifest_by_name("v1") == (descriptor, raw)
    assert client.repository.fetch_manifest(descriptor) == raw


@pytest.mark.parametrize("name", ["v2", str(Digest.of(b"nothing"))])
def test_a_missing_manifest(registry: FaultyRegistry, client: Client, name: str) -> None:
    manifest_for(registry)
    for call in (client.repository.resolve, client.repository.fetch_manifest_by_name):
        with pytest.raises(
            NotFoundError, match=f"no such manifest: {client.registry.host}/{REPOSITORY}.{name}"
        ):
            call(name)
    assert client.sleeps == []


@pytest.mark.scenario(7)
def test_bytes_that_are_not_the_digest(registry: FaultyRegistry, client: Client) -> None:
    descriptor, raw = manifest_for(registry)
    other = raw.replace(b"gguf", b"GGUF")
    registry.faults.add("GET", MANIFESTS, faults.replaced(other), times=None)
    with pytest.raises(DigestMismatchError) as caught:
        client.repository.fetch_manifest(descriptor)
    assert caught.value.expected == str(descriptor.digest)
    assert caught.value.got == str(Digest.of(other))
    with pytest.raises(DigestMismatchError):
        client.repository.fetch_manifest_by_name(str(descriptor.digest))
    assert registry.count("GET", "/blobs/") == 0


@pytest.mark.scenario(7)
def test_a_size_that_is_not_the_descriptors(registry: FaultyRegistry, client: Client) -> None:
    descriptor, _ = manifest_for(registry)
    wrong = Descriptor(descriptor.media_type, descriptor.digest, descriptor.size + 1)
    with pytest.raises(SizeMismatchError):
        client.repository.fetch_manifest(wrong)


@pytest.mark.scenario(8)
def test_a_stated_digest_that_is_not_the_bodys(registry: FaultyRegistry, client: Client) -> None:
    manifest_for(registry)
    stated = Digest.of(b"something else")
    fault = faults.with_headers(Docker_Content_Digest=str(stated))
    registry.faults.add("GET", MANIFESTS, fault, times=None)
    with pytest.raises(DigestMismatchError, match="Docker-Content-Digest") as caught:
        client.repository.fetch_manifest_by_name("v1")
    assert caught.value.expected == str(stated)


@pytest.mark.scenario(8)
def test_a_stated_digest_that_is_not_the_asked(registry: FaultyRegistry, client: Client) -> None:
    descriptor, _ = manifest_for(registry)
    fault = faults.with_headers(Docker_Content_Digest=str(Digest.of(b"something else")))
    registry.faults.add("*", MANIFESTS, fault, times=None)
    with pytest.raises(DigestMismatchError):
        client.repository.resolve(str(descriptor.digest))
    with pytest.raises(DigestMismatchError):
        client.repository.fetch_manifest(descriptor)


@pytest.mark.scenario(9)
def test_a_media_type_that_is_not_the_bodys(registry: FaultyRegistry, client: Client) -> None:
    descriptor, _ = manifest_for(registry)
    registry.faults.add("GET", MANIFESTS, faults.with_headers(Content_Type=OCI_INDEX), times=None)
    for call in (
        lambda: client.repository.fetch_manifest(descriptor),
        lambda: client.repository.fetch_manifest_by_name("v1"),
    ):
        with pytest.raises(ManifestError) as caught:
            call()
        assert OCI_MANIFEST in str(caught.value)
        assert OCI_INDEX in str(caught.value)


@pytest.mark.scenario(9)
def test_a_media_type_that_is_not_the_descriptors(registry: FaultyRegistry, client: Client) -> None:
    descriptor, _ = manifest_for(registry)
    wrong = Descriptor(OCI_INDEX, descriptor.digest, descriptor.size)
    with pytest.raises(ManifestError, match="announced as"):
        client.repository.fetch_manifest(wrong)


@pytest.mark.parametrize("content_type", ["text/html", "application/vnd.docker.schema1+json"])
def test_what_is_no_manifest(registry: FaultyRegistry, client: Client, content_type: str) -> None:
    registry.put_manifest(b'{"schemaVersion":2}', "v1", media_type=content_type)
    with pytest.raises(UnsupportedError, match=content_type.partition("+")[0]):
        client.repository.resolve("v1")
    with pytest.raises(UnsupportedError):
        client.repository.fetch_manifest_by_name("v1")


def test_a_content_type_with_parameters(registry: FaultyRegistry, client: Client) -> None:
    descriptor, raw = manifest_for(registry)
    fault = faults.with_headers(Content_Type=f"{OCI_MANIFEST}; charset=utf-8")
    registry.faults.add("*", MANIFESTS, fault, times=None)
    assert client.repository.resolve("v1") == descriptor
    assert client.repository.fetch_manifest_by_name("v1") == (descriptor, raw)


@pytest.mark.parametrize("fault", [faults.Exchange.send, faults.chunked])
@pytest.mark.scenario(26)
def test_fifty_megabytes(registry: FaultyRegistry, client: Client, fault: object) -> None:
    huge = b'{"schemaVersion":2,"x":"' + b"x" * 50_000_000 + b'"}'
    descriptor = registry.put_manifest(huge, "v1")
    if fault is faults.chunked:
        registry.faults.add("GET", MANIFESTS, faults.chunked, times=None)
    with pytest.raises(ManifestError, match="limit"):
        client.repository.fetch_manifest(descriptor)
    with pytest.raises(ManifestError, match="limit"):
        client.repository.resolve("v1")
    assert registry.count("GET") == 0
    with pytest.raises(RegistryError, match="more than 4194304 bytes"):
        client.repository.fetch_manifest_by_name("v1")


@pytest.mark.scenario(26)
def test_nested_a_hundred_thousand_deep(registry: FaultyRegistry, client: Client) -> None:
    deep = b'{"schemaVersion":2,"x":' + b"[" * 100_000 + b"]" * 100_000 + b"}"
    descriptor = registry.put_manifest(deep, "v1")
    tracemalloc.start()
    try:
        with pytest.raises(ManifestError, match="nested too deeply"):
            client.repository.fetch_manifest(descriptor)
        assert tracemalloc.get_traced_memory()[1] < 20_000_000
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    "name",
    [
        "sha256:../../etc",
        "sha256:" + "A" * 64,
        "sha256:" + "a" * 63,
        "md5:d41d8cd98f00b204e9800998ecf8427e",
        "sha256:" + "a" * 64 + "/../x",
    ],
)
@pytest.mark.scenario(27)
def test_no_url_is_made_of_a_bad_digest(
    registry: FaultyRegistry, client: Client, name: str
) -> None:
    for call in (
        client.repository.resolve,
        client.repository.fetch_manifest_by_name,
        client.repository.delete_manifest,
    ):
        with pytest.raises(InvalidDigestError):
            call(name)
    assert registry.requests == []


@pytest.mark.parametrize("name", ["", "..", "a/b", "a?n=1", "v 1", "-x", "x" * 129, "é"])
@pytest.mark.scenario(27)
def test_no_url_is_made_of_a_bad_tag(registry: FaultyRegistry, client: Client, name: str) -> None:
    with pytest.raises(InvalidReferenceError):
        client.repository.resolve(name)
    assert registry.requests == []


@pytest.mark.parametrize("name", ["", "..", "Upper", "a//b", "a/../b", "a?b", "a b", "a:b"])
def test_no_repository_has_such_a_name(client: Client, name: str) -> None:
    with pytest.raises(InvalidReferenceError):
        client.registry.repository(name)


def test_a_manifest_is_written_as_it_is(registry: FaultyRegistry, client: Client) -> None:
    _, raw = manifest_for(registry)
    spaced = json.dumps(json.loads(raw), indent=3).encode()
    written = Descriptor(OCI_MANIFEST, Digest.of(spaced), len(spaced))
    client.repository.write_manifest(written, spaced, "v2")
    client.repository.write_manifest(written, spaced)
    assert client.repository.fetch_manifest_by_name("v2") == (written, spaced)
    tagged, untagged = registry.seen("PUT", MANIFESTS)
    assert tagged.headers["content-type"] == OCI_MANIFEST
    assert tagged.path.endswith("/v2")
    assert untagged.path.endswith(str(written.digest))


def test_a_manifest_that_is_not_its_descriptors_is_not_sent(
    registry: FaultyRegistry, client: Client
) -> None:
    descriptor, raw = manifest_for(registry)
    with pytest.raises(DigestMismatchError):
        client.repository.write_manifest(descriptor, raw.replace(b"gguf", b"GGUF"), "v1")
    with pytest.raises(SizeMismatchError):
        client.repository.write_manifest(descriptor, raw + b" ", "v1")
    with pytest.raises(ManifestError):
        client.repository.write_manifest(descriptor, b" " * 5_000_000, "v1")
    assert registry.count("PUT") == 0


@pytest.mark.parametrize(
    ("status", "code", "message"),
    [
        (400, "TAG_INVALID", "cannot be overwritten because the tag is immutable"),
        (403, "DENIED", "tag v1 is immutable"),
        (409, "CONFLICT", ""),
        (412, "PRECONDITION", ""),
    ],
)
def test_a_tag_that_is_immutable(
    registry: FaultyRegistry, client: Client, status: int, code: str, message: str
) -> None:
    descriptor, raw = manifest_for(registry)
    body = json.dumps({"errors": [{"code": code, "message": message}]}).encode()
    registry.faults.add("PUT", "/manifests/v1", faults.answering(status, body), times=None)
    client.repository.write_manifest(descriptor, raw, "v1")
    spaced = raw + b" "
    other = Descriptor(OCI_MANIFEST, Digest.of(spaced), len(spaced))
    with pytest.raises(RegistryError, match=code) as caught:
        client.repository.write_manifest(other, spaced, "v1")
    assert caught.value.status_code == status
    assert caught.value.hint == "the registry refused to move the tag: push to another one"
    assert registry.count("PUT") == 2


def test_a_push_that_is_denied_is_an_error_though_the_tag_is_right(
    registry: FaultyRegistry, client: Client
) -> None:
    descriptor, raw = manifest_for(registry)
    for status in (400, 401, 403, 405):
        registry.faults.add("PUT", MANIFESTS, faults.answering(status))
        with pytest.raises(RegistryError) as caught:
            client.repository.write_manifest(descriptor, raw, "v1")
        assert caught.value.hint != "the registry refused to move the tag: push to another one"


def test_a_registry_that_stores_something_else(registry: FaultyRegistry, client: Client) -> None:
    descriptor, raw = manifest_for(registry)
    fault = faults.with_headers(Docker_Content_Digest=str(Digest.of(b"else")))
    registry.faults.add("PUT", MANIFESTS, fault)
    with pytest.raises(DigestMismatchError, match="the pushed manifest"):
        client.repository.write_manifest(descriptor, raw, "v1")


def test_a_manifest_whose_blob_is_missing(registry: FaultyRegistry, client: Client) -> None:
    descriptor, raw = manifest_for(registry)
    registry.content.blobs.clear()
    with pytest.raises(RegistryError, match="MANIFEST_BLOB_UNKNOWN") as caught:
        client.repository.write_manifest(descriptor, raw, "v1")
    assert caught.value.code == "MANIFEST_BLOB_UNKNOWN"


def test_tags_come_page_by_page(registry: FaultyRegistry, client: Client) -> None:
    descriptor, _ = manifest_for(registry)
    registry.page_size = 3
    wanted = ["v1", *(f"x{number}" for number in range(7))]
    registry.put_tags(wanted, descriptor.digest)
    tags = client.repository.tags()
    assert [next(tags), next(tags)] == ["v1", "x0"]
    assert registry.count("GET", "/tags/list") == 1, "pages are fetched as they are needed"
    assert list(tags) == wanted[2:]
    assert registry.count("GET", "/tags/list") == 3


def test_no_tags(registry: FaultyRegistry, client: Client) -> None:
    with pytest.raises(NotFoundError, match="NAME_UNKNOWN"):
        list(client.repository.tags())
    manifest_for(registry)
    registry.faults.add("GET", "/tags/", faults.replaced(b'{"name":"x","tags":null}'))
    assert list(client.repository.tags()) == []


@pytest.mark.parametrize(
    ("link", "problem"),
    [
        ('</v2/team/model/tags/list>; rel="next"', "pagination loop"),
        ('<http://127.0.0.1:1/v2/team/model/tags/list?last=x>; rel="next"', "another host"),
        ('<ftp://127.0.0.1/x>; rel="next"', "expected an http"),
    ],
)
def test_a_next_page_that_is_none(
    registry: FaultyRegistry, client: Client, link: str, problem: str
) -> None:
    manifest_for(registry)
    registry.faults.add("GET", "/tags/", faults.with_headers(Link=link), times=None)
    with pytest.raises(RegistryError, match=problem):
        list(client.repository.tags())


@pytest.mark.parametrize("body", [b'{"tags":{}}', b'{"tags":[1]}', b"[]", b"<html>", b"\xff"])
def test_tags_that_are_none(registry: FaultyRegistry, client: Client, body: bytes) -> None:
    manifest_for(registry)
    registry.faults.add("GET", "/tags/", faults.replaced(body))
    with pytest.raises(ModelpackError, match="tags of"):
        list(client.repository.tags())


def test_delete(registry: FaultyRegistry, client: Client) -> None:
    descriptor, _ = manifest_for(registry)
    registry.put_tags(["v2"], descriptor.digest)
    client.repository.delete_manifest("v2")
    assert list(client.repository.tags()) == ["v1"]
    client.repository.delete_manifest(str(descriptor.digest))
    with pytest.raises(NotFoundError):
        client.repository.delete_manifest("v1")
    blob = registry.put_blob(b"weights")
    client.repository.delete_blob(blob.digest)
    with pytest.raises(NotFoundError):
        client.repository.delete_blob(blob.digest)
    registry.faults.add("DELETE", "", faults.answering(405))
    with pytest.raises(RegistryError, match="405") as caught:
        client.repository.delete_manifest("v1")
    assert caught.value.hint is not None


def test_ping(registry: FaultyRegistry, client: Client) -> None:
    client.registry.ping()
    registry.faults.add("GET", "/v2/", faults.answering(404))
    with pytest.raises(RegistryError, match="not an OCI registry"):
        client.registry.ping()
